"""Rescaling vectors: the definition by hand, counts, folding, several parts, full vectors for peft, and refusals."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium import registry
from consilium.config import HeadConfig
from consilium.errors import ConfigError
from consilium.protocols import Combination, Declaration, Part
from consilium.tuners import compose
from consilium.tuners.ia3 import vectors
from tests import by_hand, own_tensors, small

BOTH = (Part("shared"), Part("personal", personal=True))
LETTERS = ("q", "k", "v", "fc2")


def _model(
    make: str = "vit", parts: tuple[Part, ...] = (Part(),), how: Combination = "sum", **options: object
) -> compose.TunedModel:
    return _hybrid([("ia3", options)], make, parts, how)


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


def _vector(variables: dict[str, Tensor], name: str, parts: Sequence[Part]) -> Tensor:
    return 1 + sum(variables[f"{name}.ia3.{part.name}"] - 1 for part in parts)


@pytest.mark.parametrize("parts", [(Part(),), BOTH], ids=["one", "two"])
def test_the_definition_by_hand(parts: tuple[Part, ...]) -> None:
    """Keys, values and gelu(W_1 x), each times its vector."""
    model = _model(parts=parts)
    v = by_hand.moved(model)

    def edit(name: str, output: Tensor, source: Tensor) -> Tensor:  # noqa: ARG001
        if name.endswith("attn.qkv"):
            keys, values = _vector(v, name, parts).chunk(2)
            return torch.cat([x * y for x, y in zip(output.chunk(3, -1), (1, keys, values), strict=True)], -1)
        return output * _vector(v, name.replace("act", "fc2"), parts) if name.endswith("mlp.act") else output

    expected = by_hand.features(edit)
    torch.testing.assert_close(model.features(v, small.images().double()), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(expected, by_hand.plain())


@pytest.mark.parametrize(("name", "d"), own_tensors.WIDTHS.items())
def test_count_is_the_closed_formula(name: str, d: int) -> None:
    backbone = own_tensors.empty(name)
    assert own_tensors.count(own_tensors.attached("ia3", backbone).specs) == 12 * 6 * d
    assert d != 768 or 12 * 6 * d == 55_296
    whole = own_tensors.attached("ia3", own_tensors.empty(name), targets=LETTERS).specs
    assert own_tensors.count(whole) == 12 * 7 * d


@pytest.mark.parametrize("targets", [("k", "v", "fc2"), LETTERS, ("v",)], ids="".join)
@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_merged_equals_unmerged(make: str, targets: tuple[str, ...]) -> None:
    by_hand.assert_merged_equals_unmerged(_model(make, parts=BOTH, targets=targets))


def test_a_bias_behind_the_layer_is_rescaled_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """EVA with fused and with separate q, k, v: the same function of the same vectors."""
    monkeypatch.setitem(small.MAKES, "eva_split", ("eva02_tiny_patch14_224", {"qkv_fused": False}))
    fused, split = _model("eva_fused"), _model("eva_split")
    variables, separate = by_hand.moved(fused), {}
    for name, value in [*fused.backbone.module.state_dict().items(), *variables.items()]:
        letters = ("kv" if ".ia3." in name else "qkv") if ".attn.qkv." in name else ""
        for letter, piece in zip(letters, value.chunk(max(len(letters), 1)), strict=bool(letters)):
            separate[name.replace("qkv", f"{letter}_proj")] = piece
        separate[name.replace("q_bias", "q_proj.bias").replace("v_bias", "v_proj.bias")] = value
    own = {name for name in split.backbone.module.state_dict() if ".ia3." not in name}
    split.backbone.module.load_state_dict({name: separate[name] for name in own}, strict=False)
    images = small.images().double()
    ours = split.features({name: separate[name] for name in split.specs}, images)
    torch.testing.assert_close(ours, fused.features(variables, images), rtol=0, atol=1e-10)


@given(
    targets=st.sets(st.sampled_from(LETTERS), min_size=1).map(sorted),
    blocks=st.none() | st.sets(st.integers(0, 1), min_size=1).map(sorted),
    parts=st.sampled_from([(Part(),), BOTH]),
    make=st.sampled_from(["vit", "eva_apart"]),
)
@settings(max_examples=25, deadline=None)
def test_any_choice_starts_as_the_frozen_backbone(
    targets: list[str], blocks: list[int] | None, parts: tuple[Part, ...], make: str
) -> None:
    model = _model(make, targets=targets, blocks=blocks, parts=parts)
    inside = {name: spec for name, spec in model.specs.items() if spec.tag.role != "head"}
    hidden = model.backbone.module.get_submodule("blocks.0.mlp.fc2").in_features
    per_block = sum(hidden if letter == "fc2" else 16 for letter in targets)
    chosen = [0, 1] if blocks is None else blocks
    assert own_tensors.count(inside) == len(chosen) * len(parts) * per_block
    assert {(spec.tag.role, spec.tag.block) for spec in inside.values()} == {("ia3", block) for block in chosen}
    images = small.images().double()
    assert torch.equal(model.features(by_hand.start(model), images), small.backbone(make).module.double()(images))


def test_full_vectors_have_ones_where_nothing_is_tuned() -> None:
    model = _model(targets=["v", "fc2"], blocks=[1], parts=BOTH)
    variables = by_hand.moved(model)
    found = vectors(model.backbone, variables)
    assert {name: (len(value), feedforward) for name, (value, feedforward) in found.items()} == {
        "blocks.1.attn.qkv": (48, False),
        "blocks.1.mlp.fc2": (64, True),
    }
    q, k, v = found["blocks.1.attn.qkv"][0].chunk(3)
    assert torch.equal(torch.stack([q, k]), torch.ones(2, 16).double())
    own = [variables[f"blocks.1.attn.qkv.ia3.{part.name}"] for part in BOTH]
    torch.testing.assert_close(v, own[0] + own[1] - 1)
    assert not vectors(small.backbone(), {})


def test_gradients_are_those_of_finite_differences() -> None:
    by_hand.assert_gradients_are_finite_differences(_model())
    by_hand.assert_gradients_are_finite_differences(_model("eva_fused", parts=BOTH))


@pytest.mark.parametrize("make", ["vit", "eva_fused"])
@pytest.mark.parametrize(
    "tables",
    [
        [("lora", {"targets": ["qkv", "fc2"]}), ("ia3", {})],
        [("bitfit", {}), ("ia3", {})],
        [("full", {}), ("lora", {}), ("ia3", {})],
    ],
    ids=lambda tables: "+".join(name for name, _ in tables),
)
def test_what_others_add_to_a_layer_is_rescaled_too(make: str, tables: list[tuple[str, dict[str, object]]]) -> None:
    for order in (tables, tables[::-1]):
        by_hand.assert_merged_equals_unmerged(_hybrid(order, make))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": []}, "targets"),
        ({"targets": ["qkv"]}, "targets"),
        ({"blocks": [2]}, "no such block"),
        ({"blocks": [-1]}, "no such block"),
        ({"alpha": 1}, "unknown key"),
        ({"how": "router", "parts": BOTH}, "cannot be routed"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _model(**options)  # type: ignore[arg-type]


def test_one_layer_bears_one_table() -> None:
    assert _hybrid([("ia3", {"targets": ["k"]}), ("ia3", {"targets": ["fc2"]})]).specs
    with pytest.raises(ConfigError, match="already"):
        _hybrid([("ia3", {"targets": ["k"]}), ("ia3", {"targets": ["v"]})])
