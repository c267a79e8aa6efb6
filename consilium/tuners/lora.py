"""Stage 3, tuners. In: a frozen backbone. Out: two small factors beside each chosen linear layer, W x + s B A x.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, eq. 3;
rank-stabilised scale: Kalajdzievski, arXiv 2312.03732; token router over several parts: softmax(R x), as in FedALT;
DoRA: Liu et al., ICML 2024, arXiv 2402.09353, eq. 5 and section 4.3; frozen A: FFA-LoRA, Sun et al., arXiv 2403.12313.

    A -> a [rank, in]     B -> b [out, rank]     alpha / r -> scale     R -> router [parts, in]     m -> magnitude [out]

Leaves the site: a, b and the magnitude of the shared parts, without a where it is frozen. Stays: personal parts and the
router. Kept between rounds: nothing else.
Departures: on a fused qkv one A serves q, k and v (36,864 r for ViT-B, as many as for q and v apart); `scale` follows
the layer's own rank at every site, so that factors cut or padded with zeros for another site's rank keep their meaning.
DoRA: several parts are summed inside one norm and share one magnitude; dropout leaves W x alone.
The identity that pins it: b = 0 is the frozen backbone (DoRA: up to the rounding of one norm on another device); merged
equals unmerged; parity with the `peft` library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from consilium import registry
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, ModuleRole, Part, Selector, Spec, Specs, Tag
from consilium.tensors import Tensors
from consilium.tuners import base, low_rank
from consilium.tuners.stacking import affine

RATES = {"lora_a": 6e-3, "lora_b": 6e-3, "router": 2e-3, "magnitude": 3e-3}  # AdamW: docs/results/tuners.md


class LoraOptions(registry.Options):
    """Options of `[[tuner]] name = "lora"`."""

    rank: int = Field(default=8, ge=1)
    ranks: Mapping[str, Annotated[int, Field(ge=1)]] = {}  # "blocks.3" or a whole layer name -> its own; longest counts
    alpha: float | None = Field(default=None, gt=0)  # None: the rank, so that the scale is 1
    rank_stabilised: bool = False  # scale alpha / sqrt(rank) in place of alpha / rank; needs alpha, whatever the rank
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of the adapter's input, in training only
    targets: Annotated[tuple[Literal["qkv", "proj", "fc1", "fc2"], ...], Field(min_length=1)] = ("qkv",)
    blocks: tuple[int, ...] | None = None  # None: all
    dora: bool = False  # a trained magnitude times the direction of W + s B A, row by row
    start: Literal["kaiming", "orthonormal"] = "kaiming"  # of A; orthonormal: its rows; B is zero
    freeze_a: bool = False  # A stays as it was drawn: sent once, never back

    @model_validator(mode="after")
    def _fixed_alpha(self) -> LoraOptions:
        if self.rank_stabilised and self.alpha is None:  # the rank for alpha would make the scale grow with the rank
            raise ValueError("rank_stabilised needs alpha: the scale is alpha / sqrt(rank)")
        return self

    def scale(self, rank: int) -> float:
        """The factor s in W x + s B A x for a layer of this rank."""
        return 1.0 if self.alpha is None else self.alpha / (rank**0.5 if self.rank_stabilised else rank)


class Factors(nn.Module):
    """One part: a [rank, in] and b [out, rank], empty until variables take their place."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(linear.weight.new_zeros(rank, linear.in_features), requires_grad=False)
        self.b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """B A x."""
        return affine(affine(x, self.a), self.b)


