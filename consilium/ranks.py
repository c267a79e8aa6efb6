"""Common: factors at the ranks of single sites. In: tensors and specs at the tuner's rank. Out: the same at a site's.

A site of rank r has the first r columns of left factors and the first r rows of right ones. The scale stays the tuner's
at every rank: what is cut off is all that a smaller site lacks, and zeros in its place change nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from consilium.errors import ConfigError
from consilium.protocols import Part, ServerState, Spec, Specs, Strategy
from consilium.tensors import Tensors

RANK = "rank/"  # in front of a site's name in the server's memory: the rank to which it has come down by itself


def at(specs: Specs, parts: Iterable[Part], site: str) -> Specs:
    """What the site has in place of these variables; the very same where it has the tuner's rank."""
    own = {part.name: part.ranks[site] for part in parts if site in part.ranks}
    if not own:
        return specs
    return {n: resized(s, own[s.tag.part]) if s.factor and s.tag.part in own else s for n, s in specs.items()}


def dimension(spec: Spec) -> int:
    """Which dimension of a factor is its rank."""
    return 1 if spec.factor is not None and spec.factor.side == "left" else 0


def resized(spec: Spec, rank: int) -> Spec:
    """The same factor of another rank."""
    return replace(spec, shape=(spec.shape[0], rank) if dimension(spec) else (rank, *spec.shape[1:]))


def shrinking(specs: Specs) -> dict[str, Spec]:
    """The same with factors that may come at a smaller rank, one for all of them. ConfigError where theirs differ."""
    found = {n: replace(spec, shrinks=dimension(spec)) if spec.factor else spec for n, spec in specs.items()}
    sizes = sorted({spec.shape[spec.shrinks] or 0 for spec in found.values() if spec.shrinks is not None})
    if len(sizes) > 1:
        what, remedy = "a site that prunes has one rank for all layers", "gamma = 1, or leave [[tuner]] ranks out"
        raise ConfigError(what, where="strategy.gamma", received=f"ranks {sizes}", remedy=remedy)
    return found


def rank_of(tensors: Tensors, specs: Specs) -> int | None:
    """Of the factors among these tensors; None where there are none."""
    sizes = [value.shape[dimension(specs[n])] for n, value in tensors.items() if n in specs and specs[n].factor]
    return min(sizes, default=None)


def sent(strategy: Strategy, server: ServerState, specs: Specs, site: str) -> Tensors:
    """All that a site should know now, at its own rank, or at the one to which it has come down."""
    found, own, limit = (
        strategy.send(server, site),
        at(specs, strategy.declares.parts, site),
        server.memory.get(f"{RANK}{site}"),
    )
    return found if own is specs and limit is None else cut(found, own, None if limit is None else int(limit))


def cut(tensors: Tensors, specs: Specs, limit: int | None = None) -> dict[str, Tensor]:
    """Factors as long as `specs` say and no longer than `limit`; what is as it should be is the same tensor."""
    return {name: _shortened(value, specs.get(name), limit) for name, value in tensors.items()}


def _shortened(value: Tensor, spec: Spec | None, limit: int | None) -> Tensor:
    if spec is None or spec.factor is None:
        return value
    along = dimension(spec)
    rank = min(value.shape[along], spec.shape[along] or 0, limit or value.shape[along])
    return value if rank == value.shape[along] else value.narrow(along, 0, rank).contiguous()


def filled(value: Tensor, like: Tensor) -> Tensor:
    """A factor with zeros below, or to the right, up to the size of `like`."""
    if value.shape == like.shape:
        return value
    return F.pad(value, (0, like.shape[1] - value.shape[1], 0, like.shape[0] - value.shape[0]))


def check_names(parts: Iterable[Part], sites: Collection[str]) -> None:
    """ConfigError for a rank of a site that there is not."""
    if unknown := sorted({site for part in parts for site in part.ranks} - set(sites)):
        allowed = ", ".join(sorted(sites)[:8]) + (" ..." if len(sites) > 8 else "")
        what = "ranks for sites that there are not"
        raise ConfigError(what, where="strategy.ranks", allowed=allowed, received=unknown)
