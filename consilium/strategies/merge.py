"""Stage 8, strategies: every site trains alone from a common start; differences are sent once and merged by a rule.

In: models of sites. Out: the common start and one difference, as long as sites' validation images like it best.

merge: data vectors, arXiv 2408.13038: theta = theta_pre + lambda tau, tau a combination of tau_k = theta_k - theta_pre.
ties: Yadav et al., NeurIPS 2023, arXiv 2306.01708. dare: Yu et al., ICML 2024, arXiv 2311.03099. More: `vectors.py`.
    theta_pre -> the common start    tau_k -> Vector of a site    lambda -> scale    k, 1 - p -> density
Leaves the site: in the last round, all tensors that it trained, number of training images; at the end a few validation
numbers of each candidate scale. Stays, and is kept between rounds: the site's own model as it is so far; personal ones.
Departures: the paper's scale and its short restoring step are not public. Here the scale is chosen by validation, and
`restore_epochs` trains classifier and norms on at each site, since a vision transformer has no batch statistics.
Products of factors are merged as products, then cut to the tuner's rank (`products = "cut"`), or, exactly, folded into
the frozen weights ("fold"). What one site did not train is the common start. `consilium merge` does it without a run.
Identity: theta_pre + lambda tau of whole weight matrices; one site at scale 1 is its local training.
Family: one-shot
Identity test: test_the_served_model_is_the_dense_sum
Slow reference: test_ties_is_the_papers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field, model_validator

from consilium import vectors
from consilium.aggregation import Aggregation, Weighting
from consilium.choice import Choice
from consilium.products import products
from consilium.protocols import Declaration, Learned, LocalTraining, Personal, ServerState, Spec, Specs, Tag, Update
from consilium.registry import Options, register
from consilium.strategies.fedavg import Averaging
from consilium.tensors import Tensors, under, within
from consilium.vectors import Term

OWN, SCALE = "own", "merge/scale"  # in front of what the site has trained so far; there once models are merged


class MergeOptions(Options):
    """Keys of `[strategy]` for merge."""

    rule: Literal["mean", "ties", "dare"] = "mean"
    weights: Weighting = "examples"  # of mean and dare
    scale: float | None = Field(default=None, gt=0)  # lambda; None: the best of `scales` on validation images
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # candidates. Ours
    select: str = "balanced_accuracy"  # validation metric whose mean over sites chooses
    density: float = Field(default=0.2, gt=0, le=1)  # of ties and dare: share of entries that is kept. Ours
    mask_seed: int = Field(default=0, ge=0)  # of dare
    products: Literal["cut", "fold"] = "cut"  # of factors: to the tuner's rank; or exact, into the frozen weights
    restore_epochs: float = Field(default=0.0, ge=0)  # of head and norms at each site at the end; 0: none

    @model_validator(mode="after")
    def _effective(self) -> MergeOptions:
        given = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        idle = {"weights"} if self.rule == "ties" else set()
        idle |= {"scales", "select"} if self.scale is not None else set()
        idle |= {"density"} if self.rule == "mean" else set()
        idle |= {"mask_seed"} if self.rule != "dare" else set()
        if found := sorted(given & idle):
            raise ValueError(f"no effect beside the other keys: {', '.join(found)}")
        if not self.scales or min(self.scales) <= 0 or len(set(self.scales)) < len(self.scales):
            raise ValueError("scales are positive, and each stands there once")
        return self


@dataclass(frozen=True)
class Merge(Averaging):
    """`memory` of the server: the start, and the vector in pieces."""

    options: MergeOptions = field(default_factory=MergeOptions)

    def down(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        """The start and then the merged model; where products are folded, the frozen weights that they change."""
        shared, fold = self.shared(specs), self.options.products == "fold"
        found = Aggregation("stack").down(specs, shared) if fold and products(shared) else shared
        return {**found, SCALE: Spec((1,), Tag("merge", "scale", slot="statistic"), torch.float64)}

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """The common start, and the frozen weights that a merge may change."""
        shared, down = self.shared(specs), self.down(specs, 0).keys()
        base = {name: initial[name] for name in down - shared.keys() - {SCALE}}
        return ServerState(0, tuple(sites), {name: initial[name] for name in shared}, base)

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train the site's own model on; in the last round all that was ever trained of it is sent."""
        own, start = within(OWN, personal.tensors), {n: v for n, v in received.items() if n in training.specs}
        rest = _beside(personal)
        fitted = training.fit({**start, **own, **rest})
        names = [name for name in start if name in own or training.active(training.specs[name].tag)]
        sent = {name: fitted.variables[name] for name in names}
        kept = Personal({**under(OWN, sent), **{name: fitted.variables[name] for name in rest}})
        return Learned(sent, kept, fitted.loss, fitted.num_steps, fitted.image_passes)

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """Nothing before the last round; then one vector, at the first scale."""
        sent = [update for update in updates if update.tensors]
        if not sent:
            return server
        start = {**server.memory, **server.shared}
        own, options = products(self.shared(specs)), self.options
        weights = [update.num_examples if options.weights == "examples" else 1 for update in sent]
        made = [vectors.difference({**server.shared, **u.tensors}, server.shared, own, own) for u in sent]
        terms = [Term(u.site, vector, weight) for u, vector, weight in zip(sent, made, weights, strict=True)]
        vector = vectors.merged(options.rule, terms, options.density, options.mask_seed)
        after = replace(server, memory={**under("start", start), **vectors.packed(vector)})
        return self.at(after, specs, str(options.scale or options.scales[0]))

    def at(self, server: ServerState, specs: Specs, scale: str) -> ServerState:
        """The state with theta_pre + scale * vector."""
        start, vector, lam = within("start", server.memory), vectors.unpacked(server.memory), float(scale)
        own, found = products(self.shared(specs)), vectors.added(vector, lam, start)
        if self.options.products == "fold":
            found |= vectors.folded(vector, lam, own, start)
        else:
            for product in own:
                found |= vectors.cut(vector, lam, product, start)
        shared = {name: value.to(start[name].dtype) for name, value in found.items()}
        marked = {SCALE: torch.tensor([lam], dtype=torch.float64)}
        return replace(server, shared={**server.shared, **shared, **marked})

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """The merged model once it is there, the site's own before."""
        rest, model = _beside(personal), {n: v for n, v in received.items() if n != SCALE}
        if SCALE not in received:
            return {"personal": {**model, **rest, **within(OWN, personal.tensors)}}
        return {"personal": {**model, **rest}} | ({} if rest else {"global": model})


def _beside(personal: Personal) -> Tensors:
    return {name: value for name, value in personal.tensors.items() if "/" not in name}


@register(
    "strategies",
    "merge",
    options=MergeOptions,
    summary="every site trains alone; differences from the common start are sent once and merged by a rule",
    source="data vectors: arXiv 2408.13038; TIES: arXiv 2306.01708; DARE: arXiv 2311.03099",
    facts={
        "leaves the site": "all trained tensors, once, at the end",
        "stays": "the model so far",
        "exact": "sum of products with products = 'fold'; else the nearest at the tuner's rank",
    },
)
def merge(options: MergeOptions) -> Merge:
    """One exchange, and a scale that validation chooses."""
    fold, restores = options.products == "fold", options.restore_epochs
    made = Merge(options=options)
    names = tuple(str(scale) for scale in options.scales)
    choice = None if options.scale is not None else Choice(names, options.select, made.at)
    declares = Declaration(
        needs_individual_updates=True,
        once=True,
        changes_base=fold,
        restarts_factors=True,
        refactors=lambda round: not fold,  # noqa: ARG005
        finish_epochs=restores,
        finishes=lambda tag: tag.role in ("head", "norm"),
        choice=choice,
    )
    return replace(made, declares=declares)
