"""Stage 3, tuners. In: a frozen backbone. Out: vectors that rescale keys, values and the hidden layer of each MLP.

IA3: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
2022, arXiv 2205.05638: softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V), and W_2 (l_ff * act(W_1 x)).

    l_k, l_v -> ia3 [2 d] after a fused qkv, keys first; [d] after each of separate layers
    l_ff     -> ia3 [hidden] before fc2, behind a gated MLP's product and norm

Leaves the site: vectors of the shared parts. Stays: personal parts. Kept between rounds: nothing else.
Departures: `q` may be rescaled too, which on a fused qkv is what the `peft` library does. Several parts add up their
changes, l = 1 + sum (l_i - 1). EVA adds its q and v bias behind the layer; they are rescaled with the rest.
The identity that pins it: l = 1 is the frozen backbone; merged equals unmerged in float64; parity with `peft`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from consilium import registry
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, ModuleRole, Part, Selector, Spec, Specs, Tag
from consilium.tensors import Tensors
from consilium.tuners import base
from consilium.tuners.scaling import Pieces, bias_apart, combined, fold, over_channels, require_sum, rescaled

RATES = {"ia3": 5e-2}  # AdamW: docs/results/tuners.md


class Ia3Options(registry.Options):
    """Options of `[[tuner]] name = "ia3"`."""

    targets: Annotated[tuple[Literal["q", "k", "v", "fc2"], ...], Field(min_length=1)] = ("k", "v", "fc2")
    blocks: tuple[int, ...] | None = None  # None: all


class Ia3Adapter(base.Adapter):
    """All parts at one linear layer, called by a hook on it, so that the layer keeps its name and its weights."""

    def __init__(self, linear: nn.Linear, parent: nn.Module, parts: Sequence[Part], chosen: Pieces | None) -> None:
        super().__init__()
        self.before, self.chosen = chosen is None, chosen or (True,)
        self.beside = (parent,)  # in a tuple, since what is above must not become a child
        size = linear.in_features if chosen is None else linear.out_features // len(chosen) * sum(chosen)
        for part in parts:
            self.register_parameter(part.name, nn.Parameter(linear.weight.new_ones(size), requires_grad=False))
        self.handle = (
            linear.register_forward_pre_hook(lambda module, inputs: (module.ia3(inputs[0]),))
            if self.before
            else linear.register_forward_hook(lambda module, _, output: module.ia3(output))
        )

    def total(self, values: Tensors) -> Tensor:
        """l [in or out] of all parts together; `values` by the names of the parts."""
        return combined(list(values.values()), self.chosen, 1)

    def forward(self, x: Tensor) -> Tensor:
        """l * x."""
        scale = over_channels(self.total(dict(self.named_parameters(remove_duplicate=False))), x)
        apart = bias_apart(self.beside[0]) if len(self.chosen) == 3 else None
        return rescaled(x, scale, torch.zeros_like(scale), apart)


@registry.register(
    "tuners",
    "ia3",
    options=Ia3Options,
    summary="learned rescaling of keys, values and hidden activations",
    source="Liu et al. 2022, arXiv 2205.05638",
    facts={
        "start": "identity",
        "merge": "exact",
        "formula": "l_k * K, l_v * V, W_2 (l_ff * h)",
        "count": "6 d per block; 55,296 for ViT-B",
    },
)
class Ia3:
    """Adds one vector per part at every target."""

    precedence: ClassVar[int] = 3  # the whole layer, with what was added to it
    stackable: ClassVar[bool] = True

    def __init__(self, options: Ia3Options) -> None:
        self.options = options

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Hang vectors at every target. ConfigError for a target or block that is not there, and for a router."""
        require_sum("ia3", combination)
        specs: dict[str, Spec] = {}
        for name, (place, chosen) in self._targets(backbone).items():
            linear = cast(nn.Linear, backbone.module.get_submodule(name))
            if hasattr(linear, "ia3"):
                raise ConfigError("this layer has an IA3 vector already", where=name)
            linear.ia3 = Ia3Adapter(linear, backbone.module.get_submodule(name.rpartition(".")[0]), parts, chosen)
            for part, value in linear.ia3.named_parameters():
                specs[f"{name}.ia3.{part}"] = Spec(tuple(value.shape), Tag(name, "ia3", part, place.block))
        return Attached(specs, lambda _: {name: _ones(spec) for name, spec in specs.items()}, RATES)

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """Rows of the weights and biases that make keys and values, columns of fc2, rescaled in float64."""
        for name, (scale, feedforward) in vectors(backbone, variables).items():
            linear = cast(nn.Linear, backbone.module.get_submodule(name))
            scale = scale.to(linear.weight.device).double()
            if feedforward:
                base.replace(backbone.module, {f"{name}.weight": linear.weight.double() * scale})
            else:
                fold(backbone, name, scale, torch.zeros_like(scale))
            cast(Ia3Adapter, linear.ia3).handle.remove()
            del linear.ia3

    def _targets(self, backbone: Backbone) -> dict[str, tuple[ModuleRole, Pieces | None]]:
        chosen = base.blocks_or_all(backbone, self.options.blocks, "tuner.blocks")
        inside = {name: place for name, place in backbone.modules.items() if place.block in chosen}
        pieces = {name: self._pieces(name, place) for name, place in inside.items()}
        return {name: (inside[name], found) for name, found in pieces.items() if found is None or any(found)}

    def _pieces(self, name: str, place: ModuleRole) -> Pieces | None:
        """Which pieces of a layer's output are rescaled; None: its input."""
        if place.role == "fc2" and "fc2" in self.options.targets:
            return None
        letters = {"qkv": "qkv", "q_proj": "q", "k_proj": "k", "v_proj": "v"}.get(name.rpartition(".")[2], "")
        return tuple(letter in self.options.targets for letter in letters)


def vectors(backbone: Backbone, variables: Tensors) -> Mapping[str, tuple[Tensor, bool]]:
    """Layer -> (vector, whether it rescales the layer's input: `peft`'s feedforward); otherwise it rescales the output.

    All parts together, ones where nothing is tuned, so that every choice of targets is a full vector as `peft` has it.
    """
    found = {}
    for name in backbone.modules:
        adapter = getattr(backbone.module.get_submodule(name), "ia3", None)
        if isinstance(adapter, Ia3Adapter):
            values = {part: variables[f"{name}.ia3.{part}"] for part, _ in adapter.named_parameters()}
            found[name] = adapter.total(values), adapter.before
    return found


def _ones(spec: Spec) -> Tensor:
    return torch.ones([size or 0 for size in spec.shape])
