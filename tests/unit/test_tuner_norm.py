"""Norms as variables: which tensors, how many, and the same step as plain autograd."""

from __future__ import annotations

import pytest
from torch import nn

from tests import own_tensors, small


def _names(make: str) -> set[str]:
    """Parameters of modules of torch's and timm's norm classes."""
    modules = small.backbone(make).module.named_modules()
    norms = {name: module for name, module in modules if isinstance(module, nn.LayerNorm | nn.RMSNorm)}
    return {f"{name}.{own}" for name, module in norms.items() for own, _ in module.named_parameters()}


@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_all_norms_and_nothing_else(make: str) -> None:
    added = own_tensors.attached("norm", small.backbone(make))
    assert added.specs.keys() == _names(make)
    assert {spec.tag.role for spec in added.specs.values()} == {"norm"} == added.learning_rates.keys()


def test_norms_inside_of_an_attention_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small.MAKES, "normed", ("vit_tiny_patch16_224", {"qk_norm": True}))
    specs = own_tensors.attached("norm", small.backbone("normed")).specs
    assert {"blocks.0.attn.q_norm.weight", "blocks.1.attn.k_norm.bias", "norm.weight"} <= specs.keys()
    assert specs["blocks.1.attn.k_norm.bias"].tag.block == 1


@pytest.mark.parametrize(("name", "width"), own_tensors.WIDTHS.items())
def test_count_is_the_closed_formula(name: str, width: int) -> None:
    added = own_tensors.attached("norm", own_tensors.empty(name))
    assert own_tensors.count(added.specs) == (2 * 12 + 1) * 2 * width
    assert width != 768 or own_tensors.count(added.specs) == 38_400


@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_a_step_is_the_step_of_plain_autograd(make: str) -> None:
    own_tensors.assert_same_step("norm", make, _names(make))
