"""Stage 3, tuners. In: a tuner, its adapters, which of them a stage trains. Out: these alone as trainable tensors.

Adapters of earlier stages hang in the backbone as they did, beside new ones of the same tuner; what is not trained has
no spec, so it is no variable, and is given to the model like any other frozen tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from consilium import tensors
from consilium.protocols import Attached, Backbone, Combination, Part, Tuner

EVERY = frozenset({"*"})


@dataclass(frozen=True)
class Placed:
    """A tuner with its adapters. `trained`: parts that this stage trains."""

    tuner: Tuner
    parts: tuple[Part, ...]
    combination: Combination
    trained: frozenset[str] = frozenset()


def attached(placed: Placed, backbone: Backbone) -> Attached:
    """What this stage trains of what the tuner attaches: all, some parts, or nothing."""
    found = placed.tuner.attach(backbone, placed.parts, placed.combination)
    if placed.trained is EVERY:
        return found
    specs = {name: spec for name, spec in found.specs.items() if spec.tag.part in placed.trained}
    return replace(
        found,
        specs=specs,
        initial=lambda seed: tensors.select(found.initial(seed), specs),
        learning_rates=found.learning_rates if specs else {},
        inert=found.inert if specs else 0,
        never_trained=found.never_trained & specs.keys(),
    )
