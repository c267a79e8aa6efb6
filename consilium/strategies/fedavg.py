"""Stage 8, strategies: FedAvg and every method that is FedAvg with another choice of what is shared.

In: updates of sites. Out: the next shared tensors.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas, AISTATS 2017, arXiv 1602.05629, algorithm 1.
w_t -> server.shared, w_k -> update.tensors, n_k -> num_examples, C -> train.participation, E -> train.local_epochs
Leaves the site: the shared tensors, number of training images. Stays: images, personal tensors. Kept between rounds:
personal tensors at the site, nothing at the server.
Departures: any optimiser (the paper: SGD); a tensor is averaged over the sites that trained it.
Identity: one site = local training; equal updates = that update; order of replies is irrelevant (tests/identities).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from consilium.protocols import (
    Declaration,
    Learned,
    LocalTraining,
    Objective,
    Personal,
    Selector,
    ServerState,
    Specs,
    Tag,
    Update,
)
from consilium.registry import Options, register
from consilium.tensors import Tensors, weighted_mean

Weighting = Literal["examples", "uniform"]
ObjectiveFor = Callable[[Tensors, LocalTraining], Objective | None]  # what arrived -> what is minimised


def everything(tag: Tag) -> bool:  # noqa: ARG001
    """Share every tensor that may travel."""
    return True


def task_loss(received: Tensors, training: LocalTraining) -> Objective | None:  # noqa: ARG001
    """Minimise the task's loss alone."""
    return None


class FedAvgOptions(Options):
    """Keys of `[strategy]` for fedavg."""

    weights: Weighting = "examples"


@dataclass(frozen=True)
class FedAvg:
    """`shares` says what travels, `objective_for` what a site minimises; the rest is the mean."""

    weights: Weighting = "examples"
    shares: Selector = everything
    objective_for: ObjectiveFor = task_loss
    declares: Declaration = field(default_factory=Declaration)

    def up(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        """The shared tensors, in every round."""
        kept = self.declares.personal_parts
        return {name: spec for name, spec in specs.items() if spec.tag.part not in kept and self.shares(spec.tag)}

    def down(self, specs: Specs, round: int) -> Specs:
        """The same tensors come back."""
        return self.up(specs, round)

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """The common start of the shared tensors."""
        return ServerState(0, tuple(sites), {name: initial[name] for name in self.up(specs, 0)})

    def send(self, server: ServerState, site: str) -> Tensors:  # noqa: ARG002
        """Every site gets the same."""
        return server.shared

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:  # noqa: ARG002
        """Everything that does not travel starts, and stays, at the site."""
        shared = self.up(specs, 0)
        return Personal({name: initial[name] for name in specs if name not in shared})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train shared and personal tensors together; send the shared ones that were trained."""
        fitted = training.fit({**received, **personal.tensors}, objective=self.objective_for(received, training))
        shared = {name: spec for name, spec in training.specs.items() if name in received}
        update = {name: fitted.variables[name] for name, spec in shared.items() if training.active(spec.tag)}
        kept = Personal({name: fitted.variables[name] for name in personal.tensors})
        return Learned(update, kept, fitted.loss, fitted.num_steps, fitted.image_passes)

    def combine(self, server: ServerState, updates: Sequence[Update], specs: Specs) -> ServerState:  # noqa: ARG002
        """w <- sum n_k w_k / sum n_k, tensor by tensor over the sites that trained it."""
        terms = [(update.num_examples if self.weights == "examples" else 1, update.tensors) for update in updates]
        return replace(server, shared={**server.shared, **weighted_mean(terms)})

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """What was received and what is personal; the shared tensors alone are a model where nothing is personal."""
        models = {"personal": {**received, **personal.tensors}}
        return models if personal.tensors else {**models, "global": dict(received)}


@register(
    "strategies",
    "fedavg",
    options=FedAvgOptions,
    summary="all trained tensors are averaged in every round",
    source="McMahan et al., AISTATS 2017, arXiv 1602.05629",
    facts={"leaves the site": "all trained tensors", "stays": "nothing but the data"},
)
def fedavg(options: FedAvgOptions) -> FedAvg:
    """FedAvg, weighted by examples or uniformly."""
    return FedAvg(options.weights)
