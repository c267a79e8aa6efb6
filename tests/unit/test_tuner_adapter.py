"""Bottlenecks: the three kinds written out by hand, counts, starts, several parts, and what is refused."""

from __future__ import annotations

from math import erf

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
from tests import by_hand, own_tensors, small

BOTH = (Part("shared"), Part("personal", personal=True))
KINDS = ("pfeiffer", "houlsby", "parallel")


def _model(
    make: str = "vit", parts: tuple[Part, ...] = (Part(),), how: Combination = "sum", **options: object
) -> compose.TunedModel:
    backbone = small.backbone(make)
    backbone.module.double()
    built = registry.build("tuners", "adapter", options)
    return compose.attach(backbone, [built], HeadConfig(), 4, Declaration(parts, how), 0)


def _at(kind: str, name: str) -> bool:
    return name.endswith(".mlp") or (kind == "houlsby" and name.endswith(".attn"))


def _gelu(value: float) -> float:
    return value * (1 + erf(value / 2**0.5)) / 2


@pytest.mark.parametrize("parts", [(Part(),), BOTH], ids=["one", "two"])
@pytest.mark.parametrize(("kind", "scale"), [("pfeiffer", 1), ("houlsby", 1), ("parallel", 0.1), ("houlsby", 0.3)])
def test_the_definition_by_hand(kind: str, scale: float, parts: tuple[Part, ...]) -> None:
    """h + s sum (W_up act(W_down z + b_down) + b_up): z = h after a branch, z = LN(x) beside the MLP."""
    given = {} if scale in (1, 0.1) else {"scale": scale}
    model = _model(parts=parts, kind=kind, width=5, **given)
    v = by_hand.moved(model)

    def edit(name: str, output: Tensor, source: Tensor) -> Tensor:
        if not _at(kind, name):
            return output
        total, z = output, source if kind == "parallel" else output
        for part in parts:
            own = f"{name}.adapter.{part.name}"
            hidden = torch.einsum("rd,bnd->bnr", v[f"{own}.down.weight"], z) + v[f"{own}.down.bias"]
            hidden = hidden * (hidden > 0) if kind == "parallel" else hidden.clone().apply_(_gelu)
            up = torch.einsum("dr,bnr->bnd", v[f"{own}.up.weight"], hidden) + v[f"{own}.up.bias"]
            total = total + scale * up
        return total

    ours = model.features(v, small.images().double())
    torch.testing.assert_close(ours, by_hand.features(edit), rtol=0, atol=1e-10)
    assert not torch.allclose(ours, by_hand.plain())


@pytest.mark.parametrize(("name", "d"), own_tensors.WIDTHS.items())
@pytest.mark.parametrize("kind", KINDS)
def test_count_is_the_closed_formula(name: str, d: int, kind: str) -> None:
    for width in (12, 96):
        specs = own_tensors.attached("adapter", own_tensors.empty(name), kind=kind, width=width).specs
        expected = 12 * (2 * d * width + width + d) * (2 if kind == "houlsby" else 1)
        assert own_tensors.count(specs) == expected
        if kind == "pfeiffer" and d == 768:
            assert expected == {96: 1_779_840, 12: 230_544}[width]


@given(
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 40),
    blocks=st.none() | st.sets(st.integers(0, 1), min_size=1).map(sorted),
    parts=st.sampled_from([(Part(),), BOTH]),
)
@settings(max_examples=20, deadline=None)
def test_any_width_and_place_starts_as_the_frozen_backbone(
    kind: str, width: int, blocks: list[int] | None, parts: tuple[Part, ...]
) -> None:
    model = _model(kind=kind, width=width, blocks=blocks, parts=parts)
    inside = {name: spec for name, spec in model.specs.items() if spec.tag.role != "head"}
    chosen = [0, 1] if blocks is None else blocks
    branches = ["attn", "mlp"] if kind == "houlsby" else ["mlp"]
    assert {spec.tag.module for spec in inside.values()} == {f"blocks.{b}.{at}" for b in chosen for at in branches}
    assert own_tensors.count(inside) == len(chosen) * len(branches) * len(parts) * (2 * 16 * width + width + 16)
    assert {(spec.tag.role, spec.tag.block) for spec in inside.values()} == {("adapter", b) for b in chosen}
    assert {spec.tag.part for spec in inside.values()} == {part.name for part in parts}
    images = small.images().double()
    assert torch.equal(model.features(by_hand.start(model), images), small.backbone().module.double()(images))


