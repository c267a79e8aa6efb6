"""Stage 8, strategies: a shared adapter that is trained as if it were alone, and a personal one on top of it.

In: updates of sites. Out: the next shared tensors.

FedDPA: Yang, Long, Shen, Jiang, Blumenstein, NeurIPS 2024, arXiv 2403.19211.
feddpa_t: in every round but the first a local phase trains the personal adapter alone, with the shared one still,
    y = W_0 x + (1 - a) s B_g A_g x + a s B_p A_p x,
  then a global phase trains the shared adapter alone, with weight one; the first round has the global phase only.
feddpa_f: the shared adapter is trained and averaged in all rounds; after the last the personal one is trained on top
of it.
    a -> local_weight    g, p -> parts shared, personal
With combine = "instance" the model in use weighs its adapters image by image: a(x) = instance_weight times the mean
cosine between features of x and of `instances` training images of the site, see `instances.py`; they stay at the site.
Leaves the site: the shared factors and the head, trained as in FedIT, number of training images. Stays, and is kept:
the personal factors (feddpa_t), how left factors are weighted; in the served model, features of a few images.
Departures: unless combine = "instance", which is the paper's, the model in use weights its adapters as the local phase
does, and as W_0 + g before a site has had one; feddpa_f sums both. Weights by image are of pooled features, of images
that are drawn once, and of features kept in their place; likeness speaks for the personal adapter, where the authors'
code has it speak for the shared one (instance_of = "shared"). The shared head is trained in the global phase. Not
copied: a stop of gradients that also cuts off lower layers.
Identity: the shared tensors of both are FedIT's, bit by bit (feddpa_t: with uniform weights, as here by default).
Family: dual LoRA
Identity test: test_the_shared_adapter_is_fedits
Slow reference of feddpa_t: test_feddpa_ts_rounds_are_the_formulas
Slow reference of feddpa_f: test_round_by_round_the_factors_are_the_formulas
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from consilium.aggregation import SumOptions, Weighting
from consilium.config_sites import changed
from consilium.data import Batch
from consilium.instances import Of, weighed
from consilium.orthogonality import couples
from consilium.protocols import Declaration, Learned, LocalTraining, Part, Personal, Tag
from consilium.registry import register
from consilium.strategies.fedavg import Averaging
from consilium.tensors import Tensors, under, within

WEIGHT = "weight"  # in front of a left factor: what it is multiplied with in the personal model
PARTS = (Part(), Part("personal", personal=True))


class FedDpaOptions(SumOptions):
    """Keys of `[strategy]` that feddpa_t and feddpa_f have in common; all but `weights` are of combine = "instance"."""

    weights: Weighting = "uniform"  # as in the authors' code
    instances: int = Field(default=5, ge=1)  # images of the site that a new one is compared with; the authors' code
    instance_weight: float = Field(default=0.5, gt=0, le=1)  # share at a likeness of one; the authors' code
    instance_of: Of = "personal"  # which adapter likeness speaks for; shared: as the authors' code does

    combine: str = "instance"

    @model_validator(mode="after")
    def _with_an_effect(self) -> FedDpaOptions:
        given = changed(self) & {"instances", "instance_weight", "instance_of"}
        if given and self.combine != "instance":
            raise ValueError(f"{', '.join(sorted(given))}: of combine = 'instance' only")
        return self

    @property
    def by_image(self) -> tuple[float, Of] | None:
        """How adapters are weighed image by image, if so."""
        return (self.instance_weight, self.instance_of) if self.combine == "instance" else None


class FedDpaTOptions(FedDpaOptions):
    """Keys of `[strategy]` for feddpa_t."""

    local_weight: float = Field(default=0.5, gt=0, le=1)  # a, share of the personal adapter; the authors' code
    combine: Literal["fixed", "instance"] = "fixed"  # in use: weighted by a; or by a(x), image by image


class FedDpaFOptions(FedDpaOptions):
    """Keys of `[strategy]` for feddpa_f."""

    local_epochs: float = Field(default=1.0, gt=0)  # of the personal adapter, after the last round
    combine: Literal["sum", "instance"] = "sum"  # in use: as it was trained; or weighted by a(x), image by image


@dataclass(frozen=True)
class FedDpa(Averaging):
    """`local_weight`: a; None where no round has a local phase. `instance`: how a(x) is formed, if the model in use has
    one."""

    local_weight: float | None = None
    instance: tuple[float, Of] | None = None

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Local phase, then global phase; both begin with the shared tensors as they came."""
        shared = {name: value for name, value in received.items() if name in training.specs}
        base = {name: value for name, value in received.items() if name not in shared}
        held = {name: value for name, value in personal.tensors.items() if name in training.specs}
        heads = {name: value for name, value in held.items() if training.specs[name].tag.role == "head"}
        kept, steps, passes = dict(personal.tensors), 0, 0
        if self.local_weight is not None and training.round > 1:
            weights = self._weights(training, self.local_weight)

            def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
                return training.loss(weighted(variables, weights), batch)

            local = training.fit(
                {**shared, **held},
                objective=objective,
                only=lambda tag: tag.part == "personal" and training.active(tag),
                fixed=base,
                purpose="local",
            )
            kept |= {**{name: local.variables[name] for name in held}, **under(WEIGHT, weights)}
            heads, steps, passes = {n: local.variables[n] for n in heads}, local.num_steps, local.image_passes
        fitted = training.fit({**shared, **heads}, only=lambda tag: not own(tag) and training.active(tag), fixed=base)
        update = {name: fitted.variables[name] for name in shared if training.active(training.specs[name].tag)}
        kept |= {name: fitted.variables[name] for name in heads}
        steps, passes = steps + fitted.num_steps, passes + fitted.image_passes
        return Learned(update, Personal(kept), fitted.loss, steps, passes)

    def _weights(self, training: LocalTraining, share: float) -> dict[str, Tensor]:
        pairs = couples(training.specs, self.declares.personal_parts)
        of = [(names, value) for g, p in pairs for names, value in ((g.left, 1 - share), (p.left, share))]
        return {name: torch.tensor(value, dtype=torch.float64) for names, value in of for name in names}

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """Both adapters by weight, and the shared one alone unless the head is personal."""
        model = {**received, **{name: value for name, value in personal.tensors.items() if "/" not in name}}
        fixed = within(WEIGHT, personal.tensors)
        models = {"personal": weighed(model, *self.instance) if self.instance else weighted(model, fixed)}
        alone = not any(name.startswith("head.") for name in personal.tensors)
        return {**models, "global": dict(received)} if alone else models


