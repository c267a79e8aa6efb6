"""Stage 8, strategies: every site uses a mixture of the shared model and one of its own, and may learn how to mix.

In: updates of sites. Out: the next shared tensors.

APFL: Deng, Kamani, Mahdavi, arXiv 2003.13461, algorithm 1, in every local step, all from the values before it:
    w <- w - eta grad f(w)    v <- v - eta grad_v f(u)    alpha <- alpha - eta <grad f(u), v - w>    u = alpha v + (1 -
    alpha) w
    w -> shared tensors    v -> personal tensors own/<name>    alpha -> personal tensor "alpha", between 0 and 1
Leaves the site: the shared tensors, trained as in FedAvg, number of training images. Stays, and is kept: v, alpha.
Departures: any optimiser, and a gradient's norm is clipped over w, v and alpha together (train.clip_norm); alpha moves
in every step; v starts as the first w that a site receives. Not this: stepping v on its own loss and mixing once a
round, as a widely used library does. Two forward passes per image.
Identity: alpha = 0, not learnt, is the shared model; alpha = 1 is local training from the common start; without
clipping the shared tensors are FedAvg's (tests/unit/test_strategy_own_models.py).
Family: personal models
Identity test: test_apfl_at_its_ends_is_fedavg_and_local_training
Slow reference: test_apfls_rounds_are_the_papers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from consilium.data import Batch
from consilium.protocols import Learned, LocalTraining, Personal, Specs
from consilium.registry import register
from consilium.strategies.ditto import OWN, own_and_shared
from consilium.strategies.fedavg import Averaging, FedAvgOptions
from consilium.tensors import Tensors, map_tensors, under, within

ALPHA = "/alpha"  # the slash tells it from the model's variables


class ApflOptions(FedAvgOptions):
    """Keys of `[strategy]` for apfl."""

    alpha: float = Field(default=0.5, ge=0, le=1)  # share of the site's own model, at the start; ours
    learn_alpha: bool = True  # at the rate of what is no tensor of the model, or train.learning_rate


@dataclass(frozen=True)
class Apfl(Averaging):
    """One fit of both models and of the share."""

    alpha: float = 0.5
    learn_alpha: bool = True

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """What does not travel, and the share."""
        start = super().init_site(initial, specs, site).tensors
        return Personal({**start, ALPHA: torch.tensor(self.alpha, dtype=torch.float64)})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Both models take their steps together, each on its own loss."""
        shared = {name: value for name, value in received.items() if name in training.specs}
        base = {name: value for name, value in received.items() if name not in shared}
        rest = {name: value for name, value in personal.tensors.items() if name in training.specs}
        own = within(OWN, personal.tensors) or {**shared, **rest}
        whole, alpha = {**shared, **rest}, {ALPHA: personal.tensors[ALPHA]}

        def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
            model = {name: value for name, value in variables.items() if name in whole or name in base}
            still = {name: variables[name].detach() for name in whole}
            mixed = mixture(within(OWN, variables), still, variables[ALPHA])
            return training.loss(model, batch) + training.loss({**model, **mixed}, batch)

        def between(trained: Tensors) -> Tensors:
            return {n: value.clamp(0, 1) for n, value in trained.items() if n == ALPHA}

        learnt, still = (alpha, {}) if self.learn_alpha else ({}, alpha)
        start = {**whole, **under(OWN, own), **learnt}
        fitted = training.fit(start, objective=objective, fixed={**base, **still}, after_step=between)
        found = {**fitted.variables, **still}
        update = {name: found[name] for name in shared if training.active(training.specs[name].tag)}
        kept = Personal({name: value for name, value in found.items() if name not in shared})
        return Learned(update, kept, fitted.loss, fitted.num_steps, fitted.image_passes)

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """alpha v + (1 - alpha) w with the newest w; before a site's first round, w."""
        own, tensors = within(OWN, personal.tensors), {**received, **personal.tensors}
        mixed = mixture(own, {name: tensors[name] for name in own}, tensors[ALPHA]) if own else {}
        return own_and_shared(received, personal, mixed)


def mixture(own: Tensors, shared: Tensors, alpha: Tensor) -> dict[str, Tensor]:
    """alpha v + (1 - alpha) w; exactly w at 0, v at 1, and both where they are equal."""
    return map_tensors(lambda v, w: torch.lerp(w, v, alpha.to(v.dtype)), own, shared)


@register(
    "strategies",
    "apfl",
    options=ApflOptions,
    summary="every site mixes the shared model with one of its own, and learns the share",
    source="APFL: Deng et al., arXiv 2003.13461",
    facts={"leaves the site": "all trained tensors", "stays": "a whole model of the site's own, and its share"},
)
def apfl(options: ApflOptions) -> Apfl:
    """FedAvg for the shared model."""
    return Apfl(options.weights, aggregate=options.aggregation(), alpha=options.alpha, learn_alpha=options.learn_alpha)
