"""A federation of least squares in float64, with plain full-batch gradient descent: rounds that fit on a page by hand.

outputs = head (W_0 + sum over parts of s B A) x. A strategy runs on it by `protocols.LocalTraining`; a test computes
the same from the paper's formulas, with nothing of this project.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from consilium import ranks
from consilium.data import Batch
from consilium.protocols import (
    Factor,
    Fitted,
    Learned,
    Objective,
    Personal,
    ServerState,
    Spec,
    Specs,
    Strategy,
    Tag,
    Update,
)
from consilium.tensors import Tensors

WIDE, IN, OUT, RANK, SCALE, RATE = 5, 6, 3, 2, 1.5, 0.05
LAYER = "layer"
SITES = ("a", "b", "c")
SIZES = dict(zip(SITES, (7, 11, 5), strict=True))


def specs(strategy: Strategy, rank: int = RANK) -> Specs:
    """One layer with the parts that the strategy declares, and a head."""
    found: dict[str, Spec] = {}
    for part in strategy.declares.parts:
        r = part.rank or rank
        for letter, shape, side in (("a", (r, IN), "right"), ("b", (WIDE, r), "left")):
            tag = Tag(LAYER, f"lora_{letter}", part.name, 0)
            factor: Any = Factor((f"{LAYER}.weight",), side)
            found[f"{LAYER}.lora.{part.name}.{letter}"] = Spec(shape, tag, torch.float64, SCALE, factor)
    found["head.weight"] = Spec((OUT, WIDE), Tag("head", "head"), torch.float64)
    return dict(sorted(found.items()))


def draw(seed: int, *shape: int) -> Tensor:
    """Normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def initial(known: Specs, seed: int) -> dict[str, Tensor]:
    """Every tensor drawn by its place in the list, B and all else small but not zero."""
    return {n: 0.4 * draw(seed * 100 + at, *map(int, spec.shape)) for at, (n, spec) in enumerate(known.items())}


def frozen() -> Tensor:
    """W_0."""
    return draw(999, WIDE, IN)


def data(site: str) -> tuple[Tensor, Tensor]:
    """Inputs [n, IN] and targets [n, OUT] of a site: each site's targets come from another map."""
    at = SITES.index(site)
    x = draw(10 + at, SIZES[site], IN)
    return x, x @ draw(20 + at, OUT, IN).T + draw(30 + at, OUT)


