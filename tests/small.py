"""Small frozen backbones of every make, for tests: built in milliseconds, with weights away from zero and one."""

from __future__ import annotations

import torch

from consilium.backbones import timm_backbone
from consilium.backbones.weights import Weights
from consilium.data import Preprocessing
from consilium.protocols import Backbone

SIZE = 16
_TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
MAKES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "eva_fused": ("eva02_tiny_patch14_224", {}),
    "eva_apart": ("eva02_base_patch14_224", {}),
}


def backbone(make: str = "vit") -> Backbone:
    """A ViT of 2 blocks and 16 channels for 16 px, every tensor drawn at random and away from zero."""
    name, special = MAKES[make]
    arguments = {**_TINY, **special}
    settings = Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    start = timm_backbone.assemble(name, Weights(name, None, {}, arguments), settings).module.state_dict()
    draw = torch.Generator().manual_seed(1)
    drawn = {key: value + 0.2 * torch.randn(value.shape, generator=draw) for key, value in start.items()}
    return timm_backbone.assemble(name, Weights(name, drawn, {}, arguments), settings)


def images(count: int = 3) -> torch.Tensor:
    """float32 [count, 3, 16, 16]."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def moved(variables: dict[str, torch.Tensor], by: float = 0.1) -> dict[str, torch.Tensor]:
    """The same variables, each a little elsewhere."""
    draw = torch.Generator().manual_seed(3)
    return {name: value + by * torch.randn(value.shape, generator=draw) for name, value in sorted(variables.items())}
