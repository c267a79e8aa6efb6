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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from consilium import orthogonality
from consilium.aggregation import SumOptions
from consilium.algebra import orthogonalised
from consilium.data import Batch
from consilium.orthogonality import Couple
from consilium.protocols import Declaration, Learned, LocalTraining, Objective, Part, Personal, Selector, Specs, Tag
from consilium.registry import register
from consilium.strategies.fedavg import Averaging, everything
from consilium.strategies.federated_lora import all_trained, alternating, right_frozen
from consilium.tensors import Tensors

OWN = "own/"  # in front of a personal tensor that is added to the shared one of the same name
TRAINS = {"both": all_trained, "left": right_frozen, "alternating": alternating}
Sides = Literal["right", "left", "both"]
PenaltyFor = Callable[[LocalTraining, tuple[Couple, ...]], Objective]  # of variables before heads are summed


class DualOptions(SumOptions):
    """Keys of `[strategy]` for two summed adapters."""

    personal_rank: int | None = Field(default=None, ge=0)  # None: the tuner's rank; 0: no personal adapter
    head: Literal["shared", "personal", "both"] = "shared"  # both: a personal head is added to the shared one
    trains: Literal["both", "left", "alternating"] = "both"  # shared factors: left as in ffa, alternating as in rolora


@dataclass(frozen=True)
class Dual(Averaging):
    """`objective_for` adds to the task's loss; `project` makes the personal part orthogonal when a round begins."""

    objective_for: PenaltyFor | None = None
    project: Sides | None = None
    head: str = "shared"

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """The personal part starts at the site; a personal head that is added starts at zero."""
        heads = [n for n, spec in self.shared(specs).items() if spec.tag.role == "head" and self.head == "both"]
        start = super().init_site(initial, specs, site).tensors
        return Personal({**start, **{f"{OWN}{name}": torch.zeros_like(initial[name]) for name in heads}})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train both parts together; send the shared tensors that were trained."""
        shared = {name: value for name, value in received.items() if name in training.specs}
        base = {name: value for name, value in received.items() if name not in shared}
        pairs = orthogonality.couples(training.specs, self.declares.personal_parts)
        came = {**shared, **personal.tensors}
        start = {**came, **(projected(pairs, came, self.project) if self.project else {})}
        fitted = training.fit(start, objective=self._objective(training, pairs), fixed=base)
        found = fitted.variables
        update = {name: found[name] for name in shared if training.active(training.specs[name].tag)}
        kept = Personal({name: found[name] for name in personal.tensors})
        numbers = orthogonality.numbers(pairs, came, found) if pairs else {}
        return Learned(update, kept, fitted.loss, fitted.num_steps, fitted.image_passes, numbers)

    def _objective(self, training: LocalTraining, pairs: tuple[Couple, ...]) -> Objective | None:
        if self.objective_for is not None:
            return self.objective_for(training, pairs)
        return whole_loss(training) if self.head == "both" else None

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """Both parts, and the shared one alone unless the head is personal: a missing part adds nothing."""
        models = {"personal": whole({**received, **personal.tensors})}
        alone = not any(name.startswith("head.") for name in personal.tensors) and self.head != "personal"
        return {**models, "global": dict(received)} if alone else models


def whole(variables: Tensors) -> Tensors:
    """Variables of the model: tensors that are added to others are added."""
    added = {name.removeprefix(OWN): value for name, value in variables.items() if name.startswith(OWN)}
    plain = {name: value for name, value in variables.items() if not name.startswith(OWN)}
    return {**plain, **{name: plain[name] + value for name, value in added.items()}}


def whole_loss(training: LocalTraining) -> Objective:
    """The task's loss of the whole model."""

    def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        return training.loss(whole(variables), batch)

    return objective


def projected(pairs: tuple[Couple, ...], values: Tensors, sides: Sides) -> dict[str, Tensor]:
    """A_p (I - Q Q^T) with Q a basis of A_g's rows (right), B_p likewise (left): exact until the next step."""
    news: dict[str, Tensor] = {}
    for shared, own in pairs:
        g, p = orthogonality.factors(shared, values), orthogonality.factors(own, values)
        if sides != "left":
            news[own.right] = orthogonalised(p.right, g.right).to(values[own.right].dtype)
        if sides != "right":
            left = orthogonalised(p.left.mT, g.left.mT).mT / own.scale
            pieces = torch.split(left, [len(values[name]) for name in own.left])
            news |= {n: piece.to(values[n].dtype).contiguous() for n, piece in zip(own.left, pieces, strict=True)}
    return news


def declared(options: DualOptions, roles: frozenset[str] = frozenset()) -> Declaration:
    """Two parts, or one where the personal rank is nothing."""
    own = (Part("personal", personal=True, rank=options.personal_rank),) if options.personal_rank != 0 else ()
    rule = TRAINS[options.trains]
    return Declaration(
        parts=(Part(), *own),
        required_roles=roles | (frozenset({"head"}) if options.head != "shared" else frozenset()),
        trains=lambda tag, round: tag.part == "personal" or rule(tag, round),
        numbers=orthogonality.NUMBERS if own else {},
    )


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
    return Dual(options.weights, shares(options), declared(options), summed, head=options.head)
