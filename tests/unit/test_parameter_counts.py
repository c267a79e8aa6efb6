"""How many scalars each tuner trains on ViT-T, S and B with patches of 16, against closed formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch

from consilium import registry
from consilium.backbones import roles
from consilium.config import HeadConfig
from consilium.data import Preprocessing
from consilium.protocols import Backbone, Declaration
from consilium.tuners import compose
from tests import variants

BLOCKS, CLASSES = 12, 7
WIDTHS = {"vit_tiny_patch16_224": 192, "vit_small_patch16_224": 384, "vit_base_patch16_224": 768}
Count = Callable[[int], int]  # width -> scalars besides the head


def _whole(d: int) -> int:
    block = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    return BLOCKS * block + (3 * 16 * 16 * d + d) + d + 197 * d + 2 * d


def _attention(d: int) -> int:
    return 4 * d * d + 4 * d


FORMULAS: dict[str, tuple[dict[str, Any], Count]] = {
    "full": ({}, _whole),
    "linear": ({}, lambda d: 0 * d),
    "bitfit": ({}, lambda d: BLOCKS * (3 * d + d + 4 * d + d + 2 * d) + d + d),
    "norm": ({}, lambda d: (2 * BLOCKS + 1) * 2 * d),
    "attention": ({}, lambda d: BLOCKS * _attention(d)),
    "attention ": ({"blocks": [0, 11]}, lambda d: 2 * _attention(d)),
    "stochastic_block": ({}, _attention),
    "stochastic_block ": ({"blocks_per_round": 3}, lambda d: 3 * _attention(d)),
    "prompts": ({"length": 10}, lambda d: 10 * d),
    "prompts ": ({"length": 50, "depth": "deep"}, lambda d: BLOCKS * 50 * d),
    "low_rank_prompts": ({"length": 50, "rank": 4}, lambda d: 4 * (50 + d)),
    "low_rank_prompts ": ({"length": 50, "rank": 4, "depth": "deep"}, lambda d: BLOCKS * 4 * (50 + d)),
    "low_rank_prompts  ": (
        {"length": 50, "rank": 4, "depth": "deep", "share_basis": True},
        lambda d: BLOCKS * 50 * 4 + 4 * d,
    ),
    "lora": ({"rank": 8}, lambda d: 8 * BLOCKS * 4 * d),
    "lora ": ({"rank": 4, "targets": ["qkv", "proj"]}, lambda d: 4 * BLOCKS * 6 * d),
    "adapter": ({"width": 96}, lambda d: BLOCKS * (2 * d * 96 + 96 + d)),
    "adapter ": ({"width": 12}, lambda d: BLOCKS * (2 * d * 12 + 12 + d)),
    "ssf": ({}, lambda d: BLOCKS * 22 * d + 4 * d),
    "ia3": ({}, lambda d: BLOCKS * (d + d + 4 * d)),
}
VIT_B = {
    "full": 85_804_039 - CLASSES * 769,
    "bitfit": 102_912,
    "norm": 38_400,
    "attention": 28_348_416,
    "stochastic_block": 2_362_368,
    "prompts": 10 * 768,
    "prompts ": 12 * 50 * 768,
    "low_rank_prompts": 8_655 - 5_383,
    "low_rank_prompts ": 44_647 - 5_383,
    "low_rank_prompts  ": 10_855 - 5_383,
    "lora": 36_864 * 8,
    "lora ": 55_296 * 4,
    "adapter": 1_779_840,
    "adapter ": 230_544,
}


@lru_cache(maxsize=3)
def _module(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=0).eval().requires_grad_(False)


def _model(name: str, tables: list[dict[str, Any]]) -> compose.TunedModel:
    _module.cache_clear()
    module = _module(name)
    places = roles.find(module)
    images = Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    backbone = Backbone(module, name, "0" * 64, images, places, BLOCKS, WIDTHS[name], 0)
    with torch.device("meta"):
        tuners = [registry.build("tuners", t["name"], {k: v for k, v in t.items() if k != "name"}) for t in tables]
        return compose.attach(backbone, tuners, HeadConfig(), CLASSES, Declaration(), 0)


def _trained(model: compose.TunedModel) -> int:
    """As `parameters.trainable` counts it, without the head."""
    chosen = model.active(1, "a", 0)
    counted = [spec for spec in model.specs.values() if chosen(spec.tag) and spec.tag.role != "head"]
    return sum(math.prod(size or 0 for size in spec.shape) for spec in counted) + model.inert


@pytest.mark.parametrize("case", FORMULAS)
@pytest.mark.parametrize("name", WIDTHS)
def test_the_formula_counts_what_is_trained(name: str, case: str) -> None:
    options, formula = FORMULAS[case]
    trained = _trained(_model(name, [{"name": case.strip(), **options}]))
    assert trained == formula(WIDTHS[name])
    if name == "vit_base_patch16_224" and case in VIT_B:
        assert trained == VIT_B[case]


@pytest.mark.parametrize("name", WIDTHS)
def test_bitfit_sends_no_key_bias(name: str) -> None:
    d, model = WIDTHS[name], _model(name, [{"name": "bitfit"}])
    sent = sum(math.prod(spec.shape) for spec in model.specs.values() if spec.tag.role != "head")
    assert sent == _trained(model) - BLOCKS * d
    assert name != "vit_base_patch16_224" or sent == 93_696


@pytest.mark.parametrize("hybrid", variants.HYBRIDS)
def test_a_hybrid_trains_what_its_members_train(hybrid: str) -> None:
    tables = variants.table(hybrid)
    alone = [_trained(_model("vit_tiny_patch16_224", [table])) for table in tables]
    assert _trained(_model("vit_tiny_patch16_224", tables)) == sum(alone)
