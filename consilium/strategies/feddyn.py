"""Stage 8, strategies: FedDyn, a term of each site's own that makes all sites' optima one.

In: updates of sites. Out: the next shared tensors.

Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, ICLR 2021, arXiv 2111.04263, algorithm 1:
w_k <- argmin f_k(w) - <h_k, w> + a/2 ||w - x||^2;  h_k <- h_k - a (w_k - x);
h <- h - a / N sum over S of (w_k - x);  x <- mean over S of w_k - h / a.
x -> received    w -> variables    h_k (their gradient of the last round) -> "h/<name>", at the site
h -> server.memory "h/<name>"    a (their alpha) -> alpha    S, N -> sites that sent something, all sites
Leaves the site: the shared tensors that were trained. Stays: images, personal tensors, h_k (no secret: the coordinator
can reckon it from what it got). Kept between rounds: h_k at the site, n_k sums for h and n_k at the server.
Departures: sites do the configured work with any optimiser, the paper solves; the norm is squared, as in the paper and
unlike in some code; means over sites are by images if weights = "examples", uniform (the paper's) is the default: both
of models and of h, of which sites that never sent anything count like the mean of the others; a tensor that no site
trained in a round is left alone.
Identity: with exact local solves it ends where the sum of all losses is least, whatever the sites (I15); FedAvg and an
unsquared norm do not (tests/unit/test_strategy_feddyn.py).
Family: optimisation
Identity test: test_with_exact_solves_it_ends_at_the_optimum_of_all
Slow reference: test_strategy_feddyn::test_it_is_the_papers_algorithm
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from pydantic import Field
from torch import Tensor

from consilium.aggregation import Weighting
from consilium.data import Batch
from consilium.protocols import (
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
from consilium.strategies.scaffold import IMAGES, under, within, without
from consilium.tensors import Tensors

H = "h/"


class FedDynOptions(Options):
    """Keys of `[strategy]` for feddyn."""

    alpha: float = Field(default=0.1, gt=0)  # of the pull; more: slower and steadier. Ours, to be tuned
    weights: Weighting = "uniform"  # of models and of h alike


@dataclass(frozen=True)
class FedDyn(FedAvg):
    """FedAvg with h and h_k."""

    alpha: float = field(kw_only=True)

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """h of zero."""
        start = super().init_server(initial, specs, sites)
        sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.shared.items()}
        unknown = torch.full((len(sites),), 1.0 if self.weights == "uniform" else torch.nan, dtype=torch.float64)
        return replace(start, memory={**under(H, sums), IMAGES: unknown})

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """h_k of zero for each shared tensor, beside what is personal."""
        own = super().init_site(initial, specs, site).tensors
        return Personal({**own, **under(H, {n: torch.zeros_like(initial[n]) for n in self.shared(specs)})})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train on the loss with both terms, then h_k <- h_k - a (w_k - x)."""
        own, h_k = without(H, personal.tensors), within(H, personal.tensors)
        names = [name for name in received if training.active(training.specs[name].tag)]
        fixed = {**under("linear:", {n: h_k[n] for n in names}), **under("anchor:", {n: received[n] for n in names})}
        objective = _regularised(training, names, self.alpha)
        fitted = training.fit({**received, **own}, objective=objective, fixed=fixed)
        w = {name: fitted.variables[name] for name in names}
        h_k = {**h_k, **{name: h_k[name] - self.alpha * (w[name] - received[name]) for name in names}}
        kept = Personal({**{name: fitted.variables[name] for name in own}, **under(H, h_k)})
        return Learned(w, kept, fitted.loss, fitted.num_steps, fitted.image_passes)

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """sum n_k h_k <- the same - a sum_S n_k (w_k - x); h is that by all sites' n_k; x <- mean w_k - h / a."""
        images, sums = server.memory[IMAGES].clone(), within(H, server.memory)

        def models() -> Iterator[Update]:
            for update in updates:
                at = server.sites.index(update.site)
                images[at] = 1.0 if self.weights == "uniform" else update.num_examples
                for name, w in update.tensors.items():
                    step = w.double() - server.shared[name].double()
                    sums[name] = sums[name] - self.alpha * images[at] * step
                yield update

        after = super().combine(replace(server, memory={}), models(), specs)
        news = {name: mean for name, mean in after.shared.items() if mean is not server.shared[name]}
        total = float(images.nanmean()) * len(images)
        moved = {n: (w.double() - sums[n] / total / self.alpha).to(w.dtype) for n, w in news.items()}
        return replace(after, shared={**after.shared, **moved}, memory={**under(H, sums), IMAGES: images})

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """FedAvg's: h_k is no part of a model."""
        return super().deploy(received, Personal(without(H, personal.tensors)))


def _regularised(training: LocalTraining, names: Sequence[str], alpha: float) -> Objective:
    """f_k(w) - <h_k, w> + a/2 ||w - x||^2; of the two terms only the gradient counts, a log shows the loss."""

    def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        terms = [_terms(variables, name, alpha) for name in names]
        term = torch.stack(terms).sum() if terms else torch.zeros(())
        model = without("linear:", without("anchor:", variables))
        return training.loss(model, batch) + (term - term.detach())

    return objective


def _terms(variables: Tensors, name: str, alpha: float) -> Tensor:
    w, h_k, x = variables[name], variables[f"linear:{name}"], variables[f"anchor:{name}"]
    return alpha / 2 * (w - x).square().sum() - (h_k * w).sum()


@register(
    "strategies",
    "feddyn",
    options=FedDynOptions,
    summary="FedAvg with a term of each site's own that makes all sites' optima one",
    source="FedDyn: Acar et al., ICLR 2021, arXiv 2111.04263",
    facts={"leaves the site": "all trained tensors", "stays": "a term of each shared tensor"},
)
def feddyn(options: FedDynOptions) -> FedDyn:
    """FedDyn, weighted uniformly or by examples."""
    return FedDyn(options.weights, alpha=options.alpha)
