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
weight. combine = "router" puts shares (r_g, r_p)(x) = softmax(R x) in front of the two, R trained and personal: no
global model then, and none of the four numbers.
Identity: personal_rank = 0 is FedIT, bit by bit; personal tensors never travel; shared + personal merged = both summed.
Family: dual LoRA
Identity test: test_without_a_personal_part_and_a_penalty_it_is_fedit
Slow reference: test_dual::test_rounds_are_those_of_the_formulas
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from consilium import orthogonality
from consilium.aggregation import Aggregation, SumOptions
from consilium.config_sites import changed
from consilium.protocols import Declaration, Part, Selector, Tag
from consilium.registry import register
from consilium.strategies.dual import Dual, LeaveOneOut
from consilium.strategies.fedavg import everything
from consilium.strategies.federated_lora import all_trained, alternating, right_frozen

SERVER = {
    "mean": all_trained,
    "ffa": right_frozen,
    "rolora": alternating,
    "fedsvd": right_frozen,
    "leave_one_out": all_trained,
}


class DualOptions(SumOptions):
    """Keys of `[strategy]` for two summed adapters."""

    personal_rank: int | None = Field(default=None, ge=0)  # None: the tuner's rank; 0: no personal adapter
    head: Literal["shared", "personal", "both"] = "shared"  # both: a personal head is added to the shared one
    server: Literal["mean", "ffa", "rolora", "fedsvd", "leave_one_out"] = Field(
        default="mean",
        description="of the shared factors. mean: both trained, then `aggregate`; ffa: A stays at the common start; "
        "rolora: B in odd rounds, A in even ones; fedsvd: B, then an SVD of B A gives both a new basis; leave_one_out: "
        "both, and each site gets the mean of the others'",
    )
    period: int = Field(default=1, ge=1)  # of fedsvd: rounds from one change of basis to the next

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
        if self.aggregate != "mean" and self.server == "fedsvd":
            raise ValueError("fedsvd is a sum of its own: leave aggregate out")
        if self.aggregate == "refactor" and self.server == "ffa":
            raise ValueError("ffa keeps A where it is: server = 'fedsvd' gives it another basis")
        if self.server != "fedsvd" and "period" in changed(self):
            raise ValueError("period has an effect with server = 'fedsvd' only")
        return self

    def aggregation(self, of_factors: bool = True) -> Aggregation:
        """The sum that `server` and `aggregate` choose."""
        chosen = super().aggregation(of_factors)
        return replace(chosen, kind="refactor", period=self.period) if self.server == "fedsvd" else chosen


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


class DualLoraOptions(DualOptions):
    """Keys of `[strategy]` for dual_lora."""

    combine: Literal["sum", "router"] = (
        "sum"  # router: mixed token by token by a softmax of the site's own, as in fedalt
    )

    @model_validator(mode="after")
    def _two_to_mix(self) -> DualLoraOptions:
        if self.combine == "router" and self.personal_rank == 0:
            raise ValueError("a router mixes two adapters: personal_rank = 0 leaves one")
        if self.combine == "router" and self.server != "mean":
            raise ValueError("other rules for shared factors are of summed adapters: server = 'mean' with a router")
        return self


@register(
    "strategies",
    "dual_lora",
    options=DualLoraOptions,
    summary="a shared and a personal adapter on every layer, trained together and summed",
    source="Med-DualLoRA: arXiv 2603.10967 (additive form)",
    facts={"leaves the site": "shared factors and the head", "stays": "personal factors"},
)
def dual_lora(options: DualLoraOptions) -> Dual:
    """No penalty: the ablation of fedopal."""
    summed, declares = options.aggregation(of_factors=options.combine == "sum"), declared(options)
    if options.combine == "router":  # its shares differ from token to token, so B A is no product that is added to W_0
        roles = declares.required_roles | {"router", "lora_a", "lora_b"}
        declares = replace(declares, combination="router", required_roles=roles, numbers={})
    return rule(options)(options.weights, shares(options), declares, summed, head=options.head)
