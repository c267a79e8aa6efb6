"""Stage 3, tuners. In: a frozen backbone. Out: bottlenecks at the attention and MLP of each block.

houlsby: Houlsby et al., ICML 2019, arXiv 1902.00751, after attention and after the MLP; pfeiffer: Pfeiffer et al., EACL
2021, arXiv 2005.00247, after the MLP; parallel: Chen et al., "AdaptFormer", NeurIPS 2022, arXiv 2205.13535, beside
the MLP.

    houlsby, pfeiffer: h + s (W_up gelu(W_down h + b_down) + b_up), h the output of attention or MLP before layer scale,
                       drop path and skip connection; s = 1
    parallel: MLP(x) + s (W_up relu(W_down x + b_down) + b_up), x what enters the MLP, in a pre-norm block the normed
              stream; s = 0.1

    W_down -> down.weight [width, d]    b_down -> down.bias    W_up -> up.weight [d, width]    b_up -> up.bias

Several parts are summed: each sees the same h. Leaves the site: all four tensors of the shared parts. Stays: personal
parts. Kept between rounds: nothing else.
Departures: W_up = 0 at the start for all kinds, as in AdaptFormer, where Houlsby et al. draw both matrices at random
with a small variance; gelu for both sequential kinds; AdaptFormer's code feeds the stream before the block's norm, and
drops 0.1 of the hidden activations: `dropout = 0.1`.
The identity that pins it: W_up = 0, b_up = 0 is the frozen backbone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from consilium import registry, seeds
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, Part, Selector, Spec, Specs, Tag
from consilium.tensors import Tensors
from consilium.tuners import base
from consilium.tuners.scaling import require_sum
from consilium.tuners.stacking import affine

RATES = {"adapter": 1e-2}  # AdamW: docs/results/tuners.md
REFUSED = "adapter: its activation is no linear map and cannot be folded into weights"


class AdapterOptions(registry.Options):
    """Options of `[[tuner]] name = "adapter"`."""

    kind: Literal["pfeiffer", "houlsby", "parallel"] = "pfeiffer"
    width: int = Field(default=48, ge=1)  # a sixteenth of ViT-B's 768 channels
    scale: float | None = Field(default=None, gt=0)  # None: 0.1 for parallel, else 1
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of the hidden activations, in training only
    down_std: float | None = Field(default=None, ge=0)  # W_down from N(0, std^2); None: Kaiming uniform
    blocks: tuple[int, ...] | None = None  # None: all

    @field_validator("down_std")
    @classmethod
    def _not_both_zero(cls, std: float | None) -> float | None:
        if std == 0:
            raise ValueError("with both matrices zero an adapter can never train: only up.bias would ever move")
        return std


class Affine(nn.Module):
    """W x + b, empty until variables take the place of weight [out, in] and bias [out]."""

    def __init__(self, like: Tensor, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(num_out, num_in), requires_grad=False)
        self.bias = nn.Parameter(like.new_zeros(num_out), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return affine(x, self.weight, self.bias)


class Bottleneck(nn.Module):
    """One part: W_up act(W_down x + b_down) + b_up."""

    def __init__(self, like: Tensor, options: AdapterOptions) -> None:
        super().__init__()
        self.act = F.relu if options.kind == "parallel" else F.gelu
        self.dropout = options.dropout
        self.down = Affine(like, len(like), options.width)
        self.up = Affine(like, options.width, len(like))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        # The backbone is always in eval mode: dropout belongs to training, which is where gradients are recorded.
        hidden = F.dropout(self.act(self.down(x)), self.dropout, training=torch.is_grad_enabled())
        up: Tensor = self.up(hidden)
        return up


class BottleneckAdapter(base.Adapter):
    """All parts at one sub-layer, called by a hook on it."""

    def __init__(self, sublayer: nn.Module, like: Tensor, options: AdapterOptions, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parallel, self.parts = options.kind == "parallel", tuple(part.name for part in parts)
        self.scale = (0.1 if self.parallel else 1.0) if options.scale is None else options.scale
        for part in self.parts:
            self.add_module(part, Bottleneck(like, options))
        self.handle = sublayer.register_forward_hook(lambda module, inputs, output: module.adapter(inputs[0], output))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """h + s sum_i bottleneck_i(h), or of x beside the sub-layer."""
        total = h
        for part in self.parts:
            total = torch.add(total, self.get_submodule(part)(x if self.parallel else h), alpha=self.scale)
        return total


@registry.register(
    "tuners",
    "adapter",
    options=AdapterOptions,
    summary="bottlenecks at attention and MLP",
    source="Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2021, 2005.00247; Chen et al. 2022, 2205.13535",
    facts={
        "start": "identity",
        "merge": "refused",
        "merge_refused": REFUSED,
        "formula": "h + s W_up gelu(W_down h)",
        "count": "2 d b + b + d per bottleneck; 1,779,840 for ViT-B at width b = 96, twice as many for houlsby",
    },
)
class AdapterTuner:
    """Adds one bottleneck per part at the MLPs, and the attentions too where they are Houlsby's."""

    def __init__(self, options: AdapterOptions) -> None:
        self.options, self.stackable = options, not options.dropout

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Hang bottlenecks. ConfigError for a block that is not there, a second adapter in one place, a router."""
        require_sum("adapter", combination)
        specs: dict[str, Spec] = {}
        for name, block in self._places(backbone).items():
            sublayer = backbone.module.get_submodule(name)
            if hasattr(sublayer, "adapter"):
                raise ConfigError("there is an adapter here already", where=name)
            like = backbone.module.get_parameter(f"{name}.{'fc2' if name.endswith('mlp') else 'proj'}.weight")
            sublayer.adapter = BottleneckAdapter(sublayer, like, self.options, parts)
            for variable, value in sublayer.adapter.named_parameters():
                tag = Tag(name, "adapter", variable.partition(".")[0], block)
                specs[f"{name}.adapter.{variable}"] = Spec(tuple(value.shape), tag)
        return Attached(
            specs, lambda seed: {n: self._start(n, s, seed) for n, s in specs.items()}, RATES, merge_refused=REFUSED
        )

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:  # noqa: ARG002
        """Refused."""
        raise ConfigError(REFUSED, where="tuner.adapter", remedy="use `consilium predict`, or keep the adapters apart")

    def _places(self, backbone: Backbone) -> dict[str, int]:
        """Sub-layer -> its block."""
        chosen = base.blocks_or_all(backbone, self.options.blocks, "tuner.blocks")
        last = ("fc2", "proj") if self.options.kind == "houlsby" else ("fc2",)
        found = {}
        for name, place in backbone.modules.items():
            if place.block is not None and place.block in chosen and place.role in last:
                found[name.rpartition(".")[0]] = place.block
        return found

    def _start(self, name: str, spec: Spec, seed: int) -> Tensor:
        """All zero but W_down."""
        value = torch.zeros([size or 0 for size in spec.shape])
        draw = seeds.generator(seed, purpose=f"init/{name}")
        if not name.endswith("down.weight"):
            return value
        if self.options.down_std is None:
            return nn.init.kaiming_uniform_(value, a=5**0.5, generator=draw)
        return nn.init.normal_(value, std=self.options.down_std, generator=draw)
