"""Composition: what a hospital lets in and out. In: a request, and the reply to it. Out: the same, less, or a refusal.

The rules are the hospital's own (`[gate]` in its site.toml), whatever the agreement says and whoever asks. A request is
looked at before any image is: strategy, package version, approval by a person, number of patients, pace. A reply is
looked at before it leaves: each tensor's tag, its bytes, and every number, of which those from few images are blanked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from consilium.deployment import approvals
from consilium.errors import ConfigError, StateError
from consilium.messages import Reply, decode_reply, encode, envelope_of
from consilium.protocols import Failure, Specs, Tag
from consilium.registry import Options

if TYPE_CHECKING:
    from consilium.data import SiteData
    from consilium.experiment import Experiment

Numbers = dict[str, Any]


class TagRule(Options):
    """Tensors that may leave, by their tag; `*` stands for anything. All given keys must fit."""

    role: str = "*"
    part: str = "*"
    module: str = "*"
    block: str = "*"  # a number, or "-" outside of blocks

    def fits(self, tag: Tag) -> bool:
        """Whether a tensor of this tag may leave."""
        block = "-" if tag.block is None else str(tag.block)
        given = ((self.role, tag.role), (self.part, tag.part), (self.module, tag.module), (self.block, block))
        return all(fnmatchcase(value, pattern) for pattern, value in given)


class GateConfig(Options):
    """The hospital's own rules. Left out, they are these."""

    tensors: tuple[TagRule, ...] = (TagRule(),)  # may leave where the strategy shares them; personal ones never do
    metrics: tuple[str, ...] = ("*",)  # names of metrics that may leave; others are blanked
    min_images: int = Field(default=5, ge=1)  # a metric or class count from fewer images is blanked or refused
    min_patients: int = Field(default=5, ge=1)  # groups among the training images, or nothing is answered at all
    max_bytes: int = Field(default=64 * 1024**2, ge=1)  # of one reply
    strategies: tuple[str, ...] = ("*",)
    versions: tuple[str, ...] = ("*",)  # of the coordinator's package
    approval: bool = Field(default=False, strict=True)  # a person must approve each new agreement: `site approve`
    min_seconds: float = Field(default=0.0, ge=0)  # between two new rounds


