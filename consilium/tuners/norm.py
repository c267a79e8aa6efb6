"""Stage 3, tuners. In: a frozen backbone. Out: weights and biases of its norms as variables.

LN-tuning: Qi, Ruan, Zuo, Li, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models",
arXiv 2211.08682.

    gain -> weight [d]      bias -> bias [d], where the norm has one (RMSNorm has none)

Leaves the site: weights and biases of all norms. Stays, and is kept between rounds: nothing.
Departures: every norm is trained, the last one and those of queries and keys too.
The identity that pins it: at the start it is the frozen backbone, bit for bit; a step equals a step of plain autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

from consilium import registry, tensors
from consilium.protocols import Attached, Backbone, Combination, Part, Selector, Specs
from consilium.tensors import Tensors
from consilium.tuners import base

RATE = 6e-3  # AdamW: docs/results/tuners.md


class NormOptions(registry.Options):
    """None."""


@registry.register(
    "tuners",
    "norm",
    options=NormOptions,
    summary="weights and biases of all norms",
    source="Qi et al. 2022, arXiv 2211.08682",
    facts={
        "start": "identity",
        "merge": "exact",
        "formula": "w (x - mean) / std + b",
        "count": "2 d per LayerNorm, (2 L + 1) 2 d in a ViT; 38,400 for ViT-B",
    },
)
class Norm:
    """Trains the norms of the backbone."""

    def __init__(self, options: NormOptions) -> None:
        self.options = options

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Name the norms' parameters; nothing is added, nothing is drawn."""
        return base.own_tensors(backbone, _norms(backbone), base.only_part("norm", parts, combination), RATE)

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """Write the variables into the backbone."""
        base.replace(backbone.module, tensors.select(variables, _norms(backbone)))


def _norms(backbone: Backbone) -> Tensors:
    own = base.parameters(backbone.module)
    return {name: value for name, value in own.items() if base.place(backbone, name).role.startswith("norm")}
