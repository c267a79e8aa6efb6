"""Engine: what a site keeps. In: a site's state after a round. Out: the same state, after any crash.

One checksummed file per round in the site's own folder. It never leaves: nothing here can be put into a message.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from consilium import checkpoint, ranks
from consilium.engines import kept
from consilium.errors import StateError
from consilium.experiment import Experiment
from consilium.protocols import Personal, Specs
from consilium.sealing import Seal, sealed
from consilium.tensors import Tensors


@dataclass(frozen=True)
class SiteState:
    """After a round: all that was received so far, what is personal, what was trained to be sent, the optimiser's
    moments, what a codec left unsaid, and the validation of the model as it was trained, which is not computed again
    where that model comes back."""

    round: int
    received: Tensors
    personal: Personal
    sent: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    residual: Tensors = field(default_factory=dict)
    validated: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StateFolder:
    """The states of one site in one run; `agreement` ties them to the run, `key` encrypts them."""

    folder: Path
    agreement: str
    key: bytes | None = field(default=None, repr=False)
    site: str = ""

    def save(self, state: SiteState, keep: Collection[int]) -> None:
        """Write the state of a round and drop the earlier ones that are not to be kept; later ones stay as they are."""
        parts = {
            "received": state.received,
            "personal": state.personal.tensors,
            "sent": state.sent,
            "moments": state.moments,
            "residual": state.residual,
        }
        flat = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        meta: dict[str, object] = {"round": state.round, "agreement": self.agreement, "site": self.site}
        meta["validated"] = dict(state.validated)
        checkpoint.save(self._path(state.round), flat, meta, self._seal(state.round))
        for number in self.rounds():
            if number < state.round and number not in keep:
                self._path(number).unlink()

    def rounds(self) -> list[int]:
        """Rounds of the states that are there, sorted."""
        return kept.rounds(self.folder)

    def load(self, round: int) -> SiteState:
        """The state after `round`; StateError where it is missing, damaged or of another run."""
        path = self._path(round)
        if not path.is_file():
            remedy = "restore the site's folder from its backup, or start a new run"
            raise StateError(
                "the site lacks the state that this request builds on",
                where=str(self.folder),
                allowed=f"rounds {self.rounds()}",
                received=f"round {round}",
                remedy=remedy,
            )
        flat, meta = checkpoint.load(path, self._seal(round))
        if meta["agreement"] != self.agreement:
            raise StateError("this state belongs to another run", where=str(path), received=meta["agreement"])
        if (
            self.site and meta.get("site", self.site) != self.site
        ):  # a folder that was copied: it holds what is personal
            remedy = "remove it here, and give this hospital a folder of its own"
            raise StateError("this state is another site's", where=str(path), received=meta["site"], remedy=remedy)
        return SiteState(
            round,
            _part(flat, "received"),
            Personal(_part(flat, "personal")),
            _part(flat, "sent"),
            _part(flat, "moments"),
            _part(flat, "residual"),
            meta["validated"],
        )

    def _seal(self, round: int) -> Seal | None:
        return sealed("state", self.key, self.agreement, self.site, round)

    def _path(self, round: int) -> Path:
        return self.folder / f"state-{round:05d}.safetensors"


def _part(flat: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in flat.items() if name.startswith(f"{part}/")}


# ------------------------------------------------------------------------------------------------ room on the disk
def check_room(experiment: Experiment, folder: Path, sites: Collection[str]) -> None:
    """StateError where the disk under a run folder has not even room for the tensors that its sites will keep there;
    ConfigError where ranks are given to sites that are not among them."""
    ranks.check_names(experiment.strategy.declares.parts, sites)
    train = experiment.config.train
    rounds, drawn = min(2, train.rounds), max(1, round(train.participation * len(sites)))
    each = least_bytes(experiment, min(sites))
    there = sum(path.stat().st_size for path in folder.glob("sites/*/state-*.safetensors"))  # of a run that goes on
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if drawn * rounds * each - there > free:
        raise StateError(
            "the disk has no room for what the sites of this run keep",
            where=str(folder),
            allowed=f"{free / 1e9:.3g} GB free",
            received=f"{drawn} sites x {rounds} rounds x {each / 1e6:.3g} MB = {drawn * rounds * each / 1e9:.3g} GB",
            remedy="free disk space, choose an --out on another disk, or a tuner with fewer parameters",
        )


def least_bytes(experiment: Experiment, site: str) -> int:
    """Of a site's state after a round: every variable, as it came or as it is personal; what was trained to be
    sent; the moments of that. What a strategy keeps beside these, and what a codec left unsaid, come on top."""
    train, specs = experiment.config.train, experiment.at(site)
    moments = 0 if train.moments == "reset" else 2 if train.optimizer == "adamw" else 1 if train.momentum else 0
    halves = [experiment.sent(number, site) for number in (1, 2)]  # some strategies send halves in turn
    sent = min(_num_bytes({name: each[name] for name in each.keys() & specs.keys()}) for each in halves)
    return _num_bytes(specs) + _num_bytes(experiment.frozen) + (1 + moments) * sent


def _num_bytes(specs: Specs) -> int:
    return sum(math.prod(size or 0 for size in spec.shape) * spec.dtype.itemsize for spec in specs.values())
