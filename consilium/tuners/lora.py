"""Stage 3, tuners. In: a frozen backbone. Out: two small factors beside each chosen linear layer, W x + s B A x.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, eq. 3;
rank-stabilised scale: Kalajdzievski, arXiv 2312.03732; token router over several parts: softmax(R x), as in FedALT.

    A -> a [rank, in]      B -> b [out, rank]      alpha / r -> scale      R -> router [parts, in]

Leaves the site: a and b of the shared parts. Stays: personal parts and the router. Kept between rounds: nothing else.
Departures: on a fused qkv one A serves q, k and v (36,864 r for ViT-B, as many as for q and v apart); `scale` follows
the tuner's own rank, so that factors cut or padded with zeros for another site's rank keep their meaning.
The identity that pins it: b = 0 is the frozen backbone; merged equals unmerged; parity with the `peft` library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from consilium import registry, seeds
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, ModuleRole, Part, Selector, Spec, Specs, Tag
from consilium.tensors import Tensors
from consilium.tuners import base

RATES = {"lora_a": 2e-3, "lora_b": 2e-3, "router": 2e-3}  # AdamW


class LoraOptions(registry.Options):
    """Options of `[[tuner]] name = "lora"`."""

    rank: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0)  # None: the rank, so that the scale is 1
    rank_stabilised: bool = False  # scale alpha / sqrt(rank) in place of alpha / rank; needs alpha, whatever the rank
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of the adapter's input, in training only
    targets: Annotated[tuple[Literal["qkv", "proj", "fc1", "fc2"], ...], Field(min_length=1)] = ("qkv",)
    blocks: tuple[int, ...] | None = None  # None: all

    @model_validator(mode="after")
    def _fixed_alpha(self) -> LoraOptions:
        if self.rank_stabilised and self.alpha is None:  # the rank for alpha would make the scale grow with the rank
            raise ValueError("rank_stabilised needs alpha: the scale is alpha / sqrt(rank)")
        return self

    @property
    def scale(self) -> float:
        """The factor s in W x + s B A x."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / self.rank**0.5 if self.rank_stabilised else alpha / self.rank


class Factors(nn.Module):
    """One part: a [rank, in] and b [out, rank], empty until variables take their place."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(linear.weight.new_zeros(rank, linear.in_features), requires_grad=False)
        self.b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """B A x."""
        return F.linear(F.linear(x, self.a), self.b)


class LoraAdapter(base.Adapter):
    """All parts beside one linear layer, called by a hook on it, so that the layer keeps its name and its weights."""

    router: nn.Parameter | None

    def __init__(self, linear: nn.Linear, options: LoraOptions, ranks: Mapping[str, int], routed: bool) -> None:
        super().__init__()
        self.scale, self.dropout, self.parts = options.scale, options.dropout, tuple(ranks)
        for part, rank in ranks.items():
            self.add_module(part, Factors(linear, rank))
        router = nn.Parameter(linear.weight.new_zeros(len(ranks), linear.in_features), requires_grad=False)
        self.register_parameter("router", router if routed else None)
        self.handle = linear.register_forward_hook(lambda module, inputs, output: module.lora(inputs[0], output))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """W x + s sum_i share_i B_i A_i x; shares are 1 without a router."""
        # The backbone is always in eval mode: dropout belongs to training, which is where gradients are recorded.
        dropped = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        shares = None if self.router is None else F.linear(x, self.router).softmax(-1)
        for index, part in enumerate(self.parts):
            update = self.get_submodule(part)(dropped)
            update = update if shares is None else update * shares[..., index : index + 1].to(update.dtype)
            output = torch.add(output, update, alpha=self.scale)
        return output


@registry.register(
    "tuners",
    "lora",
    options=LoraOptions,
    summary="low-rank factors beside linear layers",
    source="Hu et al. 2022, arXiv 2106.09685",
    facts={
        "start": "identity",
        "formula": "W x + (alpha / r) B A x",
        "count": "r (in + out) per layer; 36,864 r on the qkv of ViT-B",
    },
)
class Lora:
    """Adds one pair of factors per part beside every target."""

    def __init__(self, options: LoraOptions) -> None:
        self.options = options

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Hang factors beside every target. ConfigError for a target, block or rank that the backbone does not have."""
        specs: dict[str, Spec] = {}
        for name, place in self._targets(backbone).items():
            linear = _free_linear(backbone, name)
            ranks = {part.name: _rank(linear, name, part, self.options.rank) for part in parts}
            linear.lora = LoraAdapter(linear, self.options, ranks, combination == "router")
            for variable, value in linear.lora.named_parameters():
                tag = Tag(name, *_role_and_part(variable, parts), block=place.block)
                specs[f"{name}.lora.{variable}"] = Spec(tuple(value.shape), tag, scale=self.options.scale)
        return Attached(specs, lambda seed: {n: _start(n, spec, seed) for n, spec in specs.items()}, RATES)

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """W + s B A, formed in float64; a token router is no linear map and cannot be folded."""
        for name in self._targets(backbone):
            linear = cast(nn.Linear, backbone.module.get_submodule(name))
            a, b, scale = factors(linear, name, variables)
            base.replace(backbone.module, {f"{name}.weight": linear.weight.double() + scale * b.double() @ a.double()})
            cast(LoraAdapter, linear.lora).handle.remove()
            del linear.lora

    def _targets(self, backbone: Backbone) -> dict[str, ModuleRole]:
        chosen = base.blocks_or_all(backbone, self.options.blocks, "tuner.blocks")
        inside = {name: place for name, place in backbone.modules.items() if place.block in chosen}
        there = {place.role for place in inside.values()}
        if unmatched := sorted(set(self.options.targets) - there):
            raise ConfigError(
                "no module has this role", where="tuner.targets", allowed=sorted(there), received=unmatched
            )
        return {name: place for name, place in inside.items() if place.role in self.options.targets}


