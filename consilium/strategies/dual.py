"""Stage 8, strategies: what a site does with a shared and a personal adapter that are summed.

In: what arrived and what is personal. Out: what leaves, what stays, the models to use.

For `dual_lora` and `fedopal`: both parts are trained together with one loss and one optimiser. `LeaveOneOut` is the
same where the shared part of a site is the mean of the others' (others.py). Reasons: docs/decisions/0024-mechanism.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilium import orthogonality
from consilium.data import Batch
from consilium.errors import ConfigError
from consilium.orthogonality import DESIGN, Couple, Prepare
from consilium.protocols import Learned, LocalTraining, Objective, Personal, Specs
from consilium.strategies.fedavg import Averaging
from consilium.strategies.others import OWN, SENT, START, Others, before_aggregation, others_of, own_of
from consilium.tensors import Tensors, map_tensors, select, under, within

ADDED = "added"  # added/x: a personal tensor that is added to the shared x
PenaltyFor = Callable[[LocalTraining, tuple[Couple, ...]], Objective]  # of variables before heads are summed


@dataclass(frozen=True)
class Dual(Averaging):
    """`objective_for` adds to the task's loss; `prepare` replaces what is personal when a round begins."""

    objective_for: PenaltyFor | None = None
    prepare: Prepare | None = None
    head: str = "shared"

    def up(self, specs: Specs, round: int) -> Specs:
        """The shared tensors that may be trained; ConfigError for a personal head that would be added to none."""
        if self.head == "both" and not any(spec.tag.role == "head" for spec in self.shared(specs).values()):
            what, remedy = "no head is shared that a personal one could be added to", "head = 'personal', or share it"
            raise ConfigError(what, where="strategy.head", received="both", remedy=remedy)
        return super().up(specs, round)

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """The personal part starts at the site; a personal head that is added starts at zero."""
        heads = [n for n, spec in self.shared(specs).items() if spec.tag.role == "head" and self.head == "both"]
        start = super().init_site(initial, specs, site).tensors
        return Personal({**start, **under(ADDED, {name: torch.zeros_like(initial[name]) for name in heads})})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train both parts together; send the shared tensors that were trained."""
        pairs = orthogonality.couples(training.specs, self.declares.personal_parts)
        known = {**received, **personal.tensors}
        news = self.prepare(training, pairs, whole(known)) if self.prepare else {}
        start, design = but({**known, **news}, DESIGN), within(DESIGN, {**known, **news})
        base = {name: value for name, value in received.items() if name not in training.specs}
        trained = {name: value for name, value in start.items() if name not in base}
        fitted = training.fit(trained, objective=self._objective(training, pairs), fixed=base)
        found, shared = fitted.variables, received.keys() - base.keys()
        update = {name: found[name] for name in sorted(shared) if training.active(training.specs[name].tag)}
        kept = {**{name: found[name] for name in but(personal.tensors, DESIGN)}, **under(DESIGN, design)}
        numbers = orthogonality.numbers(pairs, known, found) if pairs else {}
        return Learned(update, Personal(kept), fitted.loss, fitted.num_steps, fitted.image_passes, numbers)

    def _objective(self, training: LocalTraining, pairs: tuple[Couple, ...]) -> Objective | None:
        if self.objective_for is not None:
            return self.objective_for(training, pairs)
        return whole_loss(training) if self.head == "both" else None

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """Both parts, and the shared one alone unless the head is personal: a missing part adds nothing, but a router
        has been trained for two."""
        models = {"personal": whole(but({**received, **personal.tensors}, DESIGN))}
        alone = not any(name.startswith("head.") for name in personal.tensors) and self.head != "personal"
        alone = alone and self.declares.combination == "sum"
        return {**models, "global": dict(received)} if alone else models


@dataclass(frozen=True)
class LeaveOneOut(Others, Dual):
    """The shared part of a site is the mean of the others': it goes on from there, and keeps what it made of it."""

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """As Dual, from the others' mean; send by how much the site's own factors have changed."""
        own, rest = own_of(received, personal), but(personal.tensors, OWN, SENT)
        beside = {**but(received, START, "sites"), **others_of(received, own)}
        learned = super().learn(beside, Personal(rest), training)
        found = select(learned.update, own.keys() & learned.update.keys())  # what this round trained
        change = map_tensors(torch.sub, found, select(own, found))
        kept = {**learned.personal.tensors, **under(OWN, {**own, **found}), **under(SENT, change)}
        return replace(learned, update={**learned.update, **change}, personal=Personal(kept))

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """The others' mean and the personal part; before aggregation the site's own factors. Global: the mean."""
        own = own_of(received, personal)
        used = own if before_aggregation(received, personal) else others_of(received, own)
        rest, plain = Personal(but(personal.tensors, OWN, SENT)), but(received, START, "sites")
        return {**super().deploy(plain, rest), "personal": super().deploy({**plain, **used}, rest)["personal"]}


def but(values: Tensors, *prefixes: str) -> dict[str, Tensor]:
    """All but what is called `prefix/name`."""
    return {name: value for name, value in values.items() if name.partition("/")[0] not in prefixes or "/" not in name}


def whole(variables: Tensors) -> Tensors:
    """Variables of the model: tensors that are added to others are added."""
    plain = but(variables, ADDED)
    return {**plain, **{name: plain[name] + value for name, value in within(ADDED, variables).items()}}


def whole_loss(training: LocalTraining) -> Objective:
    """The task's loss of the whole model."""

    def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        return training.loss(whole(variables), batch)

    return objective
