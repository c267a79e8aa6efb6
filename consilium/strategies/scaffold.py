"""Stage 8, strategies: SCAFFOLD, FedAvg whose sites correct their steps by how their gradients differ from all others'.

In: updates of sites. Out: the next shared tensors.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, ICML 2020, arXiv 1910.06378, algorithm 1:
y <- y - lr (g(y) - c_i + c);  c_i+ = g_i(x) (option I) or c_i - c + (x - y) / (K lr) (option II);
x <- mean of y;  c <- c + |S| / N mean of (c_i+ - c_i).
x -> received    y -> variables    c -> "control/<name>", received    c_i -> "control/<name>", kept at the site
c_i+ - c_i -> "control/<name>", sent    K lr -> step_lengths    S, N -> sites that sent something, all sites
Leaves the site: the shared tensors that were trained, and as many numbers again: how the site's control changed.
Stays: images, personal tensors. Kept between rounds: c_i at the site (no secret: the coordinator can add it up from
what it got), n_k c_k summed and n_k at the server.
Departures: models and controls are weighted alike, by images unless weights = "uniform" (the paper); the global step
is 1; c is a mean over all sites, of which those that never sent anything have c_i = 0 and, until then, as many images
as the others have on average (one without images shortens c for ever, and moves no fixed point); K lr is the sum of
all step lengths, so that x - y gives the mean gradient, weighted by them, under a schedule too. With any other
optimiser than plain SGD x - y is no gradient: refused, or control = "gradient" (option I), one more pass at x.
Identity: round 1 is FedAvg's, bit by bit; one full step of everybody is FedAvg's in every round; where all c_i are the
gradients at an optimum it is not left (tests/unit/test_strategy_scaffold.py).
Family: optimisation
Identity test: test_the_optimum_is_a_fixed_point_and_fedavg_leaves_it
Slow reference: test_strategy_scaffold::test_it_is_the_papers_algorithm
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from consilium.aggregation import Weighting
from consilium.data import Batch
from consilium.protocols import (
    Declaration,
    Learned,
    LocalTraining,
    Objective,
    Personal,
    ServerState,
    Specs,
    Update,
)
from consilium.registry import Options, register
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import Tensors, map_tensors

Control = Literal["way", "gradient"]
CONTROL, SUM, IMAGES = "control/", "sum/", "images"


def under(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors with a prefix before their names."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def within(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors that have the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def without(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors that do not have the prefix."""
    return {name: value for name, value in tensors.items() if not name.startswith(prefix)}


class ScaffoldOptions(Options):
    """Keys of `[strategy]` for scaffold."""

    weights: Weighting = "examples"  # of models and controls alike; the paper: uniform
    control: Control = "way"  # how c_i is found: from the way that was gone (plain SGD only), or by a pass at x


