"""Stage 3, tuners. In: a backbone and a module of learnt tokens. Out: the same backbone, whose blocks see these tokens.

The tokens stand between the prefix tokens (class, distillation, registers) and the patches, without a position. They
enter at the first block, behind a norm before the blocks if there is one, and are taken out behind the last, so that
neither the final norm nor a pool ever meets them: features and their order outside of blocks stay timm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.errors import ConfigError
from consilium.protocols import Backbone, Combination, Part
from consilium.tuners import base, stacking

Depth = Literal["shallow", "deep"]


class Tokens(base.Adapter):
    """Parent of adapters that are tokens: `forward(layer)` gives [length, width] in front of block `layer`.

    One layer: its tokens go through all blocks. More: those of a layer take the place of what became of the last ones.
    """

    def __init__(self, length: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.length, self.num_layers, self.dropout = length, num_layers, dropout


def num_layers(backbone: Backbone, depth: Depth) -> int:
    """How many blocks get tokens of their own."""
    return backbone.num_blocks if depth == "deep" else 1


def width(backbone: Backbone) -> int:
    """Channels of a token; ConfigError for a model whose attention may not bear more tokens."""
    return int(_vit(backbone).embed_dim)


def bound(backbone: Backbone, columns: int) -> float:
    """v of VPT's start U(-v, v) for prompts with this many columns: as if they were what a patch is projected by."""
    height, breadth = _vit(backbone).patch_embed.patch_size
    return float((6 / (3 * height * breadth + columns)) ** 0.5)


def require_sum(tuner: str, parts: Sequence[Part], combination: Combination) -> None:
    """Several parts are added entry by entry; ConfigError for a router, which weighs outputs token by token."""
    if combination != "sum":
        raise ConfigError(
            f"{tuner!r} adds its parts up; prompts are tokens themselves, so no router can weigh them token by token",
            where="tuner.name",
            allowed="a tuner with a router, such as lora",
            received=f"{tuner} with parts {[part.name for part in parts]}",
        )


def no_merge(tuner: str) -> ConfigError:
    """Why nothing can be folded."""
    return ConfigError(
        f"{tuner!r} cannot be merged: {NO_MERGE}", where="tuner", remedy="keep the adapters apart from the backbone"
    )


NO_MERGE = "prompts are tokens in the sequence, and no weights of the backbone do the same for every image"


def num_inserted(backbone: Backbone) -> int:
    """Tokens that tuners added to the sequence of every block."""
    return sum(child.length for child in backbone.module.children() if isinstance(child, Tokens))


def insert(backbone: Backbone, name: str, adapter: Tokens) -> None:
    """Hang `adapter` on the backbone as `name`, so that all blocks see its tokens; ConfigError for a second one."""
    module = _vit(backbone)
    if taken := [other for other, child in module.named_children() if isinstance(child, Tokens)]:
        raise ConfigError(
            "two tuners put prompts into one sequence",
            where="tuner",
            allowed="one of prompts and low_rank_prompts, once",
            received=[*taken, name],
            remedy="make one of them longer, or use a strategy with several parts, which are added up",
        )
    module.add_module(name, adapter)
    blocks, prefix = list(module.blocks), module.num_prefix_tokens
    for layer in range(adapter.num_layers):  # partials, which are copied with the module, where closures are not
        blocks[layer].register_forward_pre_hook(partial(_put, adapter, prefix, layer))
    blocks[-1].register_forward_hook(partial(_take, adapter, prefix))
    for block in blocks:  # rotary positions are those of the tokens behind the prefix, which must be patches
        if hasattr(block.attn, "num_prefix_tokens"):
            block.attn.num_prefix_tokens += adapter.length


def _put(adapter: Tokens, prefix: int, layer: int, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001
    """[B, prefix + patches, d] or, behind the first block, [B, prefix + length + patches, d] -> the latter."""
    x, *others = inputs
    tokens = stacking.spread(adapter(layer), 2, len(x)).to(x.dtype).expand(len(x), -1, -1)
    # The backbone is always in eval mode: dropout belongs to training, which is where gradients are recorded.
    dropped = F.dropout(tokens, adapter.dropout, training=torch.is_grad_enabled())
    behind = prefix + (adapter.length if layer else 0)
    return torch.cat([x[:, :prefix], dropped, x[:, behind:]], dim=1), *others


def _take(adapter: Tokens, prefix: int, block: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> Tensor:  # noqa: ARG001
    """[B, prefix + length + patches, d] -> [B, prefix + patches, d]."""
    return torch.cat([x[:, :prefix], x[:, prefix + adapter.length :]], dim=1)


def _vit(backbone: Backbone) -> Any:
    if not isinstance(backbone.module, VisionTransformer | Eva):
        raise ConfigError(
            "prompts need attention over any number of tokens; this model may have position biases or windows",
            where="backbone.name",
            allowed="timm's VisionTransformer (ViT, DeiT, DINOv2) or Eva",
            received=f"{backbone.name}: {type(backbone.module).__name__}",
        )
    return backbone.module
