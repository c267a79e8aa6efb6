"""Stage 8, strategies: mixtures of Gaussians of each class's features travel once, and the server trains the head.

In: mixtures of sites. Out: a linear head.

FedPFT: Beitollahi et al., TMLR 2025, arXiv 2402.01862. Site i fits to the frozen features {f(x) : y = c} of each class
c a mixture g_i^c = sum_k pi_k N(mu_k, Sigma_k); the server draws |{y = c}| features of every mixture it got and trains
the head h on them.
    f -> the frozen backbone's pooled features    pi, mu, Sigma -> mixture/weight, mean, spread (a root of Sigma)
    K -> components    spherical, diagonal, full -> covariance    |{y = c}| -> mixture/count    h -> head
Leaves the site, in the last round, once: for each class of at least `min_images` images how many there are, and for
each of its components, none of which stands for fewer than `min_images`, weight, mean and spread of features. This is
no image, but it is no secret either: a mean of features tells what images of a class look like to the backbone, a count
how many there are. There is no differential privacy here. Bytes: 4 C (1 + K (1 + D + S)) with S = 1, D, D (D + 1) / 2
for spherical, diagonal, full, and 9 + 1 around them, whatever a site has: what it lacks or hides is zero. Comes down:
the head, once. Stays: images, the start of a head. Kept between rounds: nothing else.
Departures: what is below `min_images` does not leave (the paper: all); fewer components where a class is small. A
class's mixtures are drawn from as one mixture, by images. The head is solved for to the end, as multinomial
logistic regression with a little decay on standardised features, and not stepped towards; `samples` evens out classes.
Only the head of the tuner `linear` is trained, as other tuners move features after they were summed up.
Identity: one component is the mean and the variance; expectation-maximisation and head are scikit-learn's.
Family: one-shot
Identity test: test_one_component_is_the_mean_and_variance_of_a_class
Slow reference: test_mixtures_and_head_are_scikit_learns
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from pydantic import Field
from torch import Tensor

from consilium import mixtures, seeds
from consilium.errors import ConfigError, TrainingError, WireError
from consilium.mixtures import Covariance, Mixture
from consilium.protocols import Declaration, Learned, LocalTraining, Personal, ServerState, Spec, Specs, Tag, Update
from consilium.registry import Options, register
from consilium.tensors import Tensors, digest

WEIGHT, BIAS, SEED = "head.weight", "head.bias", "seed"
COUNT = "mixture/count"  # a hospital's gate knows counts by their role
PARTS = ("weight", "mean", "spread")
MOST = 10**6  # images of a site: what it says is drawn from, so it must not fill the coordinator's memory


def check(update: Update) -> None:
    """WireError, with the site's name, for what no mixture is."""
    count, weight = update.tensors[COUNT], update.tensors["mixture/weight"]
    honest = bool((count >= 0).all() and (count == count.round()).all() and (weight >= 0).all())
    few = float(count.sum()) <= min(update.num_examples, MOST)  # so many features are drawn
    if not (honest and few) or bool((weight.sum(dim=1)[count > 0] <= 0).any()):
        received = f"counts {count.tolist()}, weights from {float(weight.min()):.3g}"
        raise WireError(f"site {update.site} sent what is no mixture", allowed="counts, weights", received=received)


DECLARED = Declaration(
    needs_individual_updates=True,
    once=True,
    checks=check,
    required_roles=frozenset({"head"}),
    passes=lambda round: (),  # noqa: ARG005
)
TAG = Tag("head", "mixture", slot="statistic")


class FedPftOptions(Options):
    """Keys of `[strategy]` for fedpft."""

    components: int = Field(default=5, ge=1)  # of each class at each site, at most. Ours, to be tuned
    covariance: Covariance = "diagonal"
    min_images: int = Field(default=5, ge=1)  # of a class and of a component; with fewer it does not leave. Ours
    floor: float = Field(default=1e-4, gt=0)  # added to variances of features. Ours
    samples: int | None = Field(default=None, ge=1)  # drawn of each class; None: as many as its images
    decay: float = Field(default=1e-3, gt=0)  # of the head, on standardised features. Ours, to be tuned


