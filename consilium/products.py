"""Common: products of factors. In: what tuners declared of each tensor. Out: which of them make a product of two.

Only the product acts in the model, so whatever sums, compares or projects factors works on products and never asks
which tuner they came from.
"""

from __future__ import annotations

from dataclasses import dataclass

from consilium.protocols import Specs


@dataclass(frozen=True)
class Product:
    """scale * left @ right: `left` [sum of rows, r], one tensor per base below the other; `right` [r, columns]."""

    left: tuple[str, ...]
    right: str
    base: tuple[str, ...]
    scale: float
    part: str


def products(specs: Specs) -> tuple[Product, ...]:
    """The products among these tensors, as their tuners declared them in `Spec.factor`, sorted by the right factor."""
    sides = {name: (spec, spec.factor) for name, spec in sorted(specs.items()) if spec.factor is not None}
    lefts = {(spec.tag.part, f.base[0]): name for name, (spec, f) in sides.items() if f.side == "left"}
    rights = [(name, spec, f.base) for name, (spec, f) in sides.items() if f.side == "right"]
    found = [(tuple(lefts[spec.tag.part, b] for b in base), name, base, spec) for name, spec, base in rights]
    return tuple(Product(left, name, base, spec.scale, spec.tag.part) for left, name, base, spec in found)
