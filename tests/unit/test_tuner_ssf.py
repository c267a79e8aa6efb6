"""Scales and shifts: the definition by hand, counts, shifts of keys, folding, several parts, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium import registry
from consilium.config import HeadConfig
from consilium.errors import ConfigError
from consilium.protocols import Combination, Declaration, Part
from consilium.tuners import compose, scaling
from tests import by_hand, own_tensors, small

BOTH = (Part("shared"), Part("personal", personal=True))
MORE = {
    "normed": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "rotated": ("vit_small_patch16_rope_224", {}),
    "unbiased": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "rms": ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}),
    "beit": ("beit_base_patch16_224", {"init_values": 0.1}),
}


@pytest.fixture(autouse=True)
def _more_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in MORE.items():
        monkeypatch.setitem(small.MAKES, name, make)


def _model(
    make: str = "vit", parts: tuple[Part, ...] = (Part(),), how: Combination = "sum", **options: object
) -> compose.TunedModel:
    return _hybrid([("ssf", options)], make, parts, how)


def _hybrid(
    tables: Sequence[tuple[str, dict[str, object]]],
    make: str = "vit",
    parts: tuple[Part, ...] = (Part(),),
    how: Combination = "sum",
) -> compose.TunedModel:
    backbone = small.backbone(make)
    backbone.module.double()
    built = [registry.build("tuners", name, options) for name, options in tables]
    return compose.attach(backbone, built, HeadConfig(), 4, Declaration(parts, how), 0)


def _shift(name: str, given: Tensor) -> Tensor:
    """[out], with any values for keys: they must change nothing."""
    if not name.endswith("qkv"):
        return given
    q, v = given.chunk(2)
    return torch.cat([q, torch.linspace(-3, 3, len(q), dtype=q.dtype), v])


@pytest.mark.parametrize("parts", [(Part(),), BOTH], ids=["one", "two"])
def test_the_definition_by_hand(parts: tuple[Part, ...]) -> None:
    """g y + b after every operation, for every tensor of the published method, keys' shifts included."""
    model = _model(parts=parts)
    v, places = by_hand.moved(model), set()

    def edit(name: str, output: Tensor, source: Tensor) -> Tensor:  # noqa: ARG001
        if name.endswith((".act", ".attn", ".mlp")):
            return output
        places.add(name)
        scale = 1 + sum(v[f"{name}.ssf.{part.name}.scale"] - 1 for part in parts)
        return scale * output + _shift(name, sum(v[f"{name}.ssf.{part.name}.shift"] for part in parts))

    expected = by_hand.features(edit)
    torch.testing.assert_close(model.features(v, small.images().double()), expected, rtol=0, atol=1e-10)
    assert {spec.tag.module for spec in model.specs.values()} == {*places, "head"}
    assert not torch.allclose(expected, by_hand.plain())


@pytest.mark.parametrize(("name", "d"), own_tensors.WIDTHS.items())
def test_count_is_the_closed_formula(name: str, d: int) -> None:
    """2 (norm1 d, qkv 3 d, proj d, norm2 d, fc1 4 d, fc2 d) per block, 2 (d, d) for patches and the last norm."""
    added = own_tensors.attached("ssf", own_tensors.empty(name))
    assert own_tensors.count(added.specs) + added.inert == 12 * 22 * d + 4 * d
    assert added.inert == 12 * d
    assert d != 768 or own_tensors.count(added.specs) == 205_824 - 9_216


@pytest.mark.parametrize("make", sorted({*small.MAKES, *MORE}))
def test_merged_equals_unmerged(make: str) -> None:
    by_hand.assert_merged_equals_unmerged(_model(make, parts=BOTH))


@pytest.mark.parametrize(
    ("make", "pieces", "inert"),
    [("vit", 2, 32), ("normed", 3, 0), ("rotated", 3, 0), ("unbiased", 0, 0), ("eva_fused", 2, 0), ("beit", 2, 0)],
)
def test_keys_are_shifted_where_that_changes_something_and_can_be_folded(make: str, pieces: int, inert: int) -> None:
    added = own_tensors.attached("ssf", small.backbone(make))
    shifts = {name: spec.shape for name, spec in added.specs.items() if name.endswith("qkv.ssf.shared.shift")}
    assert set(shifts.values()) == ({(pieces * 16,)} if pieces else set())
    assert added.inert == inert


def test_separate_keys_of_plain_attention_are_not_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    unrotated = {"use_rot_pos_emb": False, "use_abs_pos_emb": True, "qkv_fused": False}
    monkeypatch.setitem(small.MAKES, "apart", ("vit_small_patch16_rope_224", unrotated))
    added = own_tensors.attached("ssf", small.backbone("apart"))
    shifted = {name.split(".")[3] for name in added.specs if name.endswith("_proj.ssf.shared.shift")}
    assert shifted == {"q_proj", "v_proj"}
    assert added.inert == 2 * 16
    by_hand.assert_merged_equals_unmerged(_model("apart"))


def test_a_bias_behind_the_layer_is_scaled_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """EVA with fused and with separate q, k, v: the same function of the same vectors."""
    monkeypatch.setitem(small.MAKES, "eva_split", ("eva02_tiny_patch14_224", {"qkv_fused": False}))
    fused, split = _model("eva_fused"), _model("eva_split")
    variables = by_hand.moved(fused)
    separate = {}
    for name, value in [*fused.backbone.module.state_dict().items(), *variables.items()]:
        separate |= _split(name, value)
    own = split.backbone.module.state_dict()
    split.backbone.module.load_state_dict(
        {n: v for n, v in separate.items() if n in own and ".ssf." not in n}, strict=False
    )
    images = small.images().double()
    ours = split.features({name: separate[name] for name in split.specs}, images)
    torch.testing.assert_close(ours, fused.features(variables, images), rtol=0, atol=1e-10)


