"""Stage 3, tuners. In: a frozen backbone. Out: a scale and a shift after each of its linear maps and norms, g y + b.

SSF: Lian, Zhou, Feng, Wang, "Scaling & Shifting Your Features", NeurIPS 2022, arXiv 2210.08516. As in the
authors' ViT it acts after the patch embedding's projection, every norm, qkv, proj, fc1 and fc2.

    gamma -> scale [out]      beta -> shift [out], on a fused qkv [2 d]: of queries, then of values

Keys get no shift: in plain attention it adds a constant to all scores of a query, which a softmax does not see, so it
is held and counted (`Attached.inert`), not sent; EVA's keys have no bias. Nor does a layer without a bias get one: it
could not be folded. Several parts add up their changes: g = 1 + sum (g_i - 1), b = sum b_i.

Leaves the site: scales and shifts of the shared parts. Stays: personal parts. Kept between rounds: nothing else.
Departures: it starts as the identity; the authors draw gamma from N(1, 0.02), beta from N(0, 0.02): `std = 0.02`.
The identity that pins it: gamma = 1, beta = 0 is the frozen backbone; merged equals unmerged in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from consilium import registry, seeds
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, ModuleRole, Part, Selector, Spec, Specs, Tag
from consilium.tensors import Tensors
from consilium.tuners import base
from consilium.tuners.scaling import (
    Pieces,
    bias_apart,
    combined,
    fold,
    over_channels,
    require_sum,
    rescaled,
)

RATES = {"ssf": 6e-3}  # AdamW: docs/results/tuners.md
Target = Literal["patch_embed", "norm", "qkv", "proj", "fc1", "fc2"]


class SsfOptions(registry.Options):
    """Options of `[[tuner]] name = "ssf"`."""

    targets: Annotated[tuple[Target, ...], Field(min_length=1)] | None = None  # None: all
    blocks: tuple[int, ...] | None = None  # None: all, and what lies outside of blocks
    std: float = Field(default=0.0, ge=0)  # of the start around the identity; 0.02 as published


class ScaleAndShift(nn.Module):
    """One part: scale [n] and shift [m <= n], empty until variables take their place."""

    def __init__(self, weight: Tensor, shifted: Pieces) -> None:
        super().__init__()
        size = len(weight) // len(shifted) * sum(shifted)
        self.scale = nn.Parameter(weight.new_ones(len(weight)), requires_grad=False)
        if size:
            self.shift = nn.Parameter(weight.new_zeros(size), requires_grad=False)


class SsfAdapter(base.Adapter):
    """All parts after one module, called by a hook on it, so that the module keeps its name and its weights."""

    def __init__(self, module: nn.Module, parent: nn.Module, parts: Sequence[Part], shifted: Pieces) -> None:
        super().__init__()
        weight = cast(Tensor, module.weight)
        self.shifted = shifted
        self.beside = (parent,)  # in a tuple, since what is above must not become a child
        self.behind = max(weight.ndim - 2, 0)  # axes of an image behind the channels of a convolution
        for part in parts:
            self.add_module(part.name, ScaleAndShift(weight, shifted))
        self.handle = module.register_forward_hook(lambda module, _, output: module.ssf(output))

    def total(self, values: Tensors) -> tuple[Tensor, Tensor]:
        """Scale [n] and shift [n] of all parts together; `values` by their names below this module."""
        scale = combined([value for name, value in values.items() if name.endswith("scale")], (True,), 1)
        shifts = [value for name, value in values.items() if name.endswith("shift")]
        return scale, combined(shifts, self.shifted, 0) if shifts else torch.zeros_like(scale)

    def forward(self, output: Tensor) -> Tensor:
        """g y + b over the channels of y."""
        scale, shift = self.total(dict(self.named_parameters(remove_duplicate=False)))
        apart = bias_apart(self.beside[0]) if len(self.shifted) == 3 else None
        scale, shift = (over_channels(each, output, self.behind) for each in (scale, shift))
        return rescaled(output, scale, shift, apart)


@registry.register(
    "tuners",
    "ssf",
    options=SsfOptions,
    summary="a scale and a shift after linear layers and norms",
    source="Lian et al. 2022, arXiv 2210.08516",
    facts={
        "start": "identity",
        "merge": "exact",
        "formula": "g * (W x + b0) + b",
        "count": "22 d per block, 4 d beside; 205,824 for ViT-B, of which the 9,216 of keys' shifts are not exchanged",
    },
)
class Ssf:
    """Adds one scale and shift per part after every target."""

    precedence: ClassVar[int] = 4  # the whole layer, rescaled or not
    stackable: ClassVar[bool] = True

    def __init__(self, options: SsfOptions) -> None:
        self.options = options

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Hang scales and shifts after every target. ConfigError for a target or block that is not there, a router."""
        require_sum("ssf", combination)
        specs: dict[str, Spec] = {}
        inert = 0
        for name, place in self._targets(backbone).items():
            module, parent = backbone.module.get_submodule(name), _parent(backbone, name)
            if hasattr(module, "ssf"):
                raise ConfigError("this module has a scale and shift already", where=name)
            shifted, held = _shifted(backbone, name, place)
            inert += held * len(parts)
            module.ssf = SsfAdapter(module, parent, parts, shifted)
            for variable, value in module.ssf.named_parameters():
                tag = Tag(name, "ssf", variable.partition(".")[0], place.block)
                specs[f"{name}.ssf.{variable}"] = Spec(tuple(value.shape), tag)
        return Attached(specs, lambda seed: {n: self._start(n, s, seed) for n, s in specs.items()}, RATES, inert)

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """g W and g b0 + b, formed in float64."""
        for name in self._targets(backbone):
            module = backbone.module.get_submodule(name)
            adapter = cast(SsfAdapter, module.ssf)
            device = cast(Tensor, module.weight).device
            names = [own for own, _ in adapter.named_parameters()]
            fold(backbone, name, *adapter.total({n: variables[f"{name}.ssf.{n}"].to(device).double() for n in names}))
            adapter.handle.remove()
            del module.ssf

    def _targets(self, backbone: Backbone) -> dict[str, ModuleRole]:
        chosen = base.blocks_or_all(backbone, self.options.blocks, "tuner.blocks")
        outside = self.options.blocks is None
        inside = {
            n: place for n, place in _published(backbone) if (outside if place.block is None else place.block in chosen)
        }
        there = {_target(place) for place in inside.values()}
        if unmatched := sorted(set(self.options.targets or ()) - there):
            raise ConfigError(
                "no module has this role", where="tuner.targets", allowed=sorted(there), received=unmatched
            )
        return {name: place for name, place in inside.items() if _target(place) in (self.options.targets or there)}

    def _start(self, name: str, spec: Spec, seed: int) -> Tensor:
        neutral = torch.full([size or 0 for size in spec.shape], float(name.endswith("scale")))
        noise = torch.randn(neutral.shape, generator=seeds.generator(seed, purpose=f"init/{name}"))
        return neutral + self.options.std * noise


