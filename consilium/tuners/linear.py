"""Stage 3, tuners. In: a frozen backbone. Out: nothing besides the head, which is trained on fixed features.

Linear probing: Alain and Bengio, "Understanding intermediate layers using linear classifier probes", arXiv 1610.01644.
Leaves the site: the head. The identity that pins it: features equal the frozen backbone's whatever is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from consilium import registry
from consilium.protocols import Attached, Backbone, Combination, Part, Selector, Specs
from consilium.tensors import Tensors

HEAD_RATE = 3e-3  # AdamW; a head alone on fixed features bears more than one beside moving features


class LinearOptions(registry.Options):
    """None."""


@registry.register(
    "tuners",
    "linear",
    options=LinearOptions,
    summary="the head alone, on frozen features",
    source="Alain and Bengio 2016, arXiv 1610.01644",
    facts={"start": "identity", "merge": "exact", "formula": "head(f(x))", "count": "0"},
)
class Linear:
    """Trains nothing in the backbone."""

    stackable: ClassVar[bool] = True

    def __init__(self, options: LinearOptions) -> None:
        self.options = options

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:  # noqa: ARG002
        """Nothing to add; only the head's learning rate."""
        return Attached(specs={}, initial=lambda _: {}, learning_rates={"head": HEAD_RATE})

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Nothing."""
        return lambda _: False

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """Nothing to fold."""
