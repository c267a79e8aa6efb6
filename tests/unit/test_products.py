"""What a tuner declares of its factors, read back as products."""

from __future__ import annotations

import torch

from consilium.products import products
from consilium.protocols import Factor, Spec, Tag


def _spec(module: str, part: str, side: str, base: tuple[str, ...], scale: float = 1.0) -> Spec:
    return Spec((2, 2), Tag(module, f"{side}_factor", part), scale=scale, factor=Factor(base, side))


def test_each_part_of_each_layer_is_a_product_of_its_own() -> None:
    specs = {
        f"{layer}.{part}.{letter}": _spec(layer, part, side, (f"{layer}.weight",), scale)
        for layer, scale in (("u", 2.0), ("v", 0.5))
        for part in ("shared", "personal")
        for letter, side in (("a", "right"), ("b", "left"))
    }
    specs["head.weight"] = Spec((3, 2), Tag("head", "head"), torch.float32)
    found = products(specs)
    assert [(p.left, p.right, p.base, p.scale, p.part) for p in found] == [
        ((f"{layer}.{part}.b",), f"{layer}.{part}.a", (f"{layer}.weight",), scale, part)
        for layer, part, scale in (
            ("u", "personal", 2.0),
            ("u", "shared", 2.0),
            ("v", "personal", 0.5),
            ("v", "shared", 0.5),
        )
    ]


def test_lefts_lie_below_one_another_in_the_order_of_their_bases() -> None:
    bases = ("offset.10", "offset.9", "offset.1")
    specs = {f"left.{b}": _spec("p", "shared", "left", (b,)) for b in sorted(bases)}
    specs["basis"] = _spec("p", "shared", "right", bases)
    (found,) = products(specs)
    assert found.left == tuple(f"left.{b}" for b in bases)
    assert found.base == bases


def test_nothing_is_a_product_that_is_not_declared_as_one() -> None:
    assert products({"head.weight": Spec((3, 2), Tag("head", "head"))}) == ()
