"""Stage 3, tuners. In: a frozen backbone. Out: its biases as variables.

BitFit: Ben Zaken, Ravfogel, Goldberg, ACL 2022, arXiv 2106.10199; for ViTs the `tinytl-bias` of the VPT study.

    b -> every parameter whose name ends in bias, those of norms and of the patch embedding too
    b_q, b_v of a fused qkv bias -> bitfit.q, bitfit.v [d] beside the layer, where its key part is without effect

In plain attention b_k adds q b_k to all scores of a query, and a softmax does not see a constant. So b_k is held and
counted (`Attached.inert`), not sent. Where keys are normalised or rotated it matters, and the whole bias travels under
its own name.

Leaves the site: the biases, without those of keys that change nothing. Stays, and is kept between rounds: nothing.
Departures: all tensors have the role bias, those of norms and attention too.
The identity that pins it: at the start it is the frozen backbone, bit for bit; a step equals a step of plain autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from consilium import registry, tensors
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, Part, Selector, Specs
from consilium.tensors import Tensors
from consilium.tuners import base

RATE = 6e-3  # AdamW: docs/results/tuners.md


class BitFitOptions(registry.Options):
    """None."""


class QueryValueBias(base.Adapter):
    """Puts q and v in the place of two thirds of a fused qkv bias, by a hook, so that the layer keeps its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        q, _, v = linear.bias.detach().chunk(3)
        self.q = nn.Parameter(q.clone(), requires_grad=False)
        self.v = nn.Parameter(v.clone(), requires_grad=False)
        self.handle = linear.register_forward_hook(lambda own, _, output: own.bitfit(own.bias, output))

    def forward(self, bias: Tensor, output: Tensor) -> Tensor:
        """W x + b [..., 3 d] with q and v for their parts of b [3 d]."""
        q, k, v = bias.chunk(3)
        return output + torch.cat([self.q - q, torch.zeros_like(k), self.v - v]).to(output.dtype)


@registry.register(
    "tuners",
    "bitfit",
    options=BitFitOptions,
    summary="all biases",
    source="Ben Zaken et al. 2022, arXiv 2106.10199",
    facts={
        "start": "identity",
        "merge": "exact",
        "formula": "W x + b",
        "count": "11 d per block, 2 d beside; 102,912 for ViT-B, of which the 9,216 of keys are not exchanged",
    },
)
class BitFit:
    """Trains the biases of the backbone."""

    precedence: ClassVar[int] = 2  # DoRA takes the layer's own bias off; what rescales the layer rescales the bias too

    def __init__(self, options: BitFitOptions) -> None:
        self.options = options

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Name the biases, and hang two beside every fused qkv whose keys' bias is without effect."""
        part = base.only_part("bitfit", parts, combination)
        added: dict[str, Tensor] = {}
        for name, linear in _split(backbone).items():
            if hasattr(linear, "bitfit"):
                raise ConfigError("this layer's bias is tuned already", where=name)
            linear.bitfit = QueryValueBias(linear)
            added |= {f"{name}.bitfit.{each}": value for each, value in linear.bitfit.named_parameters()}
        found = base.own_tensors(backbone, {**_whole(backbone), **added}, part, RATE, role="bias")
        taken = frozenset(f"{name}.bias" for name in _split(backbone))
        return replace(found, inert=tensors.num_elements(added) // 2, stands_for=taken)  # a key's part is as long as q

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """Write the biases into the backbone, q and v around the held part of the keys."""
        base.replace(backbone.module, tensors.select(variables, _whole(backbone)))
        for name, linear in _split(backbone).items():
            _, k, _ = linear.bias.chunk(3)
            q, v = (variables[f"{name}.bitfit.{each}"].to(k.device) for each in "qv")
            base.replace(backbone.module, {f"{name}.bias": torch.cat([q, k, v])})
            cast(QueryValueBias, linear.bitfit).handle.remove()
            del linear.bitfit


def _whole(backbone: Backbone) -> dict[str, nn.Parameter]:
    """The biases that travel under their own names."""
    parted = {f"{name}.bias" for name in _split(backbone)}
    own = base.parameters(backbone.module)
    return {name: value for name, value in own.items() if name.endswith("bias") and name not in parted}


def _split(backbone: Backbone) -> dict[str, nn.Linear]:
    """The fused qkv layers whose keys' bias is without effect, by name."""
    blind = [(n, each) for n, each in backbone.module.named_modules() if base.ignores_a_shift_of_keys(backbone, each)]
    layers = {f"{name}.qkv": cast(nn.Linear | None, each.qkv) for name, each in blind}
    return {name: linear for name, linear in layers.items() if linear is not None and linear.bias is not None}
