"""Stage 8, strategies: sites of unequal ranks, which prune their own; the mean of factors filled with zeros.

In: updates of sites. Out: the next shared tensors.

HetLoRA: Cho et al., EMNLP 2024, arXiv 2401.06432. A site of rank r_k

    gets the first r_k columns of B and rows of A; its tail is what lies behind the first gamma r_k of them
    minimises the loss + strength * mean over layers of ||B_tail|| ||A_tail||
    prunes: r_k <- gamma r_k, if the sum over layers of ||B_tail|| ||A_tail|| is smaller after training than before

and the server fills all with zeros up to the largest rank and takes the mean, a site weighted by ||B_k A_k||:

    B <- sum w_k [B_k 0]    A <- sum w_k [A_k; 0]    w_k = ||B_k A_k|| / sum_j ||B_j A_j||

r_k -> ranks, and memory "rank/<site>" once the site has pruned    gamma, strength (lambda) -> the options
Leaves the site: both factors at its rank (their shape says which), the head, the number of training images. Stays:
images, personal tensors. Kept between rounds: the rank of each site, at the server. Bytes: N_k up and down, falling.
Departures: the abstract and a summary are known to us, the formulas above are our reading of them: tails over all
layers together and one rank for all; sizes layer by layer; gamma r_k rounded up; `weights` for what is no factor (the
head), and for factors with by_size = false. Defaults of gamma and strength are ours. The scale is the tuner's at every
rank (decision 0025). Moments of factors start anew in every round where sites may prune: shapes may have changed.
Identity: equal ranks, by_size = false, gamma = 1 is fedit, bit by bit; a mean of factors filled with zeros is no mean
of products (tests/unit/test_strategy_hetlora.py).
Family: federated LoRA
Identity test: test_equal_ranks_by_weight_without_pruning_are_fedit
Slow reference: test_strategy_hetlora::test_rounds_are_the_papers_by_hand
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from consilium import ranks
from consilium.aggregation import Aggregation
from consilium.config import changed
from consilium.data import Batch
from consilium.products import products
from consilium.protocols import (
    Declaration,
    Learned,
    LocalTraining,
    Objective,
    Part,
    Personal,
    ServerState,
    Specs,
    Update,
)
from consilium.registry import register
from consilium.strategies.fedavg import FedAvg
from consilium.strategies.federated_lora import RankedOptions
from consilium.tensors import Tensors


class HetloraOptions(RankedOptions):
    """Keys of `[strategy]` for hetlora."""

    by_size: bool = Field(default=True, strict=True)  # factors weighted by ||B_k A_k||, not by `weights`
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.75  # share of its rank that a site keeps when it prunes; 1: never
    strength: float = Field(default=0.01, ge=0)  # lambda, of the tail's size; 0: the tail is not pulled to zero

    @model_validator(mode="after")
    def _prunes(self) -> HetloraOptions:
        if self.gamma == 1 and "strength" in changed(self):
            raise ValueError("strength without effect: gamma = 1 leaves no tail")
        return self


@dataclass(frozen=True)
class HetLora(FedAvg):
    """FedAvg of factors at each site's own rank."""

    gamma: float = 1.0
    strength: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 1 and self.strength > 0:
            object.__setattr__(self, "objective_for", self._pulled)

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train; come down to a smaller rank where the tail has lost."""
        learned, kept = super().learn(received, personal, training), self._kept(received, training.specs)
        if kept is None:
            return learned
        before, after = (
            float(tail(values, training.specs, kept).detach()) for values in (received, {**received, **learned.update})
        )
        return replace(learned, update=ranks.cut(learned.update, training.specs, kept)) if after < before else learned

    def _kept(self, values: Tensors, specs: Specs) -> int | None:
        """The rank after pruning; None where there would be no other."""
        rank = ranks.rank_of(values, specs)
        kept = rank and math.ceil(round(self.gamma * rank, 9))
        return kept if kept != rank else None

    def _pulled(self, received: Tensors, training: LocalTraining) -> Objective | None:
        kept = self._kept(received, training.specs)
        if kept is None:
            return None

        def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
            return training.loss(variables, batch) + self.strength * tail(variables, training.specs, kept)

        return objective

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """The mean, and which site came at which rank."""
        listed = list(updates)
        after = super().combine(server, listed, specs)
        came = {update.site: ranks.rank_of(update.tensors, specs) for update in listed} if self.gamma < 1 else {}
        own = {f"{ranks.RANK}{site}": torch.tensor(rank) for site, rank in came.items() if rank is not None}
        return replace(after, memory={**after.memory, **own})


def tail(values: Tensors, specs: Specs, kept: int) -> Tensor:
    """Mean over layers of ||B_tail|| ||A_tail||, of what lies behind the first `kept`."""
    found = [p for p in products(specs) if p.right in values]
    lefts = [torch.cat([values[name] for name in p.left])[:, kept:] for p in found]
    sizes = [left.norm() * values[p.right][kept:].norm() for p, left in zip(found, lefts, strict=True)]
    return torch.stack(sizes).mean()


@register(
    "strategies",
    "hetlora",
    options=HetloraOptions,
    summary="sites of unequal ranks, which prune their own; means of factors filled with zeros, weighted by their size",
    source="HetLoRA: Cho et al., EMNLP 2024, arXiv 2401.06432",
    facts={
        "leaves the site": "both factors at the site's rank, and the head",
        "stays": "nothing but the data",
        "exact": "mean of factors filled with zeros; not of products",
    },
)
def hetlora(options: HetloraOptions) -> HetLora:
    """Zero-padding of any ranks, with or without self-pruning."""
    prunes = options.gamma < 1
    return HetLora(
        options.weights,
        declares=Declaration((Part(ranks=options.ranks),), prunes=prunes, restarts_factors=prunes),
        aggregate=Aggregation("padded_by_size" if options.by_size else "padded", of_factors=True),
        gamma=options.gamma,
        strength=options.strength,
    )
