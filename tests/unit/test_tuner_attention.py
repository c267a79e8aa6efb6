"""Attention projections as variables: which tensors, which blocks, how many, and the same step as plain autograd."""

from __future__ import annotations

import pytest

from consilium.errors import ConfigError
from tests import own_tensors, small

FUSED = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
NAMES = {
    "vit": FUSED,
    "distilled": FUSED,
    "registers": FUSED,
    "pooled": FUSED,
    "eva_fused": FUSED - {"qkv.bias"} | {"q_bias", "v_bias"},
    "eva_apart": {"q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias"}
    | {"proj.weight", "proj.bias"},
}


def _names(make: str, blocks: tuple[int, ...] = (0, 1)) -> set[str]:
    return {f"blocks.{block}.attn.{name}" for block in blocks for name in NAMES[make]}


@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_projections_and_nothing_else(make: str) -> None:
    added = own_tensors.attached("attention", small.backbone(make))
    assert added.specs.keys() == _names(make)
    assert {spec.tag.role for spec in added.specs.values()} == {"attention"} == added.learning_rates.keys()


def test_only_the_chosen_blocks() -> None:
    specs = own_tensors.attached("attention", small.backbone(), blocks=(1,)).specs
    assert specs.keys() == _names("vit", (1,))
    assert {spec.tag.block for spec in specs.values()} == {1}


@pytest.mark.parametrize("blocks", [(0, 2), (-1,), ()])
def test_blocks_that_are_not_there_are_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="block"):
        own_tensors.attached("attention", small.backbone(), blocks=blocks)


def test_norms_inside_of_an_attention_stay_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    special = {"qk_norm": True, "scale_attn_norm": True}
    monkeypatch.setitem(small.MAKES, "normed", ("vit_tiny_patch16_224", special))
    backbone = small.backbone("normed")
    assert "blocks.0.attn.norm.weight" in backbone.module.state_dict()
    assert own_tensors.attached("attention", backbone).specs.keys() == _names("vit")


@pytest.mark.parametrize(("name", "width"), own_tensors.WIDTHS.items())
def test_count_is_the_closed_formula(name: str, width: int) -> None:
    added = own_tensors.attached("attention", own_tensors.empty(name))
    assert own_tensors.count(added.specs) == 12 * (4 * width**2 + 4 * width)
    assert width != 768 or own_tensors.count(added.specs) == 28_348_416


@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_a_step_is_the_step_of_plain_autograd(make: str) -> None:
    own_tensors.assert_same_step("attention", make, _names(make, (1,)), blocks=(1,))