def own(tag: Tag) -> bool:
    """A tensor of the personal adapter; a personal head is none."""
    return tag.part == "personal" and tag.role != "head"


def weighted(variables: Tensors, weights: Tensors) -> dict[str, Tensor]:
    """Left factors times their weights; all else as it is."""
    news = {name: variables[name] * weight.to(variables[name]) for name, weight in weights.items()}
    return {**variables, **news}


_FACTS = {"leaves the site": "shared factors and the head", "stays": "personal factors and their weights"}
_SOURCE = "FedDPA: Yang et al., NeurIPS 2024, arXiv 2403.19211"


@register(
    "strategies",
    "feddpa_t",
    options=FedDpaTOptions,
    summary="in every round a personal adapter is trained beside the shared one, then the shared one alone",
    source=_SOURCE,
    facts=_FACTS,
)
def feddpa_t(options: FedDpaTOptions) -> FedDpa:
    """Two phases in a round."""
    declares = Declaration(
        PARTS,
        trains=lambda tag, round: round > 1 or not own(tag),
        passes=lambda round: (None,) if round == 1 else (None, None),
        instances=options.instances if options.by_image else 0,
    )
    summed = options.aggregation(of_factors=True)
    by = options.by_image
    return FedDpa(options.weights, declares=declares, aggregate=summed, local_weight=options.local_weight, instance=by)


@register(
    "strategies",
    "feddpa_f",
    options=FedDpaFOptions,
    summary="FedIT, after which every site trains a personal adapter on top of the shared one",
    source=_SOURCE,
    facts=_FACTS,
)
def feddpa_f(options: FedDpaFOptions) -> FedDpa:
    """The personal adapter waits for the last request."""
    declares = Declaration(
        PARTS,
        trains=lambda tag, round: not own(tag),  # noqa: ARG005
        finish_epochs=options.local_epochs,
        finishes=lambda tag: tag.part == "personal",
        instances=options.instances if options.by_image else 0,
    )
    summed = options.aggregation(of_factors=True)
    return FedDpa(options.weights, declares=declares, aggregate=summed, instance=options.by_image)
