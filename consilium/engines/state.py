"""Engine: what a site keeps. In: a site's state after a round. Out: the same state, after any crash.

One checksummed file per round in the site's own folder. It never leaves: nothing here can be put into a message.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from consilium import checkpoint
from consilium.errors import StateError
from consilium.protocols import Personal
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
    """The states of one site in one run; `agreement` ties them to the run."""

    folder: Path
    agreement: str

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
        meta = {"round": state.round, "agreement": self.agreement, "validated": dict(state.validated)}
        checkpoint.save(self._path(state.round), flat, meta)
        for number in self.rounds():
            if number < state.round and number not in keep:
                self._path(number).unlink()

    def rounds(self) -> list[int]:
        """Rounds of the states that are there, sorted."""
        return sorted(int(path.stem.split("-")[1]) for path in self.folder.glob("state-*.safetensors"))

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
        flat, meta = checkpoint.load(path)
        if meta["agreement"] != self.agreement:
            raise StateError("this state belongs to another run", where=str(path), received=meta["agreement"])
        return SiteState(
            round,
            _part(flat, "received"),
            Personal(_part(flat, "personal")),
            _part(flat, "sent"),
            _part(flat, "moments"),
            _part(flat, "residual"),
            meta["validated"],
        )

    def _path(self, round: int) -> Path:
        return self.folder / f"state-{round:05d}.safetensors"


def _part(flat: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in flat.items() if name.startswith(f"{part}/")}