def test_only_the_down_matrices_are_drawn() -> None:
    kaiming, normal = _model(width=64).initial(0), _model(width=64, down_std=0.01).initial(0)
    downs = [name for name in kaiming if name.endswith("down.weight")]
    assert len(downs) == 2
    for name in downs:
        assert 0.24 < kaiming[name].abs().max() <= 16**-0.5
        assert 0.009 < normal[name].std() < 0.011
    assert not torch.equal(*[kaiming[name] for name in downs])
    assert not any(value.any() for name, value in kaiming.items() if "adapter" in name and name not in downs)


def test_from_two_zero_matrices_only_the_last_bias_would_ever_move() -> None:
    """Why that start is refused: the gradient of each matrix is a multiple of the other."""
    model = _model(width=4, kind="houlsby")
    start = {name: torch.zeros_like(value).double() for name, value in model.initial(0).items() if "adapter" in name}
    for zero, expected in ((True, {"up.bias"}), (False, {"up.bias", "up.weight", "down.weight", "down.bias"})):
        at = {name: value.clone() if zero else by_hand.moved(model)[name] for name, value in start.items()}
        begin = dict(at)
        for _ in range(20):
            live = {name: value.requires_grad_() for name, value in at.items()}
            loss = own_tensors.loss(model.features(live, small.images().double()))
            slopes = torch.autograd.grad(loss, list(live.values()))
            at = {name: (live[name] - 0.1 * slope).detach() for name, slope in zip(live, slopes, strict=True)}
        moved = {".".join(name.split(".")[-2:]) for name in at if not torch.equal(at[name], begin[name])}
        assert moved == expected
    with pytest.raises(ConfigError, match=r"(?s)can never train: only up\.bias would ever move"):
        registry.build("tuners", "adapter", {"down_std": 0.0})


def test_dropout_acts_where_gradients_are_recorded() -> None:
    model = _model(dropout=0.5)
    variables, images = by_hand.moved(model), small.images().double()
    with torch.no_grad():
        still = [model.features(variables, images) for _ in range(2)]
    assert torch.equal(*still)
    assert torch.equal(still[0], _model().features(variables, images))
    assert not torch.equal(model.features(variables, images), model.features(variables, images))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    by_hand.assert_gradients_are_finite_differences(_model(kind=kind, width=3, blocks=[1], parts=BOTH))


@pytest.mark.parametrize("make", sorted(small.MAKES))
@pytest.mark.parametrize("kind", KINDS)
def test_every_make_feels_every_adapter(make: str, kind: str) -> None:
    model = _model(make, kind=kind, width=16)  # wide enough that no bottleneck of relus is dead
    variables, images = by_hand.moved(model), small.images().double()
    live = {name: value.requires_grad_() for name, value in variables.items() if "adapter" in name}
    slopes = torch.autograd.grad(own_tensors.loss(model.features(live, images)), list(live.values()))
    assert len(live) == 8 * (2 if kind == "houlsby" else 1)
    assert all(slope.any() for slope in slopes)


def test_the_order_of_a_hybrid_changes_nothing() -> None:
    tables = [("adapter", {"kind": "houlsby"}), ("lora", {"targets": ["proj", "fc2"]}), ("norm", {}), ("ia3", {})]
    models = []
    for order in (tables, tables[::-1]):
        built = [registry.build("tuners", name, options) for name, options in order]
        models.append(compose.attach(small.backbone(), built, HeadConfig(), 4, Declaration(), 0))
    variables = small.moved(dict(models[0].initial(0)))
    assert torch.equal(*[model.forward(variables, small.images()) for model in models])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "width"),
        ({"width": 2.5}, "width"),
        ({"kind": "lohra"}, "pfeiffer"),
        ({"scale": 0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"dropout": 1.0}, "dropout"),
        ({"down_std": -1}, "down_std"),
        ({"blocks": [2]}, "no such block"),
        ({"rank": 4}, "unknown key"),
        ({"how": "router", "parts": BOTH}, "cannot be routed"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _model(**options)  # type: ignore[arg-type]


def test_one_place_bears_one_table() -> None:
    def both(*tables: dict[str, object]) -> compose.TunedModel:
        built = [registry.build("tuners", "adapter", table) for table in tables]
        return compose.attach(small.backbone(), built, HeadConfig(), 4, Declaration(), 0)

    assert len(both({"blocks": [0], "width": 2}, {"blocks": [1], "width": 3}).specs) == 2 + 8
    with pytest.raises(ConfigError, match="already"):
        both({}, {"kind": "parallel"})


def test_merging_is_refused_with_the_reason() -> None:
    model = _model()
    with pytest.raises(ConfigError, match="no linear map"):
        compose.merge(model, model.initial(0))