@dataclass(frozen=True)
class Scaffold:
    """`plain` says what travels and how models are averaged."""

    plain: FedAvg
    control: Control = "way"

    @property
    def declares(self) -> Declaration:
        """Option II reads gradients off the way; option I goes through the images once more."""
        if self.control == "way":
            return replace(self.plain.declares, plain_sgd=True)
        return replace(self.plain.declares, passes=lambda round: (None, 1.0))  # noqa: ARG005

    def up(self, specs: Specs, round: int) -> Specs:
        """The tensors that are trained, and the change of the control of each."""
        return _with_controls(self.plain.up(specs, round))

    def down(self, specs: Specs, round: int) -> Specs:
        """The shared tensors, and the control of each."""
        return _with_controls(self.plain.down(specs, round))

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """Controls of zero."""
        start = self.plain.init_server(initial, specs, sites)
        sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.shared.items()}
        unknown = torch.full((len(sites),), 1.0 if self.plain.weights == "uniform" else torch.nan, dtype=torch.float64)
        controls = map_tensors(torch.zeros_like, start.shared)
        return replace(
            start, shared={**start.shared, **under(CONTROL, controls)}, memory={**under(SUM, sums), IMAGES: unknown}
        )

    def send(self, server: ServerState, site: str) -> Tensors:
        """Every site gets the same."""
        return self.plain.send(server, site)

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """A control of zero for each shared tensor, beside what is personal."""
        own = self.plain.init_site(initial, specs, site).tensors
        controls = {name: torch.zeros_like(initial[name]) for name in self.plain.shared(specs)}
        return Personal({**own, **under(CONTROL, controls)})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """FedAvg's round on the loss + <c - c_i, y>, whose gradient is g(y) - c_i + c; then the next c_i."""
        x, c, c_i = without(CONTROL, received), within(CONTROL, received), within(CONTROL, personal.tensors)
        own = without(CONTROL, personal.tensors)
        names = [name for name in x if training.active(training.specs[name].tag)]
        drift = {name: c[name] - c_i[name] for name in names}
        fixed = under("drift/", drift)
        fitted = training.fit({**x, **own}, objective=_corrected(training, names), fixed=fixed)
        if self.control == "way":
            lengths, y = fitted.step_lengths, fitted.variables
            changes = {name: (x[name] - y[name]) / lengths[name] - c[name] for name in names if name in lengths}
        else:
            gradient = training.gradient({**x, **own})
            changes = {name: gradient[name] - c_i[name] for name in names if name in gradient}
        passes = fitted.image_passes + (training.num_examples if self.control == "gradient" and changes else 0)
        controls = {name: value + changes[name] if name in changes else value for name, value in c_i.items()}
        update = {**{name: fitted.variables[name] for name in names}, **under(CONTROL, changes)}
        kept = Personal({**{name: fitted.variables[name] for name in own}, **under(CONTROL, controls)})
        return Learned(update, kept, fitted.loss, fitted.num_steps, passes)

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """Models as FedAvg; sum_k n_k c_k <- the same + sum_S n_k (change of c_k); c is that by all sites' n_k."""
        images, sums = server.memory[IMAGES].clone(), within(SUM, server.memory)

        def models() -> Iterator[Update]:
            for update in updates:
                at = server.sites.index(update.site)
                images[at] = 1.0 if self.plain.weights == "uniform" else update.num_examples
                for name, change in within(CONTROL, update.tensors).items():
                    sums[name] = sums[name] + images[at] * change.double()
                yield replace(update, tensors=without(CONTROL, update.tensors))

        old = without(CONTROL, server.shared)
        news = self.plain.combine(replace(server, shared=old, memory={}), models(), specs)
        total = float(images.nanmean()) * len(images)
        controls = {name: (sums[name] / total).to(old[name].dtype) for name in old if total > 0}
        shared = {**server.shared, **news.shared, **under(CONTROL, controls)}
        return replace(server, shared=shared, memory={**under(SUM, sums), IMAGES: images})

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """FedAvg's: controls are no part of a model."""
        return self.plain.deploy(without(CONTROL, received), Personal(without(CONTROL, personal.tensors)))


def _with_controls(specs: Specs) -> Specs:
    controls = {f"{CONTROL}{n}": replace(spec, tag=replace(spec.tag, slot="control")) for n, spec in specs.items()}
    return {**specs, **controls}


def _corrected(training: LocalTraining, names: Sequence[str]) -> Objective:
    """Gradient of the loss + drift; the value is that of the loss, which is what a log is to show."""

    def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        linear = [(variables[f"drift/{name}"] * variables[name]).sum() for name in names]
        loss = training.loss(without("drift/", variables), batch)
        term = torch.stack(linear).sum() if linear else torch.zeros(())
        return loss + (term - term.detach())

    return objective


@register(
    "strategies",
    "scaffold",
    options=ScaffoldOptions,
    summary="FedAvg with control variates that take a site's own drift out of its steps",
    source="SCAFFOLD: Karimireddy et al., ICML 2020, arXiv 1910.06378",
    facts={
        "leaves the site": "all trained tensors, and the change of the control of each",
        "stays": "a control of each shared tensor",
        "exact": "mean of each tensor; controls are weighted alike",
    },
)
def scaffold(options: ScaffoldOptions) -> Scaffold:
    """SCAFFOLD, weighted by examples or uniformly."""
    return Scaffold(FedAvg(options.weights), options.control)
