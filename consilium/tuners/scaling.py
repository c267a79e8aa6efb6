"""Stage 3, tuners. In: a layer's output and vectors. Out: the rescaled output, or the layer that gives it at once.

What SSF and IA3 share: a sum of several parts' changes, and the qkv layers whose bias lies outside of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from consilium.errors import ConfigError
from consilium.protocols import Backbone, Combination
from consilium.tuners import base
from consilium.tuners.stacking import spread

Pieces = tuple[bool, ...]  # which of the equal pieces of an output (q, k, v of a fused layer, else one) are tuned


def require_sum(tuner: str, combination: Combination) -> None:
    """ConfigError for a router: there is one rescaling of a layer, and parts change it together."""
    if combination != "sum":
        raise ConfigError(
            f"parts of {tuner!r} cannot be routed token by token",
            where="tuner.name",
            allowed="a tuner with a router, such as lora",
            received=tuner,
        )


def combined(vectors: Sequence[Tensor], chosen: Pieces, neutral: float) -> Tensor:
    """The sum of the parts' changes of a neutral value; [.., chosen pieces] each -> [.., all pieces], else neutral."""
    total = torch.stack(list(vectors)).sum(0) - neutral * (len(vectors) - 1)
    pieces = iter(total.chunk(sum(chosen), dim=-1))
    rest = torch.full_like(total[..., : total.shape[-1] // sum(chosen)], neutral)
    return torch.cat([next(pieces) if each else rest for each in chosen], dim=-1)


def over_channels(vector: Tensor, output: Tensor, behind: int = 0) -> Tensor:
    """A vector [n], or one for each of several stacked sites [S, n], shaped to act on output [B, ..., n, (behind)]."""
    if vector.ndim == 1:
        return vector.view(-1, *(1,) * behind)
    between = (1,) * (output.ndim - 2 - behind)
    return spread(vector, 1, len(output)).view(len(output), *between, -1, *(1,) * behind)


def bias_apart(attention: nn.Module) -> Tensor | None:
    """The bias [3 d] of a fused qkv that EVA and BEiT add behind the layer, keys having none; else None."""
    q, v = getattr(attention, "q_bias", None), getattr(attention, "v_bias", None)
    return None if q is None or v is None else torch.cat([q, torch.zeros_like(q), v])


def rescaled(output: Tensor, scale: Tensor, shift: Tensor, apart: Tensor | None) -> Tensor:
    """scale * y + shift; where a bias will be added to y, so that it is scaled too."""
    shift = shift if apart is None else shift + (scale - 1) * apart
    return (output * scale + shift).to(output.dtype)


def fold(backbone: Backbone, name: str, scale: Tensor, shift: Tensor) -> None:
    """scale * (W x + b) + shift as one layer; scale and shift are float64 [out], the shift zero where no bias is."""
    module, parent = backbone.module.get_submodule(name), name.rpartition(".")[0]
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))
    values = {f"{name}.weight": weight.double() * scale.view(-1, *(1,) * (weight.ndim - 1))}
    if bias is not None:
        values[f"{name}.bias"] = scale * bias.double() + shift
    elif name.endswith(".qkv") and (apart := bias_apart(backbone.module.get_submodule(parent))) is not None:
        q, _, v = (scale * apart.double() + shift).chunk(3)
        values |= {f"{parent}.q_bias": q, f"{parent}.v_bias": v}
    base.replace(backbone.module, values)
