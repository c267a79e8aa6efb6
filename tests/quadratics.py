"""Sites whose loss is a quadratic, in float64, so that a strategy can be held against its paper's algebra to rounding.

f_k(w) = w' H_k w / 2 - b_k' w, over one vector cut into a "body" and a "head". `Quadratic` is a LocalTraining: plain
gradient steps, or the exact minimum of whatever objective it is given (which must be quadratic too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from consilium.data import Batch
from consilium.protocols import Fitted, Objective, Personal, Selector, ServerState, Spec, Specs, Strategy, Tag, Update
from consilium.tensors import Tensors

BODY, HEAD = 4, 3
SIZE = BODY + HEAD
SPECS: Specs = {
    "body": Spec((BODY,), Tag("body", "weight"), torch.float64),
    "head": Spec((HEAD,), Tag("head", "head"), torch.float64),
}
BATCH = Batch(torch.zeros(1, 3, 1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def split(vector: np.ndarray | Tensor) -> dict[str, Tensor]:
    """The two variables of a vector [7]."""
    values = torch.as_tensor(vector, dtype=torch.float64)
    return {"body": values[:BODY].clone(), "head": values[BODY:].clone()}


def whole(tensors: Tensors) -> np.ndarray:
    """The vector [7] of the two variables."""
    return torch.cat([tensors["body"], tensors["head"]]).numpy()


@dataclass(frozen=True)
class Problem:
    """f_k, and how many images the site is said to have."""

    h: np.ndarray
    b: np.ndarray
    images: int

    def gradient(self, w: np.ndarray) -> np.ndarray:
        return self.h @ w - self.b


def problems(*images: int) -> dict[str, Problem]:
    """Sites a, b, c ... with curvatures and optima of their own."""
    draw = np.random.default_rng(5)
    found = {}
    for name, count in zip("abcdef", images, strict=False):
        root = draw.normal(size=(SIZE, SIZE))
        found[name] = Problem(root @ root.T / SIZE + 0.1 * np.eye(SIZE), draw.normal(size=SIZE), count)
    return found


def optimum(sites: Mapping[str, Problem], weights: Mapping[str, float]) -> np.ndarray:
    """Where sum of w_k f_k is least."""
    curvature = sum(weights[site] * problem.h for site, problem in sites.items())
    return np.linalg.solve(curvature, sum(weights[site] * problem.b for site, problem in sites.items()))


@dataclass(frozen=True)
class Quadratic:
    """`protocols.LocalTraining` of one site; `steps` None: the exact minimum."""

    problem: Problem
    site: str
    round: int
    steps: int | None
    rate: float
    trains: Callable[[Tag, int], bool]
    asked: list[tuple[str, float | None]] = field(default_factory=list)  # purpose and epochs of every fit

    @property
    def specs(self) -> Specs:
        return SPECS

    @property
    def num_examples(self) -> int:
        return self.problem.images

    @property
    def class_counts(self) -> Sequence[int]:
        return [self.problem.images]

    def active(self, tag: Tag) -> bool:
        return self.trains(tag, self.round)

    def loss(self, variables: Tensors, batch: Batch) -> Tensor:  # noqa: ARG002
        w = torch.cat([variables["body"], variables["head"]])
        return w @ torch.from_numpy(self.problem.h) @ w / 2 - torch.from_numpy(self.problem.b) @ w

    def watch(self, modules: object) -> AbstractContextManager[Tensors]:
        raise NotImplementedError

    def features(self, variables: Tensors) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def second_moments(self, variables: Tensors, modules: object) -> Tensors:
        raise NotImplementedError

    def gradient(self, variables: Tensors) -> Tensors:
        live = {name: value.clone().requires_grad_() for name, value in variables.items()}
        names = [name for name in live if self.active(SPECS[name].tag)]
        found = torch.autograd.grad(self.loss(live, BATCH), [live[name] for name in names])
        return dict(zip(names, found, strict=True))

    def fit(
        self,
        variables: Tensors,
        *,
        objective: Objective | None = None,
        only: Selector | None = None,
        fixed: Tensors | None = None,
        epochs: float | None = None,
        learning_rate: float | None = None,
        after_step: Callable[[Tensors], Tensors] | None = None,  # noqa: ARG002
        purpose: str = "train",
    ) -> Fitted:
        self.asked.append((purpose, epochs))
        chosen = only or self.active
        names = sorted(name for name in variables if chosen(SPECS[name.rpartition("/")[2]].tag))
        still = {**(fixed or {}), **variables}
        rate = learning_rate or self.rate

        def value(live: Mapping[str, Tensor]) -> Tensor:
            together = {**still, **live}
            return objective(together, BATCH, torch.Generator()) if objective else self.loss(together, BATCH)

        live = {name: variables[name].clone() for name in names}
        for _ in range(self.steps or 1):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in live.items()}
            found = torch.autograd.grad(value(leaves), list(leaves.values()), create_graph=self.steps is None)
            if self.steps is None:
                live = _newton(leaves, found)
            else:
                live = {n: live[n] - rate * each for n, each in zip(leaves, found, strict=True)}
        lengths = dict.fromkeys(names, rate * (self.steps or 1))
        return Fitted({**variables, **live}, float(value(live)), self.steps or 1, self.num_examples, lengths)


def _newton(leaves: dict[str, Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    flat, sizes = torch.cat(list(gradients)), [len(each) for each in leaves.values()]
    rows = [torch.cat(torch.autograd.grad(each, list(leaves.values()), retain_graph=True)) for each in flat]
    step = torch.linalg.solve(torch.stack(rows), flat.detach())
    return {name: value.detach() - part for (name, value), part in zip(leaves.items(), step.split(sizes), strict=True)}


@dataclass
class Federation:
    """The round loop without an engine: what the server holds, what sites keep and were sent."""

    strategy: Strategy
    sites: Mapping[str, Problem]
    start: np.ndarray
    steps: int | None = 1
    rate: float = 0.05
    secrets: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        initial = split(self.start)
        own = {site: split(self.secrets.get(site, self.start)) for site in self.sites}
        self.server: ServerState = self.strategy.init_server(initial, SPECS, tuple(sorted(self.sites)))
        self.kept: dict[str, Personal] = {s: self.strategy.init_site(own[s], SPECS, s) for s in self.sites}
        self.updates: list[Update] = []
        self.asked: dict[str, list[tuple[str, float | None]]] = {}

    @property
    def shared(self) -> np.ndarray:
        return whole(self.server.shared)

    def model(self, site: str) -> np.ndarray:
        """What a site would use."""
        return whole(self.strategy.deploy(self.server.shared, self.kept[site])["personal"])

    def round(self, *drawn: str) -> None:
        """One round of these sites, or of all."""
        number, self.updates = self.server.round + 1, []
        for site in sorted(drawn or self.sites):
            trains = self.strategy.declares.trains
            training = Quadratic(self.sites[site], site, number, self.steps, self.rate, trains)
            learned = self.strategy.learn(self.strategy.send(self.server, site), self.kept[site], training)
            assert learned.update.keys() <= self.strategy.up(SPECS, number).keys()
            self.kept[site], self.asked[site] = learned.personal, training.asked
            self.updates.append(Update(site, learned.update, self.sites[site].images))
        server = self.strategy.combine(self.server, self.updates, SPECS)
        self.server = ServerState(number, server.sites, server.shared, server.memory)
