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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from consilium import payload
from consilium.deployment import approvals, files
from consilium.engines import kept
from consilium.engines.relay import LARGEST
from consilium.engines.resident import run_of
from consilium.errors import ConfigError, StateError
from consilium.exchange import LARGEST_ENVELOPE
from consilium.local.train import plan
from consilium.messages import Reply, decode_reply, encode, is_count, open_message, plain
from consilium.protocols import Failure, Specs, Tag
from consilium.registry import Options

if TYPE_CHECKING:
    from consilium.data import Examples, SiteData
    from consilium.experiment import Experiment

Numbers = dict[str, Any]
_NAMED = 4  # runs that a refusal names


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
    min_images: int = Field(default=5, ge=1)  # a metric, class count or update from fewer images is blanked or refused
    min_patients: int = Field(default=5, ge=1)  # groups among training images, or no answer; of a split, or no metric
    max_bytes: int = Field(default=64 * 1024**2, ge=1)  # of one reply
    strategies: tuple[str, ...] = ("*",)
    versions: tuple[str, ...] = ("*",)  # of the coordinator's package
    approval: bool = Field(default=False, strict=True)  # a person must approve each new agreement: `site approve`
    min_seconds: float = Field(default=0.0, ge=0)  # between two new questions of a kind, as rounds
    max_runs: int = Field(default=20, ge=1)  # of which the site keeps something; one that is new beyond them is refused


@dataclass
class Gate:
    """The rules, and what they need to know of the site. `clock`: seconds."""

    rules: GateConfig
    experiment: Experiment
    data: SiteData
    folder: Path  # of the site
    clock: Callable[[], float] = time.monotonic
    asked: dict[str, list[tuple[float, str]]] = field(default_factory=dict)  # kind -> when, and digest; oldest first

    # -------------------------------------------------------------------------------------------- inwards
    def refusal(self, fields: Mapping[str, Any], digest: str = "") -> str | None:
        """Why a request is not answered; None where it may be. `digest`: of its bytes."""
        handshake = fields.get("handshake")
        version = str(handshake.get("version")) if isinstance(handshake, dict) else "none"
        return self.barred(version) or self.full(run_of(fields)) or self._too_soon(str(fields.get("kind")), digest)

    def barred(self, version: str) -> str | None:
        """Why no request of this agreement is answered, whatever it asks. `version`: of the coordinator's package."""
        strategy, patients = self.experiment.config.strategy.name, len(set(self.data.train.groups.tolist()))
        if not _fits(strategy, self.rules.strategies):
            return f"gate.strategies does not allow {strategy}"
        if not _fits(version, self.rules.versions):
            return f"gate.versions does not allow {version}"
        if patients < self.rules.min_patients:
            return f"there are fewer training patients here than gate.min_patients = {self.rules.min_patients}"
        return self.unapproved()

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

    def full(self, run: str) -> str | None:
        """Why there is no place for a run: whoever invents names of runs must not fill the disk. One that the site
        knows has its place."""
        known, most = kept.runs(self.folder / files.STATE), self.rules.max_runs
        if run in known or len(known) < most:
            return None
        names = ", ".join(known[:_NAMED]) + (f" and {len(known) - _NAMED} more" if len(known) > _NAMED else "")
        return f"gate.max_runs = {most}: the site keeps {len(known)} runs ({names}), see consilium site states"

    def _too_soon(self, kind: str, digest: str) -> str | None:
        """The same bytes again cost nothing, as the reply is that of the first time. Whatever else is asked, in which
        run and of which round it may be, is new; before its time it is refused."""
        if kind not in self._turns:
            return None  # no kind that a site answers
        before, now = self.asked.setdefault(kind, []), self.clock()
        if any(digest == known for _, known in before):
            return None
        wait = before[0][0] + self.rules.min_seconds - now if len(before) == self._turns[kind] else 0.0
        if wait > 0:
            return f"gate.min_seconds = {self.rules.min_seconds:g}: the next {kind} may come in {wait:.0f} s"
        self.asked[kind] = [*before, (now, digest)][-self._turns[kind] :]
        return None

    @cached_property
    def _turns(self) -> dict[str, int]:
        """How many new questions of a kind an agreement has in a row."""
        choice = self.experiment.strategy.declares.choice
        looks = (self.experiment.config.evaluation.serve == "best") + len(choice.candidates if choice else ())
        return {"describe": 1, "round": 1, "evaluate": max(1, looks), "finish": 1}

    @cached_property
    def largest(self) -> int:
        """Bytes that a request of this agreement can have."""
        each = [self.experiment.wire("down", number, self.data.name) for number in _rounds(self.experiment)]
        if any(None in spec.shape for specs in each for spec in specs.values()):
            return LARGEST
        return max(payload.num_bytes(specs, specs) for specs in each) + LARGEST_ENVELOPE

    # -------------------------------------------------------------------------------------------- outwards
    def let_out(self, fields: Mapping[str, Any], data: bytes) -> tuple[bytes, list[str]]:
        """A reply as it may leave, and what was blanked in it; a refusal where its tensors may not."""
        opened = open_message(data)
        specs = self.experiment.wire("up", int(opened.fields["round"]), self.data.name)
        reply = decode_reply(opened, specs)
        if reply.failure is not None:  # its text may repeat words of the request
            failure = replace(reply.failure, message=plain(reply.failure.message))
            return encode(replace(reply, failure=failure), specs), []
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
        site, counted = self.data.name, number if is_count(number) else 0
        return encode(Reply(site, counted, 0, failure=Failure(site, "refused", why)), {})

    def _rare(self, reply: Reply, specs: Specs) -> bool:
        """Class counts may be numbers of a reply, or tensors of the role "count"."""
        counts = [*reply.numbers.get("class_counts", [])]
        for name, value in reply.tensors.items():
            counts += value.flatten().tolist() if specs[name].tag.role == "count" else []
        return any(0 < count < self.rules.min_images for count in counts)

    def _numbers(self, reply: Reply) -> tuple[Numbers, list[str]]:
        """Validation and test metrics without those that may not leave, or come from too few images or patients."""
        numbers, blanked = dict(reply.numbers), list[str]()
        few = self._few(self.data.val)
        if "val" in numbers:
            numbers["val"] = {
                when: {
                    name: self._value(name, value, few, f"val.{when}.{name}", blanked) for name, value in table.items()
                }
                for when, table in numbers["val"].items()
            }
        if "metrics" in numbers:
            numbers["metrics"] = {
                split: {
                    model: self._tree(tree, getattr(self.data, split), f"{split}.{model}", blanked)
                    for model, tree in models.items()
                }
                for split, models in numbers["metrics"].items()
            }
        return numbers, blanked

    def _few(self, examples: Examples) -> bool:
        patients = len(set(examples.groups.tolist()))
        return len(examples) < self.rules.min_images or patients < self.rules.min_patients

    def _has_rare(self, examples: Examples) -> bool:
        """Whether a class is there with too few images: its own metrics could then be reckoned from those of the other
        classes and those of all images, and so could their number."""
        _, counts = np.unique(examples.labels, return_counts=True)
        return bool((counts < self.rules.min_images).any())

    def _tree(self, tree: Mapping[str, Any], examples: Examples, where: str, blanked: list[str]) -> Numbers:
        found: Numbers = {}
        all_few, rare = self._few(examples), self._has_rare(examples)
        for name, entry in tree.items():
            few = all_few or (rare and "." in name) or int(entry.get("n") or 0) < self.rules.min_images
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


