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
from consilium.protocols import Part, Spec, Specs
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