def _split(name: str, value: Tensor) -> dict[str, Tensor]:
    if ".attn.qkv." in name:
        letters = "qv" if name.endswith("shift") else "qkv"
        return {
            name.replace("qkv", f"{x}_proj"): piece for x, piece in zip(letters, value.chunk(len(letters)), strict=True)
        }
    for letter in "qv":
        if name.endswith(f".{letter}_bias"):
            return {name.replace(f"{letter}_bias", f"{letter}_proj.bias"): value}
    return {name: value}


@given(
    targets=st.none() | st.sets(st.sampled_from(["norm", "qkv", "proj", "fc1", "fc2"]), min_size=1).map(sorted),
    blocks=st.none() | st.sets(st.integers(0, 1), min_size=1).map(sorted),
    parts=st.sampled_from([(Part(),), BOTH]),
)
@settings(max_examples=20, deadline=None)
def test_any_choice_starts_as_the_frozen_backbone(
    targets: list[str] | None, blocks: list[int] | None, parts: tuple[Part, ...]
) -> None:
    model = _model(targets=targets, blocks=blocks, parts=parts)
    inside = {name: spec for name, spec in model.specs.items() if spec.tag.role != "head"}
    widths = {"norm": 4 * 16, "qkv": 5 * 16, "proj": 2 * 16, "fc1": 8 * 16, "fc2": 2 * 16}
    chosen = [0, 1] if blocks is None else blocks
    expected = len(chosen) * sum(widths[target] for target in targets or widths)
    beside = {"patch_embed": 32 * (targets is None), "norm": 32 * (targets is None or "norm" in targets)}
    assert own_tensors.count(inside) == len(parts) * (expected + sum(beside.values()) * (blocks is None))
    assert {spec.tag.role for spec in inside.values()} == {"ssf"}
    images = small.images().double()
    assert torch.equal(model.features(by_hand.start(model), images), small.backbone().module.double()(images))


def test_the_published_start_is_a_draw_around_the_identity() -> None:
    initial, again = _model(std=0.02).initial(0), _model(std=0.02).initial(1)
    for end, mean in (("scale", 1), ("shift", 0)):
        values = torch.cat([value for name, value in initial.items() if name.endswith(end)])
        assert abs(values.mean() - mean) < 0.005
        assert 0.017 < values.std() < 0.023
    assert not torch.equal(initial["norm.ssf.shared.scale"], again["norm.ssf.shared.scale"])
    assert not torch.equal(initial["norm.ssf.shared.scale"], initial["blocks.0.norm1.ssf.shared.scale"])


def test_gradients_are_those_of_finite_differences() -> None:
    by_hand.assert_gradients_are_finite_differences(_model())


ORDERS = list(permutations([("lora", {"targets": ["qkv", "fc1", "fc2"]}), ("bitfit", {}), ("ia3", {}), ("ssf", {})]))


@pytest.mark.parametrize("make", ["vit", "eva_fused"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("order", [0, 5, 11, 14, 23])
def test_what_others_add_to_a_layer_is_rescaled_in_any_order(make: str, dora: bool, order: int) -> None:
    def tables(number: int) -> list[tuple[str, dict[str, object]]]:
        return [(name, {**own, "dora": dora} if name == "lora" else own) for name, own in ORDERS[number]]

    first, other = _hybrid(tables(0), make), _hybrid(tables(order), make)
    images = small.images().double()
    assert torch.equal(*[model.features(by_hand.moved(first), images) for model in (first, other)])
    by_hand.assert_merged_equals_unmerged(other)


@pytest.mark.parametrize("turn", [1, -1])
def test_the_backbone_s_own_tensors_are_merged_below(turn: int) -> None:
    by_hand.assert_merged_equals_unmerged(_hybrid([("ssf", {}), ("lora", {}), ("full", {})][::turn]))


def test_half_precision_keeps_the_type_and_a_small_scale() -> None:
    """1.003 is 1 in bfloat16; the layer's output stays in half precision, which its reader may count on."""
    output = torch.full((2,), 250.0, dtype=torch.bfloat16)
    changed = scaling.rescaled(output, torch.full((2,), 1.003), torch.zeros(2), None)
    assert changed.dtype == torch.bfloat16
    assert changed.tolist() == [251.0, 251.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": []}, "targets"),
        ({"targets": ["attn"]}, "targets"),
        ({"targets": ["patch_embed"], "blocks": [0]}, "no module has this role"),
        ({"blocks": [2]}, "no such block"),
        ({"std": -0.1}, "std"),
        ({"gamma": 1}, "unknown key"),
        ({"how": "router", "parts": BOTH}, "cannot be routed"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _model(**options)  # type: ignore[arg-type]


def test_one_module_bears_one_table() -> None:
    assert _hybrid([("ssf", {"targets": ["qkv"]}), ("ssf", {"targets": ["norm"]})]).specs
    with pytest.raises(ConfigError, match="already"):
        _hybrid([("ssf", {}), ("ssf", {"targets": ["norm"]})])
