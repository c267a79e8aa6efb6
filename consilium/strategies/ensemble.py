"""Stage 8, strategies: every site trains alone; the models are sent once, and used together.

In: models of sites. Out: all of them, side by side.

ensemble: p(y | x) = 1/K sum_k p_k(y | x), the mean of probabilities of K models; or the mean of their logits z_k,
  p = softmax(1/K sum_k z_k), a product of experts. A mean of predictions: Breiman, "Bagging predictors", Machine
  Learning 24, 1996; of models of several sites in one exchange: Guha, Talwalkar, Smith, "One-shot federated learning",
  arXiv 1902.11175.
    p_k, z_k -> probabilities, head outputs of site k's model    K -> the sites that the last round draws
Leaves the site: in the last round, all tensors that it trained, number of training images. Comes down: the common
start, and at the end all K models: K N numbers where FedAvg has N in every round.
Stays, and is kept between rounds: the site's own model as it is so far.
Departures: all models start from the run's common start, which is what lets a tensor that nobody trains, or not here,
be sent once. Models count alike, whatever number of images is behind them.
Identity: with one site it is that site's own model; a member is the model of the site's own training, bit by bit; the
mean of probabilities is the formula (tests/unit/test_strategy_ensemble.py).
Family: references
Identity test: test_a_member_is_what_the_sites_own_training_gives
Slow reference: test_every_site_predicts_with_the_mean_of_all_models
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from consilium.errors import ConfigError
from consilium.members import Mean
from consilium.protocols import Declaration, Learned, LocalTraining, Personal, ServerState, Specs, Update
from consilium.registry import Options, register
from consilium.strategies.fedavg import Averaging
from consilium.tensors import Tensors, under, within

OWN = "own"  # in front of what the site has trained so far


class EnsembleOptions(Options):
    """Keys of `[strategy]` for ensemble."""

    mean: Mean = "probabilities"  # of what the models' mean is taken


@dataclass(frozen=True)
class Ensemble(Averaging):
    """`mean` names what comes down: `members` says how that is used."""

    mean: Mean = "probabilities"

    def shared(self, specs: Specs) -> Specs:
        """All; ConfigError for a personal head: what another site sent must be a whole model."""
        if any(spec.tag.part == "personal" for spec in specs.values()):
            remedy = "leave head.share out"
            raise ConfigError("a model without its head cannot vote", where="strategy.ensemble", remedy=remedy)
        return super().shared(specs)

    def down(self, specs: Specs, round: int) -> Specs:
        """The start, and all models: a free first dimension of as many as took part."""
        found = dict(super().down(specs, round))
        for name, spec in self.shared(specs).items():
            tag = replace(spec.tag, slot="statistic")
            found[f"{self.mean}/{name}"] = replace(spec, shape=(None, *spec.shape), tag=tag, factor=None)
        return found

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """The common start."""
        return ServerState(0, tuple(sites), {name: initial[name] for name in self.shared(specs)})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train the site's own model on; in the last round all that was ever trained of it is sent."""
        own = within(OWN, personal.tensors)
        fitted = training.fit({**self._start(received), **own})
        names = [name for name in fitted.variables if name in own or training.active(training.specs[name].tag)]
        found = {name: fitted.variables[name] for name in names}
        return Learned(found, Personal(under(OWN, found)), fitted.loss, fitted.num_steps, fitted.image_passes)

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:  # noqa: ARG002
        """The models one below the other, in the order of sites; what a site did not train is the common start."""
        sent = [update.tensors for update in updates if update.tensors]
        names = sorted({name for tensors in sent for name in tensors})
        rows = {name: torch.stack([{**server.shared, **tensors}[name] for tensors in sent]) for name in names}
        return replace(server, shared={**server.shared, **under(self.mean, rows)})

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """All models together once they are here, the site's own before."""
        start, rows = self._start(received), under(self.mean, within(self.mean, received))
        together = {n: v for n, v in start.items() if f"{self.mean}/{n}" not in rows} | rows
        own = {**start, **within(OWN, personal.tensors)}
        return {"personal": together, "global": together} if rows else {"personal": own}

    def _start(self, received: Tensors) -> Tensors:
        return {name: value for name, value in received.items() if "/" not in name}


@register(
    "strategies",
    "ensemble",
    options=EnsembleOptions,
    summary="every site trains alone; the models are sent once, at the end, and all sites predict with their mean",
    source="Guha, Talwalkar, Smith, arXiv 1902.11175",
    facts={"leaves the site": "all trained tensors, once, at the end", "stays": "the model so far"},
)
def ensemble(options: EnsembleOptions) -> Ensemble:
    """A mean of predictions."""
    return Ensemble(declares=Declaration(needs_individual_updates=True, once=True), mean=options.mean)
