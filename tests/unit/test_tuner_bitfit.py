"""Biases as variables: which tensors, the keys' biases that change nothing, and the same step as plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from consilium import registry, results
from consilium.config import HeadConfig
from consilium.errors import ConfigError
from consilium.protocols import Declaration, Part
from consilium.tuners import compose
from tests import federation, own_tensors, small

NORMED = ("vit_tiny_patch16_224", {"qk_norm": True})
ROTATED = ("vit_small_patch16_rope_224", {})  # of plain kind but for the rotation: a fused qkv with a whole bias
UNROTATED = ("vit_small_patch16_rope_224", {"use_rot_pos_emb": False, "use_abs_pos_emb": True})
UNBIASED = ("vit_tiny_patch16_224", {"qkv_bias": False})
SPLIT = {"vit", "distilled", "registers", "pooled", "unrotated"}
FUSED_BIAS = "blocks.0.attn.qkv.bias"


@pytest.fixture(autouse=True)
def _more_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"normed": NORMED, "rotated": ROTATED, "unrotated": UNROTATED, "unbiased": UNBIASED}
    for name, make in more.items():
        monkeypatch.setitem(small.MAKES, name, make)


MAKES = sorted({*small.MAKES, "normed", "rotated", "unrotated", "unbiased"})


def _key_gradients(make: str) -> list[Tensor]:
    """Gradient by every element of the fused qkv biases' key parts, and the largest by any other; float64."""
    module = small.backbone(make).module.double()
    biases = {n: p.requires_grad_() for n, p in module.named_parameters() if n.endswith("qkv.bias")}
    gradients = torch.autograd.grad(own_tensors.loss(module(small.images().double())), list(biases.values()))
    keys = torch.cat([gradient.chunk(3)[1] for gradient in gradients])
    rest = torch.cat([gradient.chunk(3)[part] for gradient in gradients for part in (0, 2)])
    return [keys.abs(), rest.abs()]


@pytest.mark.parametrize("make", sorted(SPLIT))
def test_the_bias_of_keys_is_held_where_it_changes_nothing(make: str) -> None:
    keys, rest = _key_gradients(make)
    assert keys.max() < 1e-13 < 1e-6 < rest.max()
    added = own_tensors.attached("bitfit", small.backbone(make))
    assert FUSED_BIAS not in added.specs
    assert {"blocks.0.attn.qkv.bitfit.q", "blocks.1.attn.qkv.bitfit.v"} <= added.specs.keys()
    assert added.inert == len(keys)


@pytest.mark.parametrize("make", ["normed", "rotated"])
def test_the_bias_of_keys_travels_where_it_matters(make: str) -> None:
    keys, _ = _key_gradients(make)
    assert keys.min() > 0
    added = own_tensors.attached("bitfit", small.backbone(make))
    assert FUSED_BIAS in added.specs
    assert not any("bitfit" in name for name in added.specs)
    assert added.inert == 0


@pytest.mark.parametrize("make", MAKES)
def test_all_biases_and_nothing_else(make: str) -> None:
    backbone = small.backbone(make)
    biases = {name: value for name, value in backbone.module.named_parameters() if name.endswith("bias")}
    added = own_tensors.attached("bitfit", backbone)
    own = added.specs.keys() & biases.keys()
    assert biases.keys() - own == {name for name in biases if name.endswith("qkv.bias") and make in SPLIT}
    assert added.specs.keys() - own == {
        f"{name.removesuffix('.bias')}.bitfit.{part}" for name in biases.keys() - own for part in "qv"
    }
    assert own_tensors.count(added.specs) + added.inert == sum(value.numel() for value in biases.values())
    assert {spec.tag.role for spec in added.specs.values()} == {"bias"} == added.learning_rates.keys()


def test_eva_biases_beside_the_qkv_travel_as_they_are() -> None:
    assert "blocks.0.attn.q_bias" in own_tensors.attached("bitfit", small.backbone("eva_fused")).specs


