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
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilium.aggregation import Weighting
from consilium.errors import ConfigError
from consilium.protocols import Declaration, Learned, LocalTraining, Part, Personal, ServerState, Specs, Tag, Update
from consilium.registry import Options, register
from consilium.strategies.fedavg import Averaging
from consilium.tensors import Tensors, map_tensors, select, under, weighted_mean, within

START, OWN, SENT, BESIDE, SITES = "start", "own", "sent", "beside", "sites/number"
FACTORS = frozenset({"lora_a", "lora_b"})


class FedAltOptions(Options):
    """Keys of `[strategy]` for fedalt."""

    weights: Weighting = "uniform"  # of the head's mean; adapters are always weighted alike


@dataclass(frozen=True)
class FedAlt(Averaging):
    """What travels under a factor's name: up the site's change, down the mean of all sites' own."""

    def down(self, specs: Specs, round: int) -> Specs:
        """The means, the common start of factors, and how many sites there are."""
        found = {name: spec for name, spec in super().down(specs, round).items() if spec.tag.role in FACTORS}
        fixed = {f"{START}/{n}": replace(s, tag=replace(s.tag, slot="control"), factor=None) for n, s in found.items()}
        some = next(iter(fixed.values()))
        return {**super().down(specs, round), **fixed, SITES: replace(some, shape=(1,), dtype=torch.float64)}

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """All adapters at the common start; ConfigError for a site without others."""
        if len(sites) < 2:
            raise ConfigError("the mean of the other sites needs other sites", where="strategy.fedalt", received=sites)
        start = {name: initial[name] for name in self.shared(specs)}
        factors = {name: initial[name] for name in start if specs[name].tag.role in FACTORS}
        number = torch.tensor([float(len(sites))], dtype=torch.float64)
        return ServerState(0, tuple(sites), {**start, **under(START, factors), SITES: number})

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """The router and a personal head; the others' adapter is formed when it is needed."""
        start = super().init_site(initial, specs, site).tensors
        return Personal({name: value for name, value in start.items() if specs[name].tag.role not in FACTORS})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """Train the site's own adapter, the router and the head beside the others' mean."""
        own, others = standing(received, personal)
        rest = {n: v for n, v in received.items() if n in training.specs and n not in own}
        held = {n: v for n, v in personal.tensors.items() if n in training.specs}
        start = {**own, **rest, **held, **{of_others(n): value for n, value in others.items()}}
        fitted = training.fit(start, only=lambda tag: training.active(tag) and not is_others(tag))
        found = {n: fitted.variables[n] for n in own}
        change = map_tensors(torch.sub, found, own)
        sent = {n: {**fitted.variables, **change}[n] for n in (*own, *rest) if training.active(training.specs[n].tag)}
        kept = {**{n: fitted.variables[n] for n in held}, **under(OWN, found), **under(SENT, change)}
        kept |= under(BESIDE, others)
        return Learned(sent, Personal(kept), fitted.loss, fitted.num_steps, fitted.image_passes)

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """mean <- mean + sum of changes / K; the rest is averaged over the sites that trained it."""
        total: dict[str, Tensor] = {}
        terms: list[tuple[float, Tensors]] = []
        for update in updates:
            changes = {n: value for n, value in update.tensors.items() if specs[n].tag.role in FACTORS}
            total |= {n: total.get(n, torch.zeros(())) + value.double() for n, value in changes.items()}
            rest = {n: value for n, value in update.tensors.items() if n not in changes}
            terms.append((update.num_examples if self.weights == "examples" else 1, rest))
        moved = {n: (server.shared[n].double() + value / len(server.sites)) for n, value in total.items()}
        means = {n: value.to(server.shared[n].dtype) for n, value in moved.items()}
        return replace(server, shared={**server.shared, **weighted_mean(terms), **means})

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """Own adapter, router, mean of the others; a site that has not answered yet has the common start as its own."""
        own, others = standing(received, personal)
        plain = {n: v for n, v in {**received, **personal.tensors}.items() if "/" not in n}
        return {"personal": {**plain, **own, **{of_others(n): value for n, value in others.items()}}}


def standing(received: Tensors, personal: Personal) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A site's own adapter and the mean of the others', both under the names that travel. Where the site's own update
    lies in the place of the mean (the model before aggregation), the others are those it was trained beside."""
    start, sent, beside = within(START, received), within(SENT, personal.tensors), within(BESIDE, personal.tensors)
    own = within(OWN, personal.tensors) or start
    if sent and all(torch.equal(received[n], value) for n, value in sent.items()):
        return own, beside
    number = float(received[SITES])

    def without(mean: Tensor, mine: Tensor) -> Tensor:
        return ((number * mean.double() - mine.double()) / (number - 1)).to(mean.dtype)

    return own, map_tensors(without, select(received, start), own)


def of_others(name: str) -> str:
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