@dataclass
class Gate:
    """The rules, and what they need to know of the site. `clock`: seconds."""

    rules: GateConfig
    experiment: Experiment
    data: SiteData
    folder: Path  # of the site
    clock: Callable[[], float] = time.time
    last: tuple[int, float] = field(default=(0, float("-inf")))  # the newest round, and when it was asked for

    # -------------------------------------------------------------------------------------------- inwards
    def refusal(self, fields: Mapping[str, Any]) -> str | None:
        """Why a request is not answered; None where it may be."""
        handshake = fields.get("handshake")
        version = str(handshake.get("version")) if isinstance(handshake, dict) else "none"
        strategy, patients = self.experiment.config.strategy.name, len(set(self.data.train.groups.tolist()))
        if not _fits(strategy, self.rules.strategies):
            return f"gate.strategies does not allow {strategy}"
        if not _fits(version, self.rules.versions):
            return f"gate.versions does not allow {version}"
        if patients < self.rules.min_patients:
            return f"there are fewer training patients here than gate.min_patients = {self.rules.min_patients}"
        return self.unapproved() or self._too_soon(fields)

    def unapproved(self) -> str | None:
        """Why a person's word keeps this agreement out; what was taken back is out, whatever the rules ask for."""
        agreement = self.experiment.handshake.agreement
        try:
            row = approvals.standing(self.folder).get(agreement)
        except StateError:
            return "the site's approvals cannot be read (consilium site approvals)"
        if row is not None and row["word"] == approvals.WITHDRAWN:
            return f"the site has taken back its approval of agreement {agreement[:16]}"
        if row is None and self.rules.approval:
            return f"nobody at the site has approved agreement {agreement[:16]} yet (consilium site approve)"
        return None

    def _too_soon(self, fields: Mapping[str, Any]) -> str | None:
        """A round that is asked for again costs nothing; a new one before its time is refused."""
        number, now = fields.get("round"), self.clock()
        if fields.get("kind") != "round" or not isinstance(number, int) or number == self.last[0]:
            return None
        wait = self.last[1] + self.rules.min_seconds - now
        if wait > 0:
            return f"gate.min_seconds = {self.rules.min_seconds:g}: the next round may come in {wait:.0f} s"
        self.last = (number, now)
        return None

    # -------------------------------------------------------------------------------------------- outwards
    def let_out(self, fields: Mapping[str, Any], data: bytes) -> tuple[bytes, list[str]]:
        """A reply as it may leave, and what was blanked in it; a refusal where its tensors may not."""
        specs = self.experiment.wire("up", int(envelope_of(data)["round"]))
        reply = decode_reply(data, specs)
        why = self.unapproved()
        if why is not None:  # taken back while the site was at work
            return self.refuse(fields, why), []
        forbidden = self.forbidden({name: specs[name] for name in reply.tensors})
        if forbidden:
            return self.refuse(fields, f"gate.tensors does not allow {', '.join(forbidden[:4])}"), []
        if len(data) > self.rules.max_bytes:
            return self.refuse(fields, f"the reply has {len(data)} bytes, gate.max_bytes is {self.rules.max_bytes}"), []
        if self._rare(reply, specs):
            return self.refuse(fields, f"a class has fewer than gate.min_images = {self.rules.min_images} images"), []
        numbers, blanked = self._numbers(reply)
        return (encode(replace(reply, numbers=numbers), specs), blanked) if blanked else (data, [])

    def forbidden(self, specs: Specs) -> list[str]:
        """Names of the tensors that no rule lets out."""
        return sorted(
            name for name, spec in specs.items() if not any(rule.fits(spec.tag) for rule in self.rules.tensors)
        )

    def refuse(self, fields: Mapping[str, Any], why: str) -> bytes:
        """The reply that says so; it speaks of the rules alone."""
        number = fields.get("round")
        site, counted = self.data.name, number if isinstance(number, int) and number >= 0 else 0
        return encode(Reply(site, counted, 0, failure=Failure(site, "refused", why)), {})

    def _rare(self, reply: Reply, specs: Specs) -> bool:
        """Class counts may be numbers of a reply, or tensors of the role "count"."""
        counts = [*reply.numbers.get("class_counts", [])]
        for name, value in reply.tensors.items():
            counts += value.flatten().tolist() if specs[name].tag.role == "count" else []
        return any(0 < count < self.rules.min_images for count in counts)

    def _numbers(self, reply: Reply) -> tuple[Numbers, list[str]]:
        """Validation and test metrics without those that may not leave, or come from too few images."""
        numbers, blanked = dict(reply.numbers), list[str]()
        few = len(self.data.val) < self.rules.min_images
        if "val" in numbers:
            numbers["val"] = {
                when: {
                    name: self._value(name, value, few, f"val.{when}.{name}", blanked) for name, value in table.items()
                }
                for when, table in numbers["val"].items()
            }
        if "metrics" in numbers:
            numbers["metrics"] = {
                split: {model: self._tree(tree, f"{split}.{model}", blanked) for model, tree in models.items()}
                for split, models in numbers["metrics"].items()
            }
        return numbers, blanked

    def _tree(self, tree: Mapping[str, Any], where: str, blanked: list[str]) -> Numbers:
        found: Numbers = {}
        for name, entry in tree.items():
            few = int(entry.get("n") or 0) < self.rules.min_images
            kept = self._value(name, entry, few, f"{where}.{name}", blanked)
            found[name] = entry if kept is not None else {"value": None, "low": None, "high": None, "n": 0}
        return found

    def _value(self, name: str, value: Any, few: bool, where: str, blanked: list[str]) -> Any:
        if value is None or (not few and _fits(name, self.rules.metrics)):
            return value
        blanked.append(where)
        return None


def _fits(value: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns)


def check(gate: Gate) -> None:
    """ConfigError where the rules would refuse every round of this agreement: better known before anybody waits."""
    rounds = range(1, gate.experiment.config.train.rounds + 1)
    forbidden = sorted({name for number in rounds for name in gate.forbidden(gate.experiment.wire("up", number))})
    if forbidden:
        remedy = "allow them, or do not take part in this agreement"
        received = ", ".join(forbidden[:6])
        raise ConfigError(
            "the agreement sends what this hospital forbids", where="gate.tensors", received=received, remedy=remedy
        )
    select = gate.experiment.config.evaluation
    if select.serve == "best" and not _fits(select.select, gate.rules.metrics):
        raise ConfigError(
            "the agreement chooses its round by a metric that may not leave",
            where="gate.metrics",
            received=select.select,
        )
