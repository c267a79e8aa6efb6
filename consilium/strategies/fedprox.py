"""Stage 8, strategies: FedProx, FedAvg with a pull towards what the server sent.

In: updates of sites. Out: the next shared tensors.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, MLSys 2020, arXiv 1812.06127:
h_k(w; w_t) = F_k(w) + mu/2 ||w - w_t||^2 (their equation 2).
w_t -> received    w -> variables    mu -> mu
Leaves the site, stays, kept: as FedAvg. Departures: the proximal term covers the shared tensors only; sites do a fixed
amount of work (the paper also allows a variable one).
Identity: mu = 0 is FedAvg, bit by bit; a single step from w_t is FedAvg's for every mu.
Family: optimisation
Identity test: test_fedprox_without_a_pull_is_fedavg
Slow reference: test_fedproxs_rounds_are_the_papers
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from consilium.data import Batch
from consilium.protocols import LocalTraining, Objective
from consilium.registry import register
from consilium.strategies.fedavg import FedAvg, FedAvgOptions, ObjectiveFor
from consilium.tensors import Tensors, fetched, squared_distance


class FedProxOptions(FedAvgOptions):
    """Keys of `[strategy]` for fedprox."""

    mu: float = Field(default=0.01, ge=0)


def proximal(mu: float) -> ObjectiveFor:
    """loss + mu/2 ||variables - received||^2 over the shared tensors that are trained."""

    def objective_for(received: Tensors, training: LocalTraining) -> Objective:
        active = {name: value for name, value in received.items() if training.active(training.specs[name].tag)}
        anchor = fetched(active)

        def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
            return training.loss(variables, batch) + mu / 2 * squared_distance(variables, anchor(batch.labels.device))

        return objective

    return objective_for


@register(
    "strategies",
    "fedprox",
    options=FedProxOptions,
    summary="FedAvg with a proximal term that keeps sites near the shared model",
    source="Li et al., MLSys 2020, arXiv 1812.06127",
    facts={"leaves the site": "all trained tensors", "stays": "nothing but the data"},
)
def fedprox(options: FedProxOptions) -> FedAvg:
    """FedAvg with a proximal objective."""
    return FedAvg(options.weights, objective_for=proximal(options.mu), aggregate=options.aggregation())
