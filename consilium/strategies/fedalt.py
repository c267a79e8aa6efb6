"""Stage 8, strategies: a trained adapter of the site's own beside a still one that is the mean of all other sites'.

In: changes of sites' adapters. Out: the next mean.

FedALT: AAAI 2026; y = W_0 x + s (r_0(x) B_0 A_0 x + r_1(x) B_1 A_1 x), (r_0, r_1) = softmax(R x): a token router. A
site trains A_1, B_1 and R alone; A_0, B_0 are the unweighted mean of the other sites' A_1, B_1.
    A_1, B_1 -> part shared (what travels of it: up changes, down the mean)    A_0, B_0 -> part personal    R -> router
Leaves the site: what its adapter has changed by, trained head, number of training
images.
Stays, and is kept: router, the adapter (the sum of what was sent), what was sent last and trained beside.
Departures: the server sends the plain mean over all K sites, and each takes itself out, others = (K mean - own) / (K -
1): one message for all, formed from a sum of changes alone. A site that has not answered yet counts with the common
start, from which all adapters begin (sent once). Router and A_0, B_0 are not uploaded, as the authors' code does. The
head, and what other tuners train, is trained too and averaged.
Identity: others = the mean of the other sites' newest adapters; with one site this is undefined, and refused.
Family: dual LoRA
Identity test: test_in_a_federation_others_are_the_mean_of_the_others
Slow reference: test_rounds_are_the_papers_with_the_mean_of_the_others_formed_by_hand
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.aggregation import Weighting
from consilium.protocols import Declaration, Learned, LocalTraining, Part, Personal, Specs, Tag
from consilium.registry import Options, register
from consilium.strategies.others import OWN, SENT, Others, before_aggregation, others_of, own_of
from consilium.tensors import Tensors, map_tensors, under, within

BESIDE = "beside"
FACTORS = frozenset({"lora_a", "lora_b"})


class FedAltOptions(Options):
    """Keys of `[strategy]` for fedalt."""

    weights: Weighting = "uniform"  # of the head's mean; adapters are always weighted alike


@dataclass(frozen=True)
class FedAlt(Others):
    """What a site does with the mean of the others: it stays beside the adapter that is trained."""

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """The router and a personal head; the others' adapter is formed when it is needed."""
        start = super().init_site(initial, specs, site).tensors
        return Personal({name: value for name, value in start.items() if specs[name].tag.role not in FACTORS})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train the site's own adapter, the router and the head beside the others' mean."""
        own, others = standing(received, personal)
        rest = {n: v for n, v in received.items() if n in training.specs and n not in own}
        held = {n: v for n, v in personal.tensors.items() if n in training.specs}
        start = {**own, **rest, **held, **{beside(n): value for n, value in others.items()}}
        fitted = training.fit(start, only=lambda tag: training.active(tag) and not is_others(tag))
        found = {n: fitted.variables[n] for n in own}
        change = map_tensors(torch.sub, found, own)
        sent = {n: {**fitted.variables, **change}[n] for n in (*own, *rest) if training.active(training.specs[n].tag)}
        kept = {**{n: fitted.variables[n] for n in held}, **under(OWN, found), **under(SENT, change)}
        kept |= under(BESIDE, others)
        return Learned(sent, Personal(kept), fitted.loss, fitted.num_steps, fitted.image_passes)

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """Own adapter, router, mean of the others; a site that has not answered yet has the common start as its own."""
        own, others = standing(received, personal)
        plain = {n: v for n, v in {**received, **personal.tensors}.items() if "/" not in n}
        return {"personal": {**plain, **own, **{beside(n): value for n, value in others.items()}}}


def standing(received: Tensors, personal: Personal) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A site's own adapter and the mean of the others', both under the names that travel. Where the site's own update
    lies in the place of the mean (the model before aggregation), the others are those it was trained beside."""
    own = own_of(received, personal)
    if before_aggregation(received, personal):
        return own, within(BESIDE, personal.tensors)
    return own, others_of(received, own)


def beside(name: str) -> str:
    """The name of the others' factor beside a site's own."""
    return name.replace(".shared.", ".personal.")


def is_others(tag: Tag) -> bool:
    """A factor of the adapter that stands for the other sites, and that only the site itself can form."""
    return tag.role in FACTORS and tag.part == "personal"


@register(
    "strategies",
    "fedalt",
    options=FedAltOptions,
    summary="an adapter of the site's own beside the mean of all other sites', mixed token by token by a router",
    source="FedALT: AAAI 2026",
    facts={
        "leaves the site": "changes of the site's factors, the head",
        "stays": "the adapter as it is, its last change, the others' mean, the router",
    },
)
def fedalt(options: FedAltOptions) -> FedAlt:
    """Two routed adapters; a tuner without a router is refused."""
    parts = (Part(), Part("personal", personal=True))
    declares = Declaration(parts, "router", required_roles=frozenset({"router", *FACTORS}))
    return FedAlt(options.weights, declares=declares)