@dataclass(frozen=True)
class FedPft:
    """Nothing is trained at a site."""

    options: FedPftOptions
    declares: Declaration = field(default_factory=lambda: DECLARED)

    def up(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        """Statistics of fixed sizes; ConfigError for all but a shared linear head on frozen features."""
        if specs.keys() != {WEIGHT, BIAS} or specs[WEIGHT].tag.part == "personal":
            what = "class-conditional mixtures of features are for a shared linear head on frozen features"
            raise ConfigError(what, where="strategy.fedpft", allowed="tuner 'linear', head.kind 'linear'")
        (classes, width), k = _shape(specs), self.options.components
        spread = mixtures.shape_of_spreads(self.options.covariance, width)
        shapes = {"count": (), "weight": (k,), "mean": (k, width), "spread": (k, *spread)}
        found = {f"mixture/{name}": Spec((classes, *shape), TAG) for name, shape in shapes.items()}
        return {**found, COUNT: replace(found[COUNT], tag=replace(TAG, role="count"))}

    def down(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        """The head, once it is made."""
        return {n: replace(spec, tag=replace(spec.tag, slot="statistic")) for n, spec in specs.items()}

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:  # noqa: ARG002
        """Nothing to send; draws will follow from the run's seed, which the start of a head stands for."""
        return ServerState(0, tuple(sites), {}, {SEED: torch.tensor(_seed(initial))})

    def send(self, server: ServerState, site: str) -> Tensors:  # noqa: ARG002
        """Every site gets the same."""
        return server.shared

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:  # noqa: ARG002
        """The start of a head, for validation before there is one."""
        return Personal({name: initial[name] for name in specs})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Fit the mixtures of every class that has images enough."""
        features, labels = training.features(self.deploy(received, personal)["personal"])
        up = self.up(training.specs, training.round)
        sent = {name: torch.zeros([size or 0 for size in spec.shape]) for name, spec in up.items()}
        for at in range(len(training.class_counts)):
            x = features[labels == at].double()
            if len(x) >= self.options.min_images:
                seed = seeds.derive(_seed(personal.tensors), site=training.site, purpose=f"mixture/{at}")
                for name, value in self._fitted(x, seed).items():
                    sent[f"mixture/{name}"][at, : len(value)] = value.float()
                sent[COUNT][at] = len(x)
        return Learned(sent, personal, math.nan, 0, 0)

    def _fitted(self, x: Tensor, seed: int) -> dict[str, Tensor]:
        """The most components of which each stands for images enough."""
        kind, least = self.options.covariance, self.options.min_images
        for count in range(min(self.options.components, len(x) // least), 0, -1):
            generator = torch.Generator().manual_seed(seed)
            found = mixtures.fit(x, count, kind, self.options.floor, generator)
            if float(found.weights.min()) * len(x) >= least - 1e-6:
                break
        return dict(zip(PARTS, (found.weights, found.means, found.spreads), strict=True))

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """Draw features of each class from all sites' mixtures as one, and train the head on them."""
        sent = [update.tensors for update in updates if update.tensors]
        if not sent:
            return server
        generator, rows, (classes, width) = torch.Generator(), [], _shape(specs)
        for at in range(classes):
            generator.manual_seed(seeds.derive(int(server.memory[SEED]), purpose=f"features/{at}"))
            count = sum(int(tensors[COUNT][at]) for tensors in sent)
            each = [Mixture(*(tensors[f"mixture/{n}"][at].double() for n in PARTS)) for tensors in sent]
            whole = mixtures.joined(each, [float(tensors[COUNT][at]) for tensors in sent])
            number = (self.options.samples or count) if count else 0
            rows.append(mixtures.draw(whole, number, generator) if number else torch.zeros(0, width).double())
        labels = torch.repeat_interleave(torch.arange(classes), torch.tensor([len(each) for each in rows]))
        if not len(labels):
            received = f"no class of {self.options.min_images} images at any site"
            raise TrainingError("nothing to train a head on", received=received, remedy="lower strategy.min_images")
        found = mixtures.logistic(torch.cat(rows), labels, classes, self.options.decay)
        return replace(server, shared=dict(zip((WEIGHT, BIAS), (each.float() for each in found), strict=True)))

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """The head that was made, or its start."""
        models = {"personal": {**personal.tensors, **{n: v for n, v in received.items() if n in (WEIGHT, BIAS)}}}
        return {**models, "global": dict(received)} if WEIGHT in received else models


def _shape(specs: Specs) -> tuple[int, int]:
    classes, width = specs[WEIGHT].shape
    return int(classes or 0), int(width or 0)


def _seed(tensors: Tensors) -> int:
    """A number that stands for the seed these tensors were drawn from."""
    return int(digest(tensors[WEIGHT])[:15], 16)


@register(
    "strategies",
    "fedpft",
    options=FedPftOptions,
    summary="mixtures of Gaussians of each class's frozen features travel once; the server trains the head on draws",
    source="FedPFT: Beitollahi et al., TMLR 2025, arXiv 2402.01862",
    facts={
        "leaves the site": "counts, weights, means and spreads of features by class, once",
        "stays": "the start of a head",
        "exact": "one mean and covariance of each class at each site",
    },
)
def fedpft(options: FedPftOptions) -> FedPft:
    """One exchange of statistics."""
    return FedPft(options)
