"""Stage 3, tuners. In: a linear layer, its factors. Out: what LoRA needs beside its formula: ranks, start, DoRA's norm.

DoRA: Liu et al., arXiv 2402.09353, eq. 5: W' = m (W + s B A) / ||W + s B A||, norms of rows of timm's weights [out, in]
(outputs, the paper's columns), taken as a constant for gradients as in section 4.3. Products act inside the norm, so
what an aggregation says of them holds for the direction; magnitudes get a mean of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from consilium import seeds
from consilium.errors import ConfigError
from consilium.protocols import Backbone, Combination, Factor, Part, Spec, Specs, Tag

NO_MERGE = "lora: a router cannot be folded into weights"


class Folding(NamedTuple):
    """W + scale * b a; a [r, in], b [out, r]; with a magnitude [out] its rows get these lengths."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None


def folded(weight: Tensor, found: Folding) -> Tensor:
    """The weight [out, in] that acts like the layer and its factors, float64."""
    a, b = found.a.to(weight.device).double(), found.b.to(weight.device).double()
    total = weight.double() + found.scale * b @ a
    if found.magnitude is None:
        return total
    ratio = found.magnitude.to(weight.device).double() / norm(weight.double(), a, b, found.scale)
    return total * ratio[:, None]


def norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||W + s B A|| of every row [out], a constant for gradients and never in half precision; 1 for a row of zeros.

    The sum is formed: next to a forward pass of many tokens this is cheap, and with b = 0 it is W to the last bit.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        lengths = (weight + scale * b.to(weight.dtype) @ a.to(weight.dtype)).norm(dim=1)
        return torch.where(lengths > 0, lengths, 1.0)


def rescaled(output: Tensor, bias: Tensor | None, ratio: Tensor) -> Tensor:
    """ratio * (output - bias) + bias, exact for ratio = 1; output [..., out], ratio [out]."""
    plain = output if bias is None else output - bias
    return (output + (ratio - 1) * plain).to(output.dtype)


def initial(specs: Specs, kind: str, seed: int) -> dict[str, Tensor]:
    """a: Kaiming uniform, or orthonormal rows; b and the router: zero, so that the start is the frozen backbone."""
    return {name: _start(name, spec, kind, seed) for name, spec in specs.items()}


def _start(name: str, spec: Spec, kind: str, seed: int) -> Tensor:
    value = torch.zeros([size or 0 for size in spec.shape])
    if spec.tag.role != "lora_a":
        return value
    draw = seeds.generator(seed, purpose=f"init/{name}")
    if kind == "kaiming":
        return nn.init.kaiming_uniform_(value, a=5**0.5, generator=draw)
    return nn.init.orthogonal_(value.double(), generator=draw).float()


def by_layer(names: Iterable[str], rank: int, ranks: Mapping[str, int], parts: Sequence[Part]) -> dict[str, int]:
    """The rank of every layer: of the longest key of `ranks` that is its name or the front of it, else `rank`.

    ConfigError for a key that decides nothing, and where sites have ranks of their own.
    """
    fits = {name: [key for key in ranks if f"{name}.".startswith(f"{key}.")] for name in names}
    chosen = {name: max(keys, key=len) for name, keys in fits.items() if keys}
    if idle := sorted(ranks.keys() - set(chosen.values())):
        what, allowed = "no layer takes its rank from this key", f"fronts of whole names, such as {_few(fits)}"
        raise ConfigError(what, where="tuner.ranks", allowed=allowed, received=idle)
    if ranks and any(part.ranks for part in parts):
        raise ConfigError(
            "ranks per layer and ranks per site do not go together",
            where="tuner.ranks",
            received={site: own for part in parts for site, own in part.ranks.items()},
            remedy="leave one of them out",
        )
    return {name: ranks[chosen[name]] if name in chosen else rank for name in fits}


def _few(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:2])


def room(linear: nn.Linear, name: str, rank: int, part: Part) -> int:
    """The part's rank: room for those of all sites, since smaller factors are used as they come."""
    own, limit = part.rank or rank, min(linear.in_features, linear.out_features)
    if own > limit:
        raise ConfigError("the rank exceeds the layer", where=f"lora on {name}", allowed=f"<= {limit}", received=own)
    if above := {site: found for site, found in part.ranks.items() if found > own}:
        remedy = "make the tuner's rank the largest of all sites"
        raise ConfigError(
            "a site's rank exceeds the tuner's", where="strategy.ranks", allowed=own, received=above, remedy=remedy
        )
    return own


def require_sum(dora: bool, combination: Combination) -> None:
    """ConfigError for DoRA under a router: a norm of weights that differ from token to token has no fixed value."""
    if dora and combination != "sum":
        raise ConfigError(
            "DoRA takes one norm of all parts, which a router mixes anew for every token",
            where="tuner.dora",
            allowed="false, or a strategy that sums its parts",
            received=True,
        )


def free_linear(backbone: Backbone, name: str) -> nn.Linear:
    """The layer of this name; ConfigError where it has factors already."""
    linear = cast(nn.Linear, backbone.module.get_submodule(name))
    if hasattr(linear, "lora"):
        raise ConfigError("this layer has a LoRA already", where=name, remedy="give each [[tuner]] its own targets")
    return linear


def side(tag: Tag) -> Factor | None:
    """Which side of a product that is added to the layer's weight; parts that a router mixes are added to nothing."""
    sides: Mapping[str, Literal["left", "right"]] = {"lora_b": "left", "lora_a": "right"}
    return Factor((f"{tag.module}.weight",), sides[tag.role]) if tag.role in sides else None


def role_and_part(variable: str, parts: Sequence[Part]) -> tuple[str, str]:
    """Role and part of an adapter's own variable; routers are personal, a magnitude belongs to the shared part."""
    if variable == "router":
        return "router", next((part.name for part in parts if part.personal), "personal")
    if variable == "magnitude":
        return "magnitude", next((part.name for part in parts if not part.personal), parts[0].name)
    part, _, factor = variable.partition(".")
    return f"lora_{factor}", part
