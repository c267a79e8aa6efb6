"""Stage 8, strategies: every site is sent a mean of its own, in which the sites that are like it weigh most.

In: updates of sites. Out: one model per site.

    server: u_i = sum_j xi_ij w_j, rows of xi add up to one    site i: w_i = argmin F_i(w) + pull/2 ||w - u_i||^2
fedamp: Huang et al., AAAI 2021, arXiv 2007.03797: xi_ij = a exp(-||w_i - w_j||^2 / sigma) / sigma for j != i, the rest
  is the site's own; the distance is squared (a widely used library leaves the square out).
fedacs: attention over sites, arXiv 2312.15148 (ICASSP 2024), whose exact attention is not public to us: s_ij = cosine
  of the products B A of all layers, N_i = {j : s_ij >= delta} and i itself, a_ij = softmax of s_ij / T over N_i, u_i =
  (1 - alpha) w_i + alpha sum_j a_ij w_j. Factors have a gauge (B R, R^-1 A), so cosines of theirs mean nothing.
    w_i -> update    u_i -> received    a -> step    delta -> threshold (+ threshold_growth * round)    T -> temperature
Leaves the site: all trained tensors, number of training images (which weighs nothing). Stays, and is kept: w_i. The
server keeps every site's model: no secure sum can take its place.
Departures: any optimiser; all is pulled that is trained; a site that is first drawn later begins with its mean. The
papers' pull is lambda over a; here it is one number.
fedacs: delta grows by a fixed step, a site that no other is like keeps its own model, a model whose products are zero
is like none.
Identity: pull = 0 is local training from the common start (of sites that are in round 1); fedacs with threshold = -1
and a great T is the uniform mean; exchanging sites exchanges their models (tests/unit/test_strategy_attentive.py).
Family: personal models
Identity test of fedamp: test_strategy_attentive::test_without_a_pull_it_is_local_training
Identity test of fedacs: test_fedacs_with_no_threshold_and_a_great_temperature_is_the_uniform_mean
Slow reference of fedamp: test_fedamps_rounds_are_the_papers_with_the_distance_squared
Slow reference of fedacs: test_fedacss_rounds_are_the_formulas
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from consilium import algebra, orthogonality
from consilium.aggregation import Aggregation
from consilium.data import Batch
from consilium.errors import ConfigError
from consilium.products import products
from consilium.protocols import Declaration, Learned, LocalTraining, Objective, Personal, ServerState, Specs, Update
from consilium.registry import Options, register
from consilium.strategies.ditto import own_and_shared
from consilium.strategies.fedavg import Averaging
from consilium.tensors import Tensors, fetched, squared_distance, under, weighted_mean, within

OWN, MEANS = "own", "mean"
Rows = Callable[[Mapping[str, Tensors], Specs, int], Mapping[str, Mapping[str, float]]]  # models, specs, round -> xi


class FedAmpOptions(Options):
    """Keys of `[strategy]` for fedamp."""

    pull: float = Field(default=0.1, ge=0)  # of the site's model to its mean; ours
    sigma: float = Field(default=1.0, gt=0)  # squared distance at which a site weighs e times less; ours
    step: float | None = Field(default=None, gt=0)  # a; None: sigma / number of sites, so that alike sites weigh alike


class FedAcsOptions(Options):
    """Keys of `[strategy]` for fedacs."""

    pull: float = Field(default=0.1, ge=0)  # of the site's model to its mean
    alpha: float = Field(default=1.0, gt=0, le=1)  # how far the mean goes from the site's own model to the others
    temperature: float = Field(default=0.05, gt=0)  # T
    threshold: float = Field(default=0.0, ge=-1, le=1)  # delta, least similarity of a site that weighs anything
    threshold_growth: float = Field(default=0.0, ge=0)  # of delta in each round


@dataclass(frozen=True)
class Attentive(Averaging):
    """`rows` says how much each site's model weighs in each site's mean."""

    rows: Rows = lambda models, specs, round: {}  # noqa: ARG005
    pull: float = 0.1

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """All sites have the common start, and are sent it."""
        start = super().init_server(initial, specs, sites).shared
        self.rows(dict.fromkeys(sites, start), specs, 0)  # so that what cannot go is refused before the first round
        held = [under(f"{kind}/{site}", start) for kind in (OWN, MEANS) for site in sites]
        return ServerState(0, tuple(sites), {}, {name: value for each in held for name, value in each.items()})

    def send(self, server: ServerState, site: str) -> Tensors:
        """The site's mean."""
        return within(f"{MEANS}/{site}", server.memory)

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Go on from the site's own model, pulled to the mean."""
        rest = {name: value for name, value in personal.tensors.items() if name in training.specs}
        start = {**(within(OWN, personal.tensors) or received), **rest}
        fitted = training.fit(start, objective=self._objective(received, training))
        update = {name: fitted.variables[name] for name in received if training.active(training.specs[name].tag)}
        own = under(OWN, {name: fitted.variables[name] for name in received})
        kept = Personal({**own, **{name: fitted.variables[name] for name in rest}})
        return Learned(update, kept, fitted.loss, fitted.num_steps, fitted.image_passes)

    def _objective(self, received: Tensors, training: LocalTraining) -> Objective:
        anchor = fetched({n: value for n, value in received.items() if training.active(training.specs[n].tag)})

        def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
            pull = self.pull / 2 * squared_distance(variables, anchor(batch.labels.device))
            return training.loss(variables, batch) + pull

        return objective

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """The newest model of every site, and the means that follow."""
        news = {f"{OWN}/{u.site}/{name}": value for u in updates for name, value in u.tensors.items()}
        memory = {**server.memory, **news}
        models = {site: within(f"{OWN}/{site}", memory) for site in server.sites}
        found = self.rows(models, specs, server.round + 1) if news else {}
        for site, row in found.items():
            terms = [(row[other], models[other]) for other in server.sites if row[other] > 0]
            memory |= under(f"{MEANS}/{site}", weighted_mean(terms))
        return replace(server, memory=memory)

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """The site's own model; before its first round, and for guests, what was received."""
        return {"personal": own_and_shared(received, personal, within(OWN, personal.tensors))["personal"]}