def _rounds(experiment: Experiment) -> range:
    return range(1, experiment.config.train.rounds + 1)


def fewest(experiment: Experiment, images: int) -> int:
    """Different images that an update of a round is learnt from, where a site has so many to train on."""
    passes = {share for number in _rounds(experiment) for share in experiment.strategy.declares.passes(number)}
    steps = [plan(images, experiment.config.train, share, torch.Generator().manual_seed(0)) for share in passes]
    return min((len({int(row) for step in each for rows in step for row in rows}) for each in steps), default=images)


def unmeasured(gate: Gate) -> list[str]:
    """Patterns of gate.metrics that fit no metric of the agreement's task: misspelt, or of another task."""
    task = gate.experiment.task
    share, label = 1 / len(task.classes), np.zeros(1, dtype=np.int64)
    scores = {f"p.{name}": [share] for name in task.classes}
    table = pd.DataFrame({"site": [""], "id": [""], "group": [""], "label": label, **scores})
    names = {*task.validation(np.full((1, len(scores)), share), label), *task.metrics(table, bootstrap=0)}
    return [pattern for pattern in gate.rules.metrics if not any(fnmatchcase(name, pattern) for name in names)]


def check(gate: Gate) -> None:
    """ConfigError where the rules would refuse every round of this agreement: better known before anybody waits."""
    experiment, rules = gate.experiment, gate.rules
    every = [experiment.wire("up", number, gate.data.name) for number in _rounds(experiment)]
    learnt = fewest(experiment, len(gate.data.train))
    if any(every) and len(gate.data.train) > 0 and learnt < rules.min_images:
        remedy = "agree on a larger train.batch_size, on more train.local_steps, or do not take part"
        raise ConfigError(
            "a round would learn from too few images, and what it sends would tell of each of them",
            where="train",
            allowed=f"gate.min_images = {rules.min_images}",
            received=f"{learnt} images",
            remedy=remedy,
        )
    forbidden = sorted({name for specs in every for name in gate.forbidden(specs)})
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
