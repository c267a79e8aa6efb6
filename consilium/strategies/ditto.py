"""Stage 8, strategies: FedAvg, and beside it a model of each site's own that is pulled towards what the server sent.

In: updates of sites. Out: the next shared tensors.

Ditto: Li, Hu, Beirami, Smith, ICML 2021, arXiv 2012.04221, algorithm 1: v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k
- w)) beside FedAvg's own steps on w.
    w -> shared tensors    v_k -> personal tensors own/<name>    lambda -> strength
Leaves the site: the shared tensors, trained as in FedAvg, number of training images. Stays, and is kept: v_k.
Departures: any optimiser; v_k starts as the first w that a site receives; it is as long in training as w, so a round
goes through the images twice. A personal head is there twice too, one trained with v_k and one with w. Both models see
the same draws.
Identity: for every strength the shared tensors are FedAvg's, bit by bit; strength = 0 is local training from the common
start; a great one holds v_k at w.
Family: personal models
Identity test: test_dittos_shared_model_is_fedavgs_for_every_pull
Slow reference: test_dittos_rounds_are_the_papers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from consilium.data import Batch
from consilium.protocols import Declaration, Learned, LocalTraining, Personal
from consilium.registry import register
from consilium.strategies.fedavg import Averaging, FedAvgOptions
from consilium.tensors import Tensors, fetched, squared_distance, under, within

OWN = "own"  # in front of a tensor of the site's own model


class DittoOptions(FedAvgOptions):
    """Keys of `[strategy]` for ditto."""

    strength: float = Field(default=0.1, ge=0)  # lambda, of the pull lambda/2 ||v - w||^2; ours


@dataclass(frozen=True)
class Ditto(Averaging):
    """Two fits in a round, on the same draws."""

    strength: float = 0.1

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """First the site's own model, then the shared one as in FedAvg."""
        shared = {name: value for name, value in received.items() if name in training.specs}
        base = {name: value for name, value in received.items() if name not in shared}
        rest = {name: value for name, value in personal.tensors.items() if name in training.specs}
        active = {name: value for name, value in shared.items() if training.active(training.specs[name].tag)}
        anchor = fetched(active)

        def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
            own = within(OWN, variables)
            loss = training.loss({**{name: variables[name] for name in base}, **own}, batch)
            return loss + self.strength / 2 * squared_distance(own, anchor(batch.labels.device))

        start = under(OWN, within(OWN, personal.tensors) or {**shared, **rest})
        own = training.fit(start, objective=objective, fixed=base)
        fitted = training.fit({**shared, **rest}, fixed=base)
        update = {name: fitted.variables[name] for name in active}
        kept = Personal({**own.variables, **{name: fitted.variables[name] for name in rest}})
        steps, passes = own.num_steps + fitted.num_steps, own.image_passes + fitted.image_passes
        return Learned(update, kept, own.loss, steps, passes)

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """The site's own model; the shared one where nothing is missing in it."""
        return own_and_shared(received, personal, within(OWN, personal.tensors))


def own_and_shared(received: Tensors, personal: Personal, own: Tensors) -> Mapping[str, Tensors]:
    """Models of a site that has a whole one of its own, or (before its first round) what was received."""
    rest = {name: value for name, value in personal.tensors.items() if "/" not in name}
    models = {"personal": {**received, **rest, **own}}
    return models if rest else {**models, "global": dict(received)}


@register(
    "strategies",
    "ditto",
    options=DittoOptions,
    summary="FedAvg, beside which every site trains a model of its own that is pulled towards the shared one",
    source="Ditto: Li et al., ICML 2021, arXiv 2012.04221",
    facts={"leaves the site": "all trained tensors", "stays": "a whole model of the site's own"},
)
def ditto(options: DittoOptions) -> Ditto:
    """FedAvg for the shared model."""
    declares = Declaration(passes=lambda round: (None, None))  # noqa: ARG005
    return Ditto(options.weights, declares=declares, aggregate=options.aggregation(), strength=options.strength)