def by_distance(sigma: float, step: float | None) -> Rows:
    """FedAMP's rows; ConfigError where the others would weigh more than everything."""

    def rows(models: Mapping[str, Tensors], specs: Specs, round: int) -> Mapping[str, Mapping[str, float]]:  # noqa: ARG001
        share = (step / sigma) if step is not None else 1 / len(models)
        if share * (len(models) - 1) > 1:
            allowed = f"step <= sigma / {len(models) - 1}"
            raise ConfigError("alike sites would weigh more than one in all", where="strategy.step", allowed=allowed)
        found = {
            i: {j: share * math.exp(-float(squared_distance(models[i], w)) / sigma) for j, w in models.items()}
            for i in models
        }
        return {i: {**row, i: 1 - sum(value for j, value in row.items() if j != i)} for i, row in found.items()}

    return rows


def by_attention(options: FedAcsOptions) -> Rows:
    """FedACS's rows, by the similarity of products."""

    def rows(models: Mapping[str, Tensors], specs: Specs, round: int) -> Mapping[str, Mapping[str, float]]:
        least, alike = options.threshold + options.threshold_growth * round, similarities(models, specs)
        found: dict[str, dict[str, float]] = {}
        for i in models:
            near = {j: value for j, value in alike[i].items() if value >= least or j == i}
            total = sum(sizes := [math.exp((value - 1) / options.temperature) for value in near.values()])
            row = {j: options.alpha * size / total for j, size in zip(near, sizes, strict=True)}
            found[i] = {j: row.get(j, 0.0) + (1 - options.alpha if j == i else 0.0) for j in models}
        return found

    return rows


def similarities(models: Mapping[str, Tensors], specs: Specs) -> dict[str, dict[str, float]]:
    """Cosines of all products of each two models taken as one vector; 0 for a model whose products are zero."""
    found = [p for p in products(specs) if all({p.right, *p.left} <= w.keys() for w in models.values())]
    pieces = {site: [orthogonality.factors(product, w) for product in found] for site, w in models.items()}

    def inner(i: str, j: str) -> float:
        return math.fsum(float(algebra.inner(a, b)) for a, b in zip(pieces[i], pieces[j], strict=True))

    norms = {site: math.sqrt(inner(site, site)) for site in models}

    def cosine(i: str, j: str) -> float:
        return inner(i, j) / (norms[i] * norms[j]) if norms[i] * norms[j] > 0 else 0.0

    return {i: {j: cosine(i, j) for j in models} for i in models}


_FACTS = {"leaves the site": "all trained tensors", "stays": "a model of the site's own"}


@register(
    "strategies",
    "fedamp",
    options=FedAmpOptions,
    summary="every site is sent a mean in which near sites weigh most",
    source="FedAMP: Huang et al., AAAI 2021, arXiv 2007.03797",
    facts=_FACTS,
)
def fedamp(options: FedAmpOptions) -> Attentive:
    """Nearness is a squared distance."""
    declares = Declaration(needs_individual_updates=True)
    return Attentive(declares=declares, rows=by_distance(options.sigma, options.step), pull=options.pull)


@register(
    "strategies",
    "fedacs",
    options=FedAcsOptions,
    summary="every site is sent a mean of the sites whose products B A are like its own",
    source="FedACS: arXiv 2312.15148, ICASSP 2024; the exact attention is not public",
    facts=_FACTS,
)
def fedacs(options: FedAcsOptions) -> Attentive:
    """Likeness is a cosine of products; a tuner without factors is refused."""
    declares, summed = Declaration(needs_individual_updates=True), Aggregation(of_factors=True)
    return Attentive(declares=declares, aggregate=summed, rows=by_attention(options), pull=options.pull)