class LoraAdapter(base.Adapter):
    """All parts beside one linear layer, called by a hook on it, so that the layer keeps its name and its weights."""

    router: nn.Parameter | None
    magnitude: nn.Parameter | None

    def __init__(self, linear: nn.Linear, options: LoraOptions, rank: int, ranks: Mapping[str, int], routed: bool):
        super().__init__()
        self.scale, self.dropout, self.parts = options.scale(rank), options.dropout, tuple(ranks)
        for part, room in ranks.items():
            self.add_module(part, Factors(linear, room))
        router = nn.Parameter(linear.weight.new_zeros(len(ranks), linear.in_features), requires_grad=False)
        magnitude = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
        self.register_parameter("router", router if routed else None)
        self.register_parameter("magnitude", magnitude if options.dora else None)
        self.handle = linear.register_forward_hook(lambda own, inputs, output: own.lora(inputs[0], output, own))

    def forward(self, x: Tensor, output: Tensor, linear: nn.Linear) -> Tensor:
        """W x + s sum_i share_i B_i A_i x; shares are 1 without a router; its rows rescaled where there is a magnitude.

        `linear` is asked for its weight now: a strategy may have changed it.
        """
        # The backbone is always in eval mode: dropout belongs to training, which is where gradients are recorded.
        dropped = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        shares = None if self.router is None else affine(x, self.router).softmax(-1)
        for index, part in enumerate(self.parts):
            update = self.get_submodule(part)(dropped)
            update = update if shares is None else update * shares[..., index : index + 1].to(update.dtype)
            output = torch.add(output, update, alpha=self.scale)
        if self.magnitude is None:
            return output
        values = dict(self.named_parameters(remove_duplicate=False))
        norm = low_rank.norm(linear.weight, *self.stacked(values), self.scale)
        return low_rank.rescaled(output, linear.bias, self.magnitude / norm)

    def stacked(self, values: Tensors) -> tuple[Tensor, Tensor]:
        """a [r, in] and b [out, r] of all parts, along the rank, so that b a is their sum; `values` by own names."""
        pairs = [[values[f"{part}.{letter}"] for part in self.parts] for letter in "ab"]
        return torch.cat(pairs[0], dim=0), torch.cat(pairs[1], dim=1)


@registry.register(
    "tuners",
    "lora",
    options=LoraOptions,
    summary="low-rank factors beside linear layers",
    source="Hu et al. 2022, arXiv 2106.09685",
    facts={
        "start": "identity",
        "merge": "exact",
        "formula": "W x + (alpha / r) B A x",
        "count": "r (in + out) per layer; 36,864 r on the qkv of ViT-B",
    },
)
class Lora:
    """Adds one pair of factors per part beside every target."""

    precedence: ClassVar[int] = 1  # what is added to a weight comes before what rescales the layer

    def __init__(self, options: LoraOptions) -> None:
        self.options, self.stackable = options, not (options.dora or options.dropout)

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Hang factors beside every target. ConfigError for a target, block or rank that the backbone does not have."""
        specs: dict[str, Spec] = {}
        magnitudes: dict[str, Tensor] = {}
        places = self._targets(backbone)
        low_rank.require_sum(self.options.dora, combination)
        for name, rank in low_rank.by_layer(places, self.options.rank, self.options.ranks, parts).items():
            linear = low_rank.free_linear(backbone, name)
            room = {part.name: low_rank.room(linear, name, rank, part) for part in parts}
            linear.lora = LoraAdapter(linear, self.options, rank, room, combination == "router")
            for variable, value in linear.lora.named_parameters():
                tag = Tag(name, *low_rank.role_and_part(variable, parts), block=places[name].block)
                factor = None if combination == "router" else low_rank.side(tag)
                specs[f"{name}.lora.{variable}"] = Spec(tuple(value.shape), tag, scale=linear.lora.scale, factor=factor)
            if self.options.dora:
                magnitudes[f"{name}.lora.magnitude"] = linear.weight.norm(dim=1).float()
        refused, kind = low_rank.NO_MERGE if combination == "router" else "", self.options.start
        start = lambda seed: {**low_rank.initial(specs, kind, seed), **magnitudes}  # noqa: E731
        held = frozenset(n for n, spec in specs.items() if self.options.freeze_a and spec.tag.role == "lora_a")
        return Attached(specs, start, RATES, merge_refused=refused, never_trained=held)

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything, or all but A."""
        return lambda tag: not (self.options.freeze_a and tag.role == "lora_a")

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """W + s B A, with DoRA its rows rescaled, in float64; a token router is no linear map and cannot be folded."""
        for name in self._targets(backbone):
            linear = cast(nn.Linear, backbone.module.get_submodule(name))
            found = factors(linear, name, variables)
            base.replace(backbone.module, {f"{name}.weight": low_rank.folded(linear.weight, found)})
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


def factors(linear: nn.Module, name: str, variables: Tensors) -> low_rank.Folding:
    """What all parts beside one layer amount to. ConfigError where there is no adapter, or a router: no linear map."""
    adapter = getattr(linear, "lora", None)
    if not isinstance(adapter, LoraAdapter) or adapter.router is not None:
        reason = "there is no adapter left to fold" if adapter is None else low_rank.NO_MERGE
        raise ConfigError(reason, where=f"{name}.lora", remedy="load the run again, or keep the adapters apart")
    values = {own: variables[f"{name}.lora.{own}"] for own, _ in adapter.named_parameters()}
    return low_rank.Folding(*adapter.stacked(values), adapter.scale, values.get("magnitude"))