def outputs(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The model; a part whose factors are missing adds nothing."""
    return _features(values, x) @ values["head.weight"].T


def _features(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight = values.get(f"{LAYER}.weight", frozen())
    for name in values:
        if name.startswith(LAYER) and name.endswith(".a"):
            weight = weight + SCALE * values[f"{name.removesuffix('a')}b"] @ values[name]
    return x @ weight.T


def mean_squares(values: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The loss."""
    return (outputs(values, x) - y).square().mean()


@dataclass(frozen=True)
class Toy:
    """`LocalTraining` of `steps` steps of gradient descent at rate `RATE`."""

    strategy: Strategy
    specs: Specs
    site: str
    round: int = 1
    steps: int = 3
    seen: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def num_examples(self) -> int:
        return SIZES[self.site]

    @property
    def class_counts(self) -> Sequence[int]:
        return [self.num_examples]

    def active(self, tag: Tag) -> bool:
        return self.strategy.declares.trains(tag, self.round)

    def loss(self, variables: Tensors, batch: Batch) -> Tensor:
        for seen in self.seen:
            seen |= {LAYER: batch.images, "": _features(variables, batch.images)}
        return mean_squares(variables, batch.images, batch.labels)

    @contextmanager
    def watch(self, modules: Collection[str]) -> Iterator[Tensors]:
        assert set(modules) <= {LAYER}
        self.seen.append({})
        yield self.seen[-1]
        self.seen.pop()

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        return data(self.site)

    def features(self, variables: Tensors) -> tuple[Tensor, Tensor]:
        return _features(variables, data(self.site)[0]), data(self.site)[1]

    def second_moments(self, variables: Tensors, modules: Collection[str]) -> Tensors:  # noqa: ARG002
        x = data(self.site)[0]
        return {name: x.T @ x / len(x) for name in modules}

    def fit(
        self,
        variables: Tensors,
        *,
        objective: Objective | None = None,
        only: Any = None,
        fixed: Tensors | None = None,
        epochs: float | None = None,
        learning_rate: float | None = None,
        after_step: Any = None,
        purpose: str = "train",
    ) -> Fitted:
        """`epochs` counts steps; the objective draws from a generator of its purpose."""
        choose = only or self.active
        live = {n: v.clone() for n, v in {**(fixed or {}), **variables}.items()}
        origin = {n: self.specs.get(n.rpartition("/")[2]) for n in variables}
        names = [n for n in sorted(variables) if (spec := origin[n]) is None or choose(spec.tag)]
        x, y = self.data()
        batch, steps = Batch(lambda: x, y, torch.arange(len(x))), int(epochs) if epochs is not None else self.steps
        losses, rate = [], learning_rate or RATE
        generator = torch.Generator().manual_seed(len(purpose))
        for _ in range(steps):
            for name in names:
                live[name].requires_grad_()
            loss = objective(live, batch, generator) if objective else self.loss(live, batch)
            slopes = torch.autograd.grad(loss, [live[name] for name in names], allow_unused=True)
            pairs = zip(names, slopes, strict=True)
            moved = {n: (live[n] - rate * s if s is not None else live[n]).detach() for n, s in pairs}
            live |= {**moved, **(after_step(moved) if after_step else {})}
            losses.append(float(loss.detach()))
        way = dict.fromkeys(names, rate * steps)
        found = {n: live[n].detach() for n in variables}
        return Fitted(found, sum(losses) / max(len(losses), 1), steps, steps * len(x), way)


@dataclass
class Outcome:
    """After some rounds."""

    server: ServerState
    personal: dict[str, Personal]
    received: dict[str, Tensors]
    learned: list[dict[str, Learned]]

    def model(self, strategy: Strategy, site: str, which: str = "personal") -> Tensors:
        """What a site would use now."""
        known = {**self.received[site], **ranks.sent(strategy, self.server, specs(strategy), site)}
        return strategy.deploy(known, self.personal[site])[which]


def federate(
    strategy: Strategy,
    rounds: int,
    steps: int = 3,
    drawn: Mapping[int, Sequence[str]] | None = None,
    rank: int = RANK,
    b_at_zero: bool = False,
) -> Outcome:
    """Rounds of all sites, or of those `drawn`; personal tensors of a site start from its own seed. `b_at_zero`: the
    shared B starts at zero, as in LoRA."""
    known = specs(strategy, rank)
    start = {n: v * (0 if b_at_zero and n.endswith(".b") else 1) for n, v in initial(known, 1).items()}
    start |= {f"{LAYER}.weight": frozen()} if strategy.declares.changes_base else {}
    own = {site: initial(known, 2 + at) for at, site in enumerate(SITES)}

    def make(site: str, number: int) -> Toy:
        return Toy(strategy, known, site, number, steps)

    return play(strategy, rounds, known, start, own, make, drawn)


def play(
    strategy: Strategy,
    rounds: int,
    known: Specs,
    start: Tensors,
    own: Mapping[str, Tensors],
    make: Callable[[str, int], Toy],
    drawn: Mapping[int, Sequence[str]] | None = None,
) -> Outcome:
    """The round loop over `SITES`, each with its own start of what is personal and the training that `make` gives."""
    server = strategy.init_server(start, known, SITES)
    personal = {site: strategy.init_site(own[site], known, site) for site in SITES}
    received: dict[str, Tensors] = {site: {} for site in SITES}
    learned: list[dict[str, Learned]] = []
    for number in range(1, rounds + 1):
        there = sorted((drawn or {}).get(number, SITES))
        found: dict[str, Learned] = {}
        for site in there:
            received[site] = {**received[site], **ranks.sent(strategy, server, known, site)}
            found[site] = strategy.learn(received[site], personal[site], make(site, number))
            personal[site] = found[site].personal
            assert found[site].update.keys() <= strategy.up(known, number).keys()
        updates = [Update(site, each.update, SIZES[site]) for site, each in found.items()]
        server = replace(strategy.combine(server, updates, known), round=number)
        assert server.shared.keys() <= strategy.down(known, number).keys()
        learned.append(found)
    return Outcome(server, personal, received, learned)
