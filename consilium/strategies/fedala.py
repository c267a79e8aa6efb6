"""Stage 8, strategies: FedAvg, but a site starts from its own model and takes over as much of the shared one as helps
it.

In: updates of sites. Out: the next shared tensors.

FedALA: Zhang, Hua, Wang, Song, Xue, Ma, Guan, AAAI 2023, arXiv 2212.01197: adaptive local aggregation
    start = w_own + (w_shared - w_own) omega, element by element, omega in [0, 1] learnt on a share of the site's images
    w_shared -> received    w_own -> personal tensors own/<name>    omega -> personal tensors omega/<name>
on the layers from `mix_from_block` on; what lies below is taken over whole.
Leaves the site: the shared tensors, trained from that start, number of training images. Stays, and is kept: the model
that the site sent last, omega.
Departures: omega is trained for `mixing_epochs` in every round, where the paper trains it until it settles when it is
first used and for one pass later; its optimiser is the run's, at a rate of its own. In a site's first round w_own is
w_shared, and omega stays at one.
Identity: while omega is one it is FedAvg, bit by bit; omega never leaves [0, 1] nor the site.
Family: personal models
Identity test: test_fedala_with_omega_at_one_is_fedavg
Slow reference: test_fedalas_rounds_are_the_papers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from consilium.data import Batch
from consilium.protocols import Declaration, Learned, LocalTraining, Personal, Selector, Specs
from consilium.registry import register
from consilium.strategies.ditto import OWN, own_and_shared
from consilium.strategies.fedavg import Averaging, FedAvgOptions, everything
from consilium.strategies.partial import below
from consilium.tensors import Tensors, map_tensors, under, within

OMEGA = "omega"


class FedAlaOptions(FedAvgOptions):
    """Keys of `[strategy]` for fedala."""

    mix_from_block: int | None = Field(
        default=0, ge=0
    )  # omega acts from this block on and on the head; None: head alone
    mixing_epochs: float = Field(default=0.8, gt=0)  # passes for omega in each round: a share of the images below 1
    mixing_rate: float = Field(default=0.1, gt=0)  # learning rate of omega; ours, for adamw


@dataclass(frozen=True)
class FedAla(Averaging):
    """Two fits: how to mix, then FedAvg's from the mixture."""

    lower: Selector = everything
    mixing_epochs: float = 0.8
    mixing_rate: float = 0.1

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """What does not travel, and omega: all ones, the shared model."""
        mixed = {name: initial[name] for name, spec in self.shared(specs).items() if not self.lower(spec.tag)}
        start = super().init_site(initial, specs, site).tensors
        return Personal({**start, **under(OMEGA, map_tensors(torch.ones_like, mixed))})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Learn omega with both models still, then train from the mixture."""
        shared = {name: value for name, value in received.items() if name in training.specs}
        base = {name: value for name, value in received.items() if name not in shared}
        rest = {name: value for name, value in personal.tensors.items() if name in training.specs}
        still = {**under(OWN, within(OWN, personal.tensors) or shared), **shared, **rest, **base}

        def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
            plain = {name: value for name, value in variables.items() if "/" not in name}
            return training.loss({**plain, **mixture(variables)}, batch)

        start = {name: value for name, value in personal.tensors.items() if name.startswith(f"{OMEGA}/")}
        omega = training.fit(
            start,
            objective=objective,
            fixed=still,
            epochs=self.mixing_epochs,
            learning_rate=self.mixing_rate,
            after_step=lambda trained: map_tensors(lambda value: value.clamp(0, 1), trained),
            purpose="mixing",
        )
        mixed = mixture({**still, **omega.variables})
        fitted = training.fit({**shared, **rest, **mixed}, fixed=base)
        update = {name: fitted.variables[name] for name in shared if training.active(training.specs[name].tag)}
        own = under(OWN, {name: fitted.variables[name] for name in shared})
        kept = Personal({**own, **omega.variables, **{name: fitted.variables[name] for name in rest}})
        steps, passes = omega.num_steps + fitted.num_steps, omega.image_passes + fitted.image_passes
        return Learned(update, kept, fitted.loss, steps, passes)

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """The site's own model as it trained it last, and the shared one."""
        return own_and_shared(received, personal, within(OWN, personal.tensors))


def mixture(tensors: Tensors) -> dict[str, Tensor]:
    """w_own + (w_shared - w_own) omega of the tensors that have an omega; exactly w_shared where it is one."""
    omegas, own = within(OMEGA, tensors), within(OWN, tensors)

    def mixed(omega: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return new + (old - new) * (1 - omega)

    return map_tensors(mixed, omegas, {n: own[n] for n in omegas}, {n: tensors[n] for n in omegas})


@register(
    "strategies",
    "fedala",
    options=FedAlaOptions,
    summary="FedAvg, but every site learns how much of the shared model to take over, element by element",
    source="FedALA: Zhang et al., AAAI 2023, arXiv 2212.01197",
    facts={"leaves the site": "all trained tensors", "stays": "the site's own model and its mixing weights"},
)
def fedala(options: FedAlaOptions) -> FedAla:
    """FedAvg at the server."""
    epochs = options.mixing_epochs
    declares = Declaration(passes=lambda round: (epochs, None), last_block=options.mix_from_block)  # noqa: ARG005
    return FedAla(
        options.weights,
        declares=declares,
        aggregate=options.aggregation(),
        lower=below(options.mix_from_block),
        mixing_epochs=epochs,
        mixing_rate=options.mixing_rate,
    )