def factors(linear: nn.Module, name: str, variables: Tensors) -> tuple[Tensor, Tensor, float]:
    """a [r, in], b [out, r] and scale beside one layer; several parts lie along the rank, so that b a is their sum.

    ConfigError where there is no adapter, or a router, which is no linear map.
    """
    adapter = getattr(linear, "lora", None)
    if not isinstance(adapter, LoraAdapter) or adapter.router is not None:
        reason = "there is no adapter left to fold" if adapter is None else "a router cannot be folded into weights"
        raise ConfigError(reason, where=f"{name}.lora", remedy="load the run again, or keep the adapters apart")
    device = cast(nn.Linear, linear).weight.device
    pairs = [[variables[f"{name}.lora.{part}.{letter}"].to(device) for part in adapter.parts] for letter in "ab"]
    return torch.cat(pairs[0], dim=0), torch.cat(pairs[1], dim=1), adapter.scale


def _free_linear(backbone: Backbone, name: str) -> nn.Linear:
    linear = cast(nn.Linear, backbone.module.get_submodule(name))
    if hasattr(linear, "lora"):
        raise ConfigError("this layer has a LoRA already", where=name, remedy="give each [[tuner]] its own targets")
    return linear


def _rank(linear: nn.Linear, name: str, part: Part, rank: int) -> int:
    """Room for the largest rank of any site; smaller factors are used as they come."""
    largest, limit = max([rank, *part.ranks.values()]), min(linear.in_features, linear.out_features)
    if largest > limit:
        raise ConfigError(
            "the rank exceeds the layer", where=f"lora on {name}", allowed=f"<= {limit}", received=largest
        )
    return largest


def _role_and_part(variable: str, parts: Sequence[Part]) -> tuple[str, str]:
    if variable == "router":
        return "router", next((part.name for part in parts if part.personal), "personal")
    part, _, factor = variable.partition(".")
    return f"lora_{factor}", part


def _start(name: str, spec: Spec, seed: int) -> Tensor:
    """a: Kaiming uniform; b and the router: zero, so that the start is the frozen backbone."""
    value = torch.zeros([size or 0 for size in spec.shape])
    if spec.tag.role == "lora_a":
        nn.init.kaiming_uniform_(value, a=5**0.5, generator=seeds.generator(seed, purpose=f"init/{name}"))
    return value
