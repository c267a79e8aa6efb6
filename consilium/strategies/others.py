"""Stage 8, strategies: the mean of all other sites' adapters, from one message for all.

In: changes of sites' factors. Out: the next mean, from which each site takes itself out.

FedALT's rule (AAAI 2026), for `fedalt` and for server = "leave_one_out" of `dual_lora` and `fedopal`: a site works with
the unweighted mean of the other sites' newest factors, others = (K mean - own) / (K - 1).
Leaves the site: what its factors have changed by, everything else as in FedAvg. Stays, and is kept: its factors (the
sum of what was sent), what was sent last. The server needs sums alone and sends all sites the same.
A site that has not answered yet counts with the common start, from which all factors begin (sent once).
Identity: others = the mean of the other sites' newest factors; with one site this is undefined, and refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilium.errors import ConfigError
from consilium.protocols import Personal, ServerState, Specs, Update
from consilium.strategies.fedavg import Averaging
from consilium.strategies.federated_lora import LEFT, RIGHT
from consilium.tensors import Tensors, map_tensors, select, under, weighted_mean, within

START, OWN, SENT, SITES = "start", "own", "sent", "sites/number"
FACTORS = LEFT | RIGHT


@dataclass(frozen=True)
class Others(Averaging):
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
            raise ConfigError("the mean of the other sites needs other sites", where="strategy", received=sites)
        start = {name: initial[name] for name in self.shared(specs)}
        factors = {name: initial[name] for name in start if specs[name].tag.role in FACTORS}
        number = torch.tensor([float(len(sites))], dtype=torch.float64)
        return ServerState(0, tuple(sites), {**start, **under(START, factors), SITES: number})

    def send(self, server: ServerState, site: str) -> Tensors:
        """The same to all. A site that took no part gets the mean with the common start as its own, one of K + 1: what
        is left without it is the mean of the K."""
        if site in server.sites:
            return server.shared
        number, start = len(server.sites), within(START, server.shared)

        def joined(mean: Tensor, mine: Tensor) -> Tensor:
            return ((number * mean.double() + mine.double()) / (number + 1)).to(mean.dtype)

        means = map_tensors(joined, select(server.shared, start), start)
        return {**server.shared, **means, SITES: torch.tensor([number + 1.0], dtype=torch.float64)}

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


def own_of(received: Tensors, personal: Personal) -> dict[str, Tensor]:
    """A site's newest factors, under the names that travel: the common start before its first update."""
    return within(OWN, personal.tensors) or within(START, received)


def others_of(received: Tensors, own: Tensors) -> dict[str, Tensor]:
    """The mean of the other sites' factors, under the names that travel."""
    number = float(received[SITES])

    def without(mean: Tensor, mine: Tensor) -> Tensor:
        return ((number * mean.double() - mine.double()) / (number - 1)).to(mean.dtype)

    return map_tensors(without, select(received, own), own)


def before_aggregation(received: Tensors, personal: Personal) -> bool:
    """Whether the site's own update lies in the place of the mean."""
    sent = within(SENT, personal.tensors)
    return bool(sent) and all(torch.equal(received[n], value) for n, value in sent.items())
