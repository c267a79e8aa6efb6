"""Stage 8, strategies: MOON, FedAvg whose features stay near the shared model's and away from the site's last ones.

In: updates of sites. Out: the next shared tensors.

Li, He, Song, CVPR 2021, arXiv 2103.16257, equations 3 and 4:
l = l_sup + mu l_con,  l_con = -log( exp(sim(z, z_glob) / T) / (exp(sim(z, z_glob) / T) + exp(sim(z, z_prev) / T)) ).
z, z_glob, z_prev -> pooled features of the model in training, of the one received, of the site's own after the last
round it took part in    sim -> cosine    mu -> mu    T (their tau) -> temperature
Leaves the site: as FedAvg. Stays: images, personal tensors, the site's last model (no secret: it was sent).
Kept between rounds: that model at the site.
Departures: features are the backbone's, without the paper's projection head on top; any optimiser. A site that was
never in a round has no last model and trains as FedAvg, as the term then has no gradient. Each batch takes two more
forward passes without a gradient.
Identity: mu = 0 is FedAvg, and so is a first round, bit by bit; the term is its own formula in NumPy
(tests/unit/test_strategy_moon.py).
Family: optimisation
Identity test: test_without_the_term_and_in_a_first_round_it_is_fedavg
Slow reference: test_it_trains_on_the_papers_objective
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from consilium.data import Batch
from consilium.protocols import (
    Fitted,
    Learned,
    LocalTraining,
    Objective,
    Personal,
)
from consilium.registry import register
from consilium.strategies.fedavg import FedAvg, FedAvgOptions, Fit
from consilium.strategies.scaffold import under, within, without
from consilium.tensors import Tensors

SHARED, LAST = "shared/", "last/"


class MoonOptions(FedAvgOptions):
    """Keys of `[strategy]` for moon."""

    mu: float = Field(default=1.0, ge=0)  # of the contrastive term. Ours, to be tuned
    temperature: float = Field(default=0.5, gt=0)  # the lower, the sharper. Ours, to be tuned


@dataclass(frozen=True)
class Moon(FedAvg):
    """FedAvg with the term, once a site has a last model."""

    mu: float = field(kw_only=True)
    temperature: float = field(kw_only=True)

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """FedAvg's round with the term, and the model that it ends with is kept."""
        own, last = without(LAST, personal.tensors), within(LAST, personal.tensors)
        models = {**under(SHARED, {**received, **own}), **under(LAST, {**own, **last})}
        how = replace(self, fit=self._contrasting(models)) if last else self
        learned = FedAvg.learn(how, received, Personal(own), training)
        now = {**received, **learned.update} if self.mu > 0 else {}
        return replace(learned, personal=Personal({**learned.personal.tensors, **under(LAST, now)}))

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """FedAvg's: the last model is no part of the next."""
        return super().deploy(received, Personal(without(LAST, personal.tensors)))

    def _contrasting(self, models: Tensors) -> Fit:
        def fit(training: LocalTraining, variables: Tensors, _: Objective | None, fixed: Tensors) -> Fitted:
            def objective(live: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
                loss, z = _passed(training, without(SHARED, without(LAST, live)), batch)
                with torch.no_grad():
                    shared, last = (_passed(training, within(prefix, live), batch)[1] for prefix in (SHARED, LAST))
                return loss + self.mu * contrast(z, shared, last, self.temperature)

            return training.fit(variables, objective=objective, fixed={**fixed, **models})

        return fit


def _passed(training: LocalTraining, model: Tensors, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of a model, and its pooled features on the way."""
    with training.watch(()) as seen:
        loss = training.loss(model, batch)
        return loss, seen[""]


def contrast(z: Tensor, shared: Tensor, last: Tensor, temperature: float) -> Tensor:
    """Mean of l_con over a batch; features [B, num_features] of three models."""
    near, far = (F.cosine_similarity(z.float(), other.float()) / temperature for other in (shared, last))
    return F.softplus(far - near).mean()  # -log(e^near / (e^near + e^far))


@register(
    "strategies",
    "moon",
    options=MoonOptions,
    summary="FedAvg whose features stay near the shared model's and away from the site's last ones",
    source="MOON: Li et al., CVPR 2021, arXiv 2103.16257",
    facts={"leaves the site": "all trained tensors", "stays": "the model that it sent last"},
)
def moon(options: MoonOptions) -> Moon:
    """MOON, weighted by examples or uniformly."""
    summed = options.aggregation()
    return Moon(options.weights, aggregate=summed, mu=options.mu, temperature=options.temperature)