def test_parts_know_their_layer_and_block() -> None:
    tag = own_tensors.attached("bitfit", small.backbone()).specs["blocks.1.attn.qkv.bitfit.q"].tag
    assert (tag.module, tag.block, tag.part) == ("blocks.1.attn.qkv.bitfit", 1, "shared")


@pytest.mark.parametrize(("name", "width"), own_tensors.WIDTHS.items())
def test_counts_are_the_closed_formulas(name: str, width: int) -> None:
    added = own_tensors.attached("bitfit", own_tensors.empty(name))
    exchanged = own_tensors.count(added.specs)
    assert exchanged + added.inert == 12 * 11 * width + 2 * width
    assert exchanged == 12 * 10 * width + 2 * width
    assert width != 768 or (exchanged + added.inert, exchanged) == (102_912, 93_696)


def test_a_run_tells_trained_from_exchanged() -> None:
    experiment = federation.assemble(federation.configure(tuner=[{"name": "bitfit"}]))
    found, inert = results.parameters(experiment), experiment.backbone.num_blocks * experiment.backbone.num_features
    assert found["trainable"] - found["exchanged"] == inert


@pytest.mark.parametrize("make", MAKES)
def test_a_step_is_the_step_of_plain_autograd(make: str) -> None:
    own_tensors.assert_same_step("bitfit", make, lambda name: name.endswith("bias"))


def test_merged_bias_keeps_the_part_of_keys() -> None:
    model = own_tensors.tuned("bitfit")
    before = model.backbone.module.get_parameter(FUSED_BIAS).clone()
    variables = small.moved(dict(model.initial(0)))
    after = compose.merge(model, variables).get_parameter(FUSED_BIAS).chunk(3)
    q, v = (variables[f"blocks.0.attn.qkv.bitfit.{part}"].double() for part in "qv")
    assert all(torch.equal(a, b) for a, b in zip(after, [q, before.chunk(3)[1], v], strict=True))


def test_variables_take_the_place_of_a_changed_bias_too() -> None:
    """A strategy may change the base: q and v are values, not differences from what the bias once was."""
    model = own_tensors.tuned("bitfit")
    bias = model.backbone.module.get_parameter(FUSED_BIAS)
    q, k, v = (part.clone() for part in bias.chunk(3))
    start, images = model.initial(0), small.images().double()
    changed = model.features({**start, FUSED_BIAS: torch.cat([q + 1, k, v - 1])}, images)
    torch.testing.assert_close(changed, model.features(start, images), rtol=1e-12, atol=1e-12)
    assert torch.equal(model.features({}, images), model.features(start, images)), "a missing name keeps its value"


def test_the_bias_belongs_to_the_layer_that_something_rescales() -> None:
    """What scales the output scales the bias; the order of tuners is in test_tuner_compose."""
    backbone = small.backbone()
    layer = backbone.module.get_submodule("blocks.0.attn.qkv")
    model = compose.attach(backbone, [registry.build("tuners", "bitfit", {})], HeadConfig(), 4, Declaration(), 0)
    layer.register_forward_hook(lambda _module, _inputs, output: output * 2)
    variables = small.moved(dict(model.initial(0)))
    before = model.features(variables, small.images())
    torch.testing.assert_close(compose.merge(model, variables)(small.images()), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", ["norm", "full"])
def test_two_tuners_of_one_bias_are_refused(other: str) -> None:
    built = [registry.build("tuners", name, {}) for name in ("bitfit", other)]
    with pytest.raises(ConfigError, match=r"two tuners claim the same tensor(.|\n)*blocks\.0\..*bias"):
        compose.attach(small.backbone(), built, HeadConfig(), 4, Declaration(), 0)


def test_several_parts_and_a_second_time_are_refused() -> None:
    built, backbone = registry.build("tuners", "bitfit", {}), small.backbone()
    with pytest.raises(ConfigError, match="which exist once"):
        built.attach(backbone, [Part("a"), Part("b")], "sum")
    built.attach(backbone, [Part()], "sum")
    with pytest.raises(ConfigError, match="tuned already"):
        built.attach(backbone, [Part()], "sum")
