"""Stage 3, tuners. In: a frozen backbone. Out: its attention projections as variables.

Attention-only fine-tuning: Touvron, Cord, El-Nouby, Verbeek, Jégou, "Three things everyone should know about Vision
Transformers", ECCV 2022, arXiv 2203.09795.

    W_q, W_k, W_v and their biases -> attn.qkv, fused or apart, with EVA's q_bias and v_bias      W_o -> attn.proj

Leaves the site: weights and biases of the projections. Stays, and is kept between rounds: nothing.
Departures: blocks can be chosen. Norms and gates inside of an attention are no projections and stay frozen.
The identity that pins it: at the start it is the frozen backbone, bit for bit; a step equals a step of plain autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

from consilium import registry, tensors
from consilium.protocols import Attached, Backbone, Combination, Part, Selector, Specs
from consilium.tensors import Tensors
from consilium.tuners import base

RATE = 1e-3  # AdamW: docs/results/tuners.md


class AttentionOptions(registry.Options):
    """Options of `[[tuner]] name = "attention"`."""

    blocks: tuple[int, ...] | None = None  # None: all


@registry.register(
    "tuners",
    "attention",
    options=AttentionOptions,
    summary="attention projections of chosen blocks",
    source="Touvron et al. 2022, arXiv 2203.09795",
    facts={
        "start": "identity",
        "merge": "exact",
        "formula": "softmax(Q K^T / sqrt(d_head)) V W_o with Q, K, V = x W_q, x W_k, x W_v",
        "count": "4 d^2 + 4 d per block; 28,348,416 for ViT-B",
    },
)
class Attention:
    """Trains query, key, value and output projections."""

    def __init__(self, options: AttentionOptions) -> None:
        self.options = options

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Name the projections' parameters; ConfigError for a block that the backbone does not have."""
        return base.own_tensors(backbone, self._own(backbone), base.only_part("attention", parts, combination), RATE)

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """Write the variables into the backbone."""
        base.replace(backbone.module, tensors.select(variables, self._own(backbone)))

    def _own(self, backbone: Backbone) -> Tensors:
        chosen = base.blocks_or_all(backbone, self.options.blocks, "tuner.blocks")
        return base.in_blocks(backbone, chosen, ("qkv", "proj"))
