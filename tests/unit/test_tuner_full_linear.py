"""Full fine-tuning and the linear head: what they train, and the roles full gives to the backbone's own tensors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from consilium import registry
from consilium.protocols import Part
from tests import small


@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_full_names_every_parameter_at_its_value(make: str) -> None:
    backbone = small.backbone(make)
    added = registry.build("tuners", "full", {}).attach(backbone, [Part()], "sum")
    own = dict(backbone.module.named_parameters())
    initial = added.initial(7)
    assert own.keys() == added.specs.keys() == initial.keys()
    assert all(torch.equal(initial[name], own[name]) for name in own)
    assert sum(value.numel() for value in initial.values()) == backbone.num_parameters


def test_full_gives_roles_and_blocks() -> None:
    backbone = small.backbone()
    specs = registry.build("tuners", "full", {}).attach(backbone, [Part("mine")], "sum").specs
    roles = Counter(spec.tag.role for spec in specs.values())
    assert roles == {"norm": 10, "attention": 8, "bias": 5, "weight": 5, "embedding": 2}
    assert {spec.tag.part for spec in specs.values()} == {"mine"}
    assert specs["blocks.1.attn.qkv.bias"].tag.block == 1
    assert specs["blocks.1.attn.qkv.bias"].tag.module == "blocks.1.attn.qkv"
    assert specs["patch_embed.proj.weight"].tag.block is None
    assert specs["patch_embed.proj.weight"].tag.role == "weight"
    assert specs["pos_embed"].tag.role == "embedding"


def test_eva_biases_beside_the_qkv_module_are_attention() -> None:
    specs = registry.build("tuners", "full", {}).attach(small.backbone("eva_fused"), [Part()], "sum").specs
    assert specs["blocks.0.attn.q_bias"].tag.role == "attention"


def test_start_does_not_share_memory_with_the_backbone() -> None:
    backbone = small.backbone()
    added = registry.build("tuners", "full", {}).attach(backbone, [Part()], "sum")
    before = backbone.module.get_parameter("pos_embed").clone()
    added.initial(0)["pos_embed"].add_(1)
    assert torch.equal(backbone.module.get_parameter("pos_embed"), before)
    assert torch.equal(added.initial(0)["pos_embed"], before)


def test_linear_adds_nothing() -> None:
    added = registry.build("tuners", "linear", {}).attach(small.backbone(), [Part()], "sum")
    assert not added.specs
    assert not added.initial(0)
