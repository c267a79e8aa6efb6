"""Stage 8, strategies: FedAvg and every method that is FedAvg with another choice of what is shared or how summed.

In: updates of sites. Out: the next shared tensors.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas, AISTATS 2017, arXiv 1602.05629, algorithm 1.
w_t -> server.shared, w_k -> update.tensors, n_k -> num_examples, C -> train.participation, E -> train.local_epochs
Leaves the site: the shared tensors, number of training images. Stays: images, personal tensors. Kept between rounds:
personal tensors at the site, nothing at the server.
`fit`, `server`: hooks of methods that train in phases or move the server by a step of its own.
Departures: any optimiser (the paper: SGD); a tensor is averaged over the sites that trained it; `aggregate` puts
another sum in the place of the mean, and two of these change frozen weights, which then travel down as if shared.
Identity: one site = local training; equal updates = that update; order of replies is irrelevant (tests/identities).
Family: references
Identity test: test_one_full_batch_step_of_fedavg_is_the_centralised_step
Slow reference: test_fedavgs_rounds_are_the_papers
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from consilium.aggregation import Aggregation, SumOptions, Weighting
from consilium.protocols import (
    Declaration,
    Fitted,
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
from consilium.registry import register
from consilium.tensors import Tensors

ObjectiveFor = Callable[[Tensors, LocalTraining], Objective | None]  # what arrived -> what is minimised
Fit = Callable[[LocalTraining, Tensors, Objective | None, Tensors], Fitted]  # ..., variables, what is minimised, fixed
ServerRule = Callable[[ServerState, ServerState], ServerState]  # before and after the sum -> next


def everything(tag: Tag) -> bool:  # noqa: ARG001
    """Share every tensor that may travel."""
    return True


def task_loss(received: Tensors, training: LocalTraining) -> Objective | None:  # noqa: ARG001
    """Minimise the task's loss alone."""
    return None


def jointly(training: LocalTraining, variables: Tensors, objective: Objective | None, fixed: Tensors) -> Fitted:
    """Train everything at once."""
    return training.fit(variables, objective=objective, fixed=fixed)


class FedAvgOptions(SumOptions):
    """Keys of `[strategy]` for fedavg and what builds on it: weights, aggregate, trim."""


@dataclass(frozen=True)
class Averaging:
    """All but what a site does: `shares` says what travels, `aggregate` how updates become one, `server` the rest."""

    weights: Weighting = "examples"
    shares: Selector = everything
    declares: Declaration = field(default_factory=Declaration)
    aggregate: Aggregation = field(default_factory=Aggregation)
    server: ServerRule | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "declares", self.aggregate.declare(self.declares))

    def shared(self, specs: Specs) -> Specs:
        """What is common to all sites, whether this round trains it or not."""
        kept = self.declares.personal_parts
        return {name: spec for name, spec in specs.items() if spec.tag.part not in kept and self.shares(spec.tag)}

    def up(self, specs: Specs, round: int) -> Specs:
        """The shared tensors that may be trained in this round."""
        trains = self.declares.trains
        return {name: spec for name, spec in self.shared(specs).items() if trains(spec.tag, round)}

    def down(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        """All shared tensors come back, and what the aggregation changes in the base."""
        return self.aggregate.down(specs, self.shared(specs))

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """The common start of the shared tensors; sites have the base, so it is remembered and not sent yet."""
        shared = self.shared(specs)
        base = {name: initial[name] for name in self.down(specs, 0) if name not in shared}
        return ServerState(0, tuple(sites), {name: initial[name] for name in shared}, base)

    def send(self, server: ServerState, site: str) -> Tensors:  # noqa: ARG002
        """Every site gets the same."""
        return server.shared

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:  # noqa: ARG002
        """Everything that does not travel starts, and stays, at the site."""
        shared = self.shared(specs)
        return Personal({name: initial[name] for name in specs if name not in shared})

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """w <- sum n_k w_k / sum n_k, tensor by tensor over the sites that trained it, or another aggregation."""
        terms = ((update.num_examples if self.weights == "examples" else 1, update.tensors) for update in updates)
        products = self.aggregate.products(specs, self.shared(specs))
        news = self.aggregate(terms, products, {**server.memory, **server.shared}, server.round + 1)
        memory = {name: value for name, value in server.memory.items() if name not in news}
        after = replace(server, shared={**server.shared, **news}, memory=memory)
        return self.server(server, after) if self.server else after


@dataclass(frozen=True)
class FedAvg(Averaging):
    """`objective_for` says what a site minimises, `fit` in what order."""

    objective_for: ObjectiveFor = task_loss
    fit: Fit = jointly

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train shared and personal tensors together on the base as it is; send the shared ones that were trained."""
        shared = {name: value for name, value in received.items() if name in training.specs}
        base = {name: value for name, value in received.items() if name not in shared}
        fitted = self.fit(training, {**shared, **personal.tensors}, self.objective_for(shared, training), base)
        update = {name: fitted.variables[name] for name in shared if training.active(training.specs[name].tag)}
        kept = Personal({name: fitted.variables[name] for name in personal.tensors})
        return Learned(update, kept, fitted.loss, fitted.num_steps, fitted.image_passes)

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
    facts={"leaves the site": "all trained tensors", "stays": "nothing but the data", "exact": "mean of each tensor"},
)
def fedavg(options: FedAvgOptions) -> FedAvg:
    """FedAvg, weighted by examples or uniformly, or with another sum."""
    return FedAvg(options.weights, aggregate=options.aggregation())
