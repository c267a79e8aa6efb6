"""Stage 3, tuners. In: a backbone. Out: all its parameters as variables that start at their pre-trained values.

Full fine-tuning; with `fedavg` the method of McMahan et al., AISTATS 2017, arXiv 1602.05629.
Leaves the site: every weight. The identity that pins it: at the start it is the frozen backbone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from consilium import registry, tensors
from consilium.protocols import Attached, Backbone, Combination, Part, Selector, Spec, Specs
from consilium.tensors import Tensors
from consilium.tuners import base

RATE = 1.5e-4  # AdamW: docs/results/tuners.md
ROLES = ("norm", "attention", "bias", "weight", "embedding")


class FullOptions(registry.Options):
    """None."""


@registry.register(
    "tuners",
    "full",
    options=FullOptions,
    summary="every parameter of the backbone",
    source="McMahan et al. 2017, arXiv 1602.05629",
    facts={"start": "identity", "merge": "exact", "formula": "W", "count": "all; 85,798,656 on ViT-B"},
)
class Full:
    """Trains the whole backbone."""

    def __init__(self, options: FullOptions) -> None:
        self.options = options

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Name every parameter of the backbone; nothing is added, nothing is drawn."""
        part = base.only_part("full", parts, combination)
        own = base.parameters(backbone.module)
        specs = {name: Spec(tuple(p.shape), base.tag(backbone, name, part.name), p.dtype) for name, p in own.items()}
        return Attached(specs=specs, initial=lambda _: tensors.detach(own), learning_rates=dict.fromkeys(ROLES, RATE))

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """Write the variables into the backbone."""
        base.replace(backbone.module, tensors.select(variables, base.parameters(backbone.module)))
