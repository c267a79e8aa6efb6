"""Stage 8, strategies: the shared model moves towards the sites' own models, which stay near it: Moreau envelopes.

In: updates of sites. Out: the next shared tensors.

pFedMe: Dinh, Tran, Nguyen, NeurIPS 2020, arXiv 2006.08848, algorithm 1: in each of the local rounds of a round
    theta <- about argmin f(theta) + lambda/2 ||theta - w||^2, by K steps    w <- w - eta lambda (w - theta)
and at the server w <- (1 - beta) w + beta mean of the sites' w.
    w -> shared tensors    theta -> personal tensors own/<name>    lambda -> strength    K -> inner_steps    eta ->
    outer_rate
Leaves the site: w as the site moved it, number of training images. Stays, and is kept: theta, from which the next
begins.
Departures: any optimiser for theta; each of the K steps takes the next batch where the paper takes one batch K times;
w also moves after a last, shorter loop of a round; w's mean is weighted as FedAvg's (the paper: uniform).
Identity: outer_rate = 0 leaves the shared tensors; with theta at its minimum w takes a gradient step on the envelope,
which for a great strength is FedAvg's (tests/unit/test_strategy_own_models.py).
Family: personal models
Identity test: test_pfedme_with_a_great_pull_is_fedavg_like
Slow reference: test_pfedmes_rounds_are_the_papers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from consilium.data import Batch
from consilium.protocols import Learned, LocalTraining, Personal, ServerState
from consilium.registry import register
from consilium.strategies.ditto import OWN, own_and_shared
from consilium.strategies.fedavg import Averaging, FedAvgOptions, ServerRule
from consilium.tensors import Tensors, map_tensors, squared_distance, under, within


class PFedMeOptions(FedAvgOptions):
    """Keys of `[strategy]` for pfedme."""

    strength: float = Field(default=1.0, gt=0)  # lambda, of the pull lambda/2 ||theta - w||^2; ours
    inner_steps: int = Field(default=5, ge=1)  # K: steps of theta for one of w
    outer_rate: float = Field(default=0.1, ge=0)  # eta; w goes eta * lambda of the way to theta
    beta: float = Field(default=1.0, gt=0)  # of the server: how far w goes to the sites' mean


@dataclass(frozen=True)
class PFedMe(Averaging):
    """One fit of theta, in which w follows."""

    strength: float = 1.0
    inner_steps: int = 5
    outer_rate: float = 0.1

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """theta takes the steps; w, without a gradient of its own, is put where it may be after every K of them."""
        shared = {name: value for name, value in received.items() if name in training.specs}
        base = {name: value for name, value in received.items() if name not in shared}
        rest = {name: value for name, value in personal.tensors.items() if name in training.specs}
        moving = {name: value for name, value in shared.items() if training.active(training.specs[name].tag)}

        def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
            own = within(OWN, variables)
            loss = training.loss({**{name: variables[name] for name in base}, **own}, batch)
            anchor = {name: variables[name].detach() for name in moving}
            return loss + self.strength / 2 * squared_distance(own, anchor)

        start = under(OWN, within(OWN, personal.tensors) or {**shared, **rest})
        fitted = training.fit({**start, **moving}, objective=objective, fixed=base, after_step=self._follow())
        last = self._moved(fitted.variables) if fitted.num_steps % self.inner_steps else {}
        update = {name: {**fitted.variables, **last}[name] for name in moving}
        kept = Personal({**{name: fitted.variables[name] for name in start}, **rest})
        return Learned(update, kept, fitted.loss, fitted.num_steps, fitted.image_passes)

    def _follow(self) -> Callable[[Tensors], Tensors]:
        steps = iter(range(1, 2**62))

        def put(trained: Tensors) -> Tensors:
            return {} if next(steps) % self.inner_steps else self._moved(trained)

        return put

    def _moved(self, trained: Tensors) -> dict[str, Tensor]:
        """w - eta lambda (w - theta)."""
        own, share = within(OWN, trained), self.outer_rate * self.strength
        w = {name: value for name, value in trained.items() if "/" not in name}
        return map_tensors(lambda old, theta: old - share * (old - theta), w, {name: own[name] for name in w})

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """theta; the shared model where nothing is missing in it."""
        return own_and_shared(received, personal, within(OWN, personal.tensors))


def moved_by(beta: float) -> ServerRule:
    """w <- (1 - beta) w + beta mean; what is new is taken as it is."""

    def rule(before: ServerState, after: ServerState) -> ServerState:
        def moved(name: str, mean: Tensor) -> Tensor:
            old = before.shared.get(name, mean).double()  # a base that changed for the first time is new
            return mean if beta == 1 else (old + beta * (mean.double() - old)).to(mean.dtype)

        return replace(after, shared={name: moved(name, mean) for name, mean in after.shared.items()})

    return rule


@register(
    "strategies",
    "pfedme",
    options=PFedMeOptions,
    summary="every site has a model of its own near the shared one, which moves towards it",
    source="pFedMe: Dinh et al., NeurIPS 2020, arXiv 2006.08848",
    facts={"leaves the site": "all trained tensors", "stays": "a whole model of the site's own"},
)
def pfedme(options: PFedMeOptions) -> PFedMe:
    """FedAvg of the moved shared models."""
    return PFedMe(
        options.weights,
        aggregate=options.aggregation(),
        server=moved_by(options.beta),
        strength=options.strength,
        inner_steps=options.inner_steps,
        outer_rate=options.outer_rate,
    )
