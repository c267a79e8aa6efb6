"""Stage 8, strategies: FedAvg whose server takes a step of its own optimiser towards the mean: FedAvgM, FedAdam, ...

In: updates of sites. Out: the next shared tensors.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, ICLR 2021, arXiv 2003.00295, algorithm 2:
D = mean of x_i - x;  m <- b1 m + (1 - b1) D;  x <- x + eta m / (sqrt(v) + tau), with
adagrad: v <- v + D^2;  yogi: v <- v - (1 - b2) D^2 sign(v - D^2);  adam: v <- b2 v + (1 - b2) D^2;  v starts at tau^2.
avgm: Hsu, Qi, Brown, arXiv 1909.06335: m <- b1 m + D;  x <- x + eta m.
x -> server.shared    mean of x_i -> after the sum    m, v -> server.memory "m/<name>", "v/<name>", float64
eta -> server_learning_rate    b1, b2 -> beta1, beta2    tau -> tau
Leaves the site, stays: as FedAvg. Kept between rounds: m and v at the server.
Departures: the mean is FedAvg's, by images unless weights = "uniform"; a tensor that no site trained in a round is left
alone with its m and v; no bias correction, as in the paper.
Identity: avgm with b1 = 0, eta = 1 is FedAvg; from v = 0 the first step of adam is Adam's of rate 1 and eps, with
eta = sqrt(1 - b2) / (1 - b1) and tau = eps sqrt(1 - b2) (tests/unit/test_strategy_fedopt.py).
Family: optimisation
Identity test: test_the_first_step_of_adam_is_torchs
Slow reference: test_strategy_fedopt::test_it_is_the_papers_algorithm
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from consilium.protocols import ServerState
from consilium.registry import register
from consilium.strategies.fedavg import FedAvg, FedAvgOptions, ServerRule

Kind = Literal["avgm", "adagrad", "adam", "yogi"]


class FedOptOptions(FedAvgOptions):
    """Keys of `[strategy]` for fedopt."""

    server: Kind = "adam"
    server_learning_rate: float = Field(default=0.01, gt=0)  # eta; of avgm 1 is the mean itself
    beta1: float = Field(default=0.9, ge=0, lt=1)  # the paper's; of m
    beta2: float | None = Field(default=None, ge=0, lt=1)  # adam and yogi; None: 0.99, the paper's
    tau: float | None = Field(default=None, gt=0)  # all but avgm, how little they adapt; None: 0.001
    start: Literal["tau", "zero"] = "tau"  # of v: tau^2, the least that the paper allows, or zero

    @model_validator(mode="after")
    def _has_effect(self) -> FedOptOptions:
        if self.aggregate not in ("mean", "median", "trimmed_mean"):
            raise ValueError("a step from the old factors towards new ones needs both in one basis: aggregate = 'mean'")
        if self.beta2 is not None and self.server not in ("adam", "yogi"):
            raise ValueError("beta2 belongs to server = 'adam' or 'yogi'")
        if self.server == "avgm" and (self.tau is not None or self.start != "tau"):
            raise ValueError("avgm has no v, so tau and start have no effect")
        return self


def _squares(kind: Kind, beta2: float) -> Callable[[Tensor, Tensor], Tensor]:
    """v, D^2 -> the next v."""
    rules: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
        "adagrad": lambda v, square: v + square,
        "adam": lambda v, square: beta2 * v + (1 - beta2) * square,
        "yogi": lambda v, square: v - (1 - beta2) * square * torch.sign(v - square),
    }
    return rules[kind]


def stepping(options: FedOptOptions) -> ServerRule:
    """A step from the state before the sum along what the sum says, for every tensor that it says something of."""
    eta, beta1, tau = options.server_learning_rate, options.beta1, options.tau or 1e-3
    first = tau**2 if options.start == "tau" else 0.0

    def step(before: ServerState, after: ServerState) -> ServerState:
        shared, memory = dict(after.shared), dict(after.memory)
        for name, mean in after.shared.items():
            x = before.shared[name]
            if mean is x:  # no site trained it
                continue
            delta = mean.double() - x.double()
            m = memory.get(f"m/{name}", torch.zeros_like(delta))
            if options.server == "avgm":
                m = move = beta1 * m + delta
            else:
                m = beta1 * m + (1 - beta1) * delta
                v = memory.get(f"v/{name}", torch.full_like(delta, first))
                v = memory[f"v/{name}"] = _squares(options.server, options.beta2 or 0.99)(v, delta.square())
                move = m / (v.sqrt() + tau)
            memory[f"m/{name}"] = m
            shared[name] = (x.double() + eta * move).to(x.dtype)
        return replace(after, shared=shared, memory=memory)

    return step


@register(
    "strategies",
    "fedopt",
    options=FedOptOptions,
    summary="FedAvg whose server takes a step of momentum, Adagrad, Adam or Yogi towards the mean",
    source="Reddi et al., ICLR 2021, arXiv 2003.00295; momentum: Hsu et al., arXiv 1909.06335",
    facts={"leaves the site": "all trained tensors", "stays": "nothing but the data", "exact": "mean of each tensor"},
)
def fedopt(options: FedOptOptions) -> FedAvg:
    """FedAvg with an optimiser at the server."""
    return FedAvg(options.weights, aggregate=options.aggregation(), server=stepping(options))
