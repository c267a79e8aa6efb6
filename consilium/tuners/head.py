"""Stage 3, tuners. In: the `[head]` table and a seed. Out: the classifier's tensors and its function of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilium import seeds
from consilium.config import HeadConfig
from consilium.protocols import Spec, Specs, Tag
from consilium.tensors import Tensors
from consilium.tuners.stacking import affine

RATE = 1e-3  # AdamW, beside trained features


@dataclass(frozen=True)
class Head:
    """A linear map, or two with a GELU between; never a BatchNorm, whose statistics would mix hospitals."""

    config: HeadConfig
    num_features: int
    num_outputs: int
    still: bool = False  # the strategy does not train it in its rounds

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Module name -> (out, in)."""
        if self.config.kind == "linear":
            return {"head": (self.num_outputs, self.num_features)}
        return {"head.0": (self.config.hidden, self.num_features), "head.2": (self.num_outputs, self.config.hidden)}

    @property
    def specs(self) -> Specs:
        """Of the trained tensors: none for a frozen head."""
        if self.config.share == "frozen":
            return {}
        found = {}
        for module, (out, width) in self.layers.items():
            tag = Tag(module=module, role="head", part=self.config.share or "shared")
            found[f"{module}.bias"], found[f"{module}.weight"] = Spec((out,), tag), Spec((out, width), tag)
        return found

    def initial(self, seed: int) -> dict[str, Tensor]:
        """Zero bias; weights from the seed and their name alone."""
        found = {}
        for module, (out, width) in self.layers.items():
            found[f"{module}.bias"] = torch.zeros(out)
            found[f"{module}.weight"] = self._weight(f"{module}.weight", out, width, seed)
        return found

    def _weight(self, name: str, out: int, width: int, seed: int) -> Tensor:
        # Small for a trained last layer, so that first predictions are even; unit gain where nothing else can grow it.
        still = self.still or self.config.share == "frozen"
        std = width**-0.5 if still or name == "head.0.weight" else 0.01
        draw = seeds.generator(seed, purpose=f"init/{name}")
        return nn.init.trunc_normal_(torch.empty(out, width), std=std, a=-2 * std, b=2 * std, generator=draw)

    def apply(self, values: Tensors, features: Tensor) -> Tensor:
        """Features [B, num_features] to outputs [B, num_outputs]."""
        for index, module in enumerate(self.layers):
            features = F.gelu(features) if index else features
            features = affine(features, values[f"{module}.weight"], values[f"{module}.bias"])
        return features