def _parent(backbone: Backbone, name: str) -> nn.Module:
    return backbone.module.get_submodule(name.rpartition(".")[0])


def _published(backbone: Backbone) -> Iterator[tuple[str, ModuleRole]]:
    """What is in blocks, the patch embedding's projection, norms beside the blocks; no norm of a convolutional stem."""
    for name, place in backbone.modules.items():
        if place.block is not None or place.role == "patch_embed" or "." not in name:
            yield name, place


def _target(place: ModuleRole) -> str:
    return "norm" if place.role.startswith("norm") else place.role


def _shifted(backbone: Backbone, name: str, place: ModuleRole) -> tuple[Pieces, int]:
    """Which pieces of a module's output are shifted, and how many scalars that is short of the published shift."""
    module, attention = backbone.module.get_submodule(name), _parent(backbone, name)
    has_bias = getattr(module, "bias", None) is not None
    unseen = has_bias and place.role == "qkv" and base.ignores_a_shift_of_keys(backbone, attention)
    size = len(cast(Tensor, module.weight))
    if name.endswith(".qkv") and (unseen or bias_apart(attention) is not None):
        return (True, False, True), size // 3 if unseen else 0
    if unseen and name.endswith(".k_proj"):
        return (False,), size
    return (has_bias,), 0
