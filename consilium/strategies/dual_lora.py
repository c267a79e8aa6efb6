"""Stage 8, strategies: two adapters on every layer, a shared and a personal one, trained together and summed.

In: updates of sites. Out: the next shared tensors.

dual_lora: y = W_0 x + s B_g A_g x + s B_p A_p x with one loss and one optimiser over both, no penalty: the additive
  dual adapter of Med-DualLoRA (arXiv 2603.10967, known from its abstract), and the ablation of `fedopal`, which is
  built on it.

    A_g, B_g -> right, left factor of part shared    A_p, B_p -> those of part personal    W_0 -> frozen
Leaves the site: the shared factors, what else the tuners train, the head as `head` says, number of training images,
and four numbers on how the two adapters relate (`orthogonality.NUMBERS`). Stays: the personal part; the personal head
or its share. Kept between rounds: these, at the site.
Departures: not known which there are. Joint training has no gauge: nothing decides what goes into which adapter. s is
alpha / r of the tuner's own rank for both parts. head = "both" adds a personal head to the shared one, weight by
weight.
Identity: personal_rank = 0 is FedIT, bit by bit; personal tensors never travel; shared + personal merged = both summed.
Family: dual LoRA
Identity test: test_without_a_personal_part_and_a_penalty_it_is_fedit
Slow reference: test_dual::test_rounds_are_those_of_the_formulas
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from consilium import orthogonality
from consilium.aggregation import SumOptions
from consilium.data import Batch
from consilium.orthogonality import DESIGN, Couple, Prepare
from consilium.protocols import Declaration, Learned, LocalTraining, Objective, Part, Personal, Selector, Specs, Tag
from consilium.registry import register
from consilium.strategies.fedavg import Averaging, everything
from consilium.strategies.federated_lora import all_trained, alternating, right_frozen
from consilium.strategies.others import OWN, SENT, START, Others, before_aggregation, others_of, own_of
from consilium.tensors import Tensors, map_tensors, under, within

ADDED = "added"  # added/x: a personal tensor that is added to the shared x
SERVER = {"mean": all_trained, "ffa": right_frozen, "rolora": alternating, "leave_one_out": all_trained}
PenaltyFor = Callable[[LocalTraining, tuple[Couple, ...]], Objective]  # of variables before heads are summed


class DualOptions(SumOptions):
    """Keys of `[strategy]` for two summed adapters."""

    personal_rank: int | None = Field(default=None, ge=0)  # None: the tuner's rank; 0: no personal adapter
    head: Literal["shared", "personal", "both"] = "shared"  # both: a personal head is added to the shared one
    server: Literal["mean", "ffa", "rolora", "leave_one_out"] = Field(
        default="mean",
        description="of the shared factors. mean: both trained, then `aggregate`; ffa: A stays at the common start; "
        "rolora: B in odd rounds, A in even ones; leave_one_out: both, and each site gets the mean of the others'",
    )

    @model_validator(mode="before")
    @classmethod
    def _alike(cls, table: Mapping[str, object]) -> Mapping[str, object]:
        return {"weights": "uniform", **table} if table.get("server") == "leave_one_out" else table

    @model_validator(mode="after")
    def _one_rule(self) -> DualOptions:
        bounded = self.clip_updates is not None or self.refuse_updates is not None
        if self.server == "leave_one_out" and (self.weights != "uniform" or self.aggregate != "mean" or bounded):
            raise ValueError("leave_one_out counts all sites alike and sums changes: no weights, aggregate or bounds")
        if self.server in ("ffa", "rolora") and self.aggregate in ("product_svd", "residual"):
            raise ValueError(f"aggregate = {self.aggregate!r} has no effect where one factor is common: leave it out")
        return self


@dataclass(frozen=True)
class Dual(Averaging):
    """`objective_for` adds to the task's loss; `prepare` replaces what is personal when a round begins."""

    objective_for: PenaltyFor | None = None
    prepare: Prepare | None = None
    head: str = "shared"

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
        """Both parts, and the shared one alone unless the head is personal: a missing part adds nothing."""
        models = {"personal": whole(but({**received, **personal.tensors}, DESIGN))}
        alone = not any(name.startswith("head.") for name in personal.tensors) and self.head != "personal"
        return {**models, "global": dict(received)} if alone else models


@dataclass(frozen=True)
class LeaveOneOut(Others, Dual):
    """The shared part of a site is the mean of the others': it goes on from there, and keeps what it made of it."""

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """As Dual, from the others' mean; send by how much the site's own factors have changed."""
        own, rest = own_of(received, personal), but(personal.tensors, OWN, SENT)
        beside = {**but(received, START, "sites"), **others_of(received, own)}
        learned = super().learn(beside, Personal(rest), training)
        found = {name: learned.update[name] for name in own}
        change = map_tensors(torch.sub, found, own)
        kept = {**learned.personal.tensors, **under(OWN, found), **under(SENT, change)}
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


def declared(options: DualOptions, roles: frozenset[str] = frozenset(), still: Collection[str] = ()) -> Declaration:
    """Two parts, or one where the personal rank is nothing; personal tensors with a role of `still` are not trained."""
    own = (Part("personal", personal=True, rank=options.personal_rank),) if options.personal_rank != 0 else ()
    trained = SERVER[options.server]
    return Declaration(
        parts=(Part(), *own),
        required_roles=roles | (frozenset({"head"}) if options.head != "shared" else frozenset()),
        trains=lambda tag, round: tag.role not in still if tag.part == "personal" else trained(tag, round),
        numbers=orthogonality.NUMBERS if own else {},
    )


def rule(options: DualOptions) -> type[Dual]:
    """What sites receive: the sum, or each the mean of the others."""
    return LeaveOneOut if options.server == "leave_one_out" else Dual


def shares(options: DualOptions) -> Selector:
    """All of the shared part; the head unless it is personal."""
    return everything if options.head != "personal" else but_head


def but_head(tag: Tag) -> bool:
    """Everything but the head."""
    return tag.role != "head"


@register(
    "strategies",
    "dual_lora",
    options=DualOptions,
    summary="a shared and a personal adapter on every layer, trained together and summed",
    source="Med-DualLoRA: arXiv 2603.10967 (additive form)",
    facts={"leaves the site": "shared factors and the head", "stays": "personal factors"},
)
def dual_lora(options: DualOptions) -> Dual:
    """No penalty: the ablation of fedopal."""
    summed = options.aggregation(of_factors=True)
    return rule(options)(options.weights, shares(options), declared(options), summed, head=options.head)
