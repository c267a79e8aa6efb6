"""Low-rank prompts: they are prompts L R, their start varies as prompts do, their products can be folded; refusals."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium import registry, tensors
from consilium.backbones import roles
from consilium.config import HeadConfig
from consilium.errors import ConfigError
from consilium.products import products
from consilium.protocols import Backbone, Combination, Declaration, Part
from consilium.tuners import compose
from tests import small

BOTH = (Part("shared"), Part("personal", personal=True))
FORMS = {"shallow": {}, "deep": {"depth": "deep"}, "one basis": {"depth": "deep", "share_basis": True}}
WIDTH = 16


def _model(
    backbone: Backbone | None = None,
    parts: tuple[Part, ...] = (Part(),),
    how: Combination = "sum",
    name: str = "low_rank_prompts",
    **options: object,
) -> compose.TunedModel:
    defaults: dict[str, object] = {"length": 7, "rank": 2} if name == "low_rank_prompts" else {"length": 7}
    built = registry.build("tuners", name, {**defaults, **options})
    return compose.attach(backbone or _double(), [built], HeadConfig(), 4, Declaration(parts, how), 0)


def _double(make: str = "vit") -> Backbone:
    backbone = small.backbone(make)
    backbone.module.double()
    return backbone


def _moved(model: compose.TunedModel) -> dict[str, Tensor]:
    return {name: value.double() for name, value in small.moved(dict(model.initial(0)), 0.5).items()}


def _product(variables: tensors.Tensors, layer: int, part: str = "shared") -> Tensor:
    """L_layer R_layer [length, d]; R_0 where there is one for all."""
    stem = f"low_rank_prompts.{part}"
    right = variables.get(f"{stem}.right.{layer}", variables[f"{stem}.right.0"])
    return torch.stack(
        [sum(a * row for a, row in zip(line, right, strict=True)) for line in variables[f"{stem}.left.{layer}"]]
    )


def _images() -> Tensor:
    return small.images().double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_it_is_prompts_with_the_tokens_l_r(make: str, form: str) -> None:
    model, options = _model(_double(make), **FORMS[form]), FORMS[form]
    plain = _model(_double(make), name="prompts", depth=options.get("depth", "shallow"))
    variables = _moved(model)
    same = {n: _product(variables, int(n[-1])) for n in plain.specs if n.startswith("prompts")}
    same |= {n: v for n, v in variables.items() if n.startswith("head")}
    torch.testing.assert_close(model.features(variables, _images()), plain.features(same, _images()))


@pytest.mark.parametrize("form", FORMS)
def test_an_identity_for_l_makes_prompts_of_r(form: str) -> None:
    model = _model(rank=3, **FORMS[form])
    variables, module = _moved(model), model.backbone.module
    for name in [name for name in variables if ".left." in name]:
        variables[name] = torch.eye(7, 3, dtype=torch.float64)
    seen: list[Tensor] = []
    module.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 1:8]))
    module.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 1:8]))
    model.features(variables, _images())
    right = "low_rank_prompts.shared.right."
    last = seen[1] if form == "deep" else seen[0]
    assert torch.equal(seen[0][:, :3], variables[f"{right}0"].expand(3, -1, -1))
    assert not seen[0][:, 3:].any()
    if form != "shallow":
        expected = variables[f"{right}1" if form == "deep" else f"{right}0"]
        assert torch.equal(last[:, :3], expected.expand(3, -1, -1))


@settings(max_examples=25, deadline=None)
@given(length=st.integers(3, 30), rank=st.integers(1, 8), form=st.sampled_from(sorted(FORMS)), two=st.booleans())
def test_any_shape_gives_the_sum_of_the_products(length: int, rank: int, form: str, two: bool) -> None:
    layers, parts = (1 if form == "shallow" else 2), (BOTH if two else BOTH[:1])
    bases = 1 if form == "one basis" else layers
    cost, whole = rank * (layers * length + bases * WIDTH), layers * length * WIDTH
    if rank >= length or cost >= whole:
        with pytest.raises(ConfigError, match=r"save nothing"):
            _model(length=length, rank=rank, **FORMS[form])
        return
    model = _model(parts=parts, length=length, rank=rank, **FORMS[form])
    variables = _moved(model)
    trained = [value.numel() for name, value in variables.items() if not name.startswith("head")]
    assert sum(trained) == cost * len(parts)
    adapter = model.backbone.module.get_submodule("low_rank_prompts")
    inside = {n.removeprefix("low_rank_prompts."): v for n, v in variables.items() if not n.startswith("head")}
    for layer in range(layers):
        made = torch.func.functional_call(adapter, inside, (layer,))
        torch.testing.assert_close(made, sum(_product(variables, layer, part.name) for part in parts))


@pytest.mark.parametrize("form", FORMS)
def test_only_the_product_counts(form: str) -> None:
    """(L G) (G^-1 R) = L R."""
    model = _model(**FORMS[form])
    variables = _moved(model)
    turn = torch.tensor([[2.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
    turned = {n: v @ turn if ".left." in n else v for n, v in variables.items()}
    turned = {n: turn.inverse() @ v if ".right." in n else v for n, v in turned.items()}
    torch.testing.assert_close(model.features(turned, _images()), model.features(variables, _images()))


@pytest.mark.parametrize("form", FORMS)
def test_products_can_be_folded_into_their_offsets(form: str) -> None:
    model = _model(parts=BOTH, **FORMS[form])
    variables = _moved(model)
    found = products(model.specs)
    assert len(found) == (2 if form == "deep" else 1) * len(BOTH)
    folded = dict(variables)
    for product in found:
        for left, base in zip(product.left, product.base, strict=True):
            before = folded.get(base, model.backbone.module.get_parameter(base))
            folded[base] = before + product.scale * variables[left] @ variables[product.right]
            folded[left] = torch.zeros_like(variables[left])
    assert not any(base in model.specs for product in found for base in product.base)
    torch.testing.assert_close(model.features(folded, _images()), model.features(variables, _images()))
    assert not torch.allclose(model.features(folded, _images()), model.features({**folded, **variables}, _images()))


def test_layers_of_one_basis_are_in_the_order_of_the_blocks() -> None:
    """Ten and eleven come behind nine, not behind one."""
    preprocessing = small.backbone().preprocessing
    with torch.device("meta"):
        module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
        backbone = Backbone(module, "", "", preprocessing, roles.find(module), 12, 192, 0)
        model = _model(backbone, length=50, rank=4, depth="deep", share_basis=True)
    (product,) = products(model.specs)
    assert product.base == tuple(f"low_rank_prompts.offset.{layer}" for layer in range(12))
    assert product.left == tuple(f"low_rank_prompts.shared.left.{layer}" for layer in range(12))
    assert product.right == "low_rank_prompts.shared.right.0"


@pytest.mark.parametrize("form", FORMS)
def test_tags_say_role_and_block(form: str) -> None:
    specs = {n: s for n, s in _model(**FORMS[form]).specs.items() if not n.startswith("head")}
    places = {n.removeprefix("low_rank_prompts.shared."): (s.tag.role, s.tag.block) for n, s in specs.items()}
    left, right = "prompt_left", "prompt_right"
    assert (
        places
        == {
            "shallow": {"left.0": (left, 0), "right.0": (right, 0)},
            "deep": {"left.0": (left, 0), "left.1": (left, 1), "right.0": (right, 0), "right.1": (right, 1)},
            "one basis": {"left.0": (left, 0), "left.1": (left, 1), "right.0": (right, None)},
        }[form]
    )


def test_offsets_are_frozen_and_zero() -> None:
    module = _model(depth="deep").backbone.module
    offsets = {name: value for name, value in module.named_parameters() if ".offset." in name}
    assert {name: tuple(value.shape) for name, value in offsets.items()} == {
        "low_rank_prompts.offset.0": (7, WIDTH),
        "low_rank_prompts.offset.1": (7, WIDTH),
    }
    assert not any(value.requires_grad or value.any() for value in offsets.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_entries_of_the_start_vary_as_those_of_prompts(rank: int, form: str) -> None:
    model = _model(length=40, rank=rank, **FORMS[form])
    plain = _model(name="prompts", length=40, depth=FORMS[form].get("depth", "shallow"))
    for layer in range(1 if form == "shallow" else 2):
        made = torch.stack([_product(model.initial(seed), layer) for seed in range(150)])
        drawn = torch.stack([plain.initial(seed)[f"prompts.shared.tokens.{layer}"] for seed in range(150)])
        assert abs(float(made.mean())) < 0.005
        assert float(made.var()) == pytest.approx(float(drawn.var()), rel=0.06)
        assert float(made.var()) == pytest.approx(2 / (3 * 8 * 8 + WIDTH), rel=0.06)


def test_layers_start_apart() -> None:
    initial = _model(depth="deep").initial(0)
    for kind in ("left", "right"):
        first, second = (initial[f"low_rank_prompts.shared.{kind}.{layer}"] for layer in (0, 1))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_part_starts_as_nothing_and_can_learn(form: str) -> None:
    one, two = _model(**FORMS[form]), _model(parts=BOTH, **FORMS[form])
    start = {name: value.double() for name, value in two.initial(0).items()}
    alone = {name: value for name, value in start.items() if ".personal." not in name}
    torch.testing.assert_close(two.features(start, _images()), one.features(alone, _images()), rtol=0, atol=0)
    live = {name: value.requires_grad_() for name, value in start.items()}
    two.features(live, _images()).square().sum().backward()
    assert all(value.grad.any() for name, value in live.items() if ".personal.left." in name)


def test_factors_cut_or_padded_with_zeros_mean_the_same() -> None:
    model = _model(parts=(Part(rank=3),), depth="deep")
    variables = _moved(model)
    assert variables["low_rank_prompts.shared.left.0"].shape == (7, 3)
    cut, padded = dict(variables), dict(variables)
    for name, value in variables.items():
        if not name.startswith("head"):
            axis = 1 if ".left." in name else 0
            cut[name] = value.narrow(axis, 0, 1)
            padded[name] = torch.cat([cut[name], torch.zeros_like(value.narrow(axis, 0, 2))], axis)
    torch.testing.assert_close(model.features(cut, _images()), model.features(padded, _images()))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    model, images = _model(parts=BOTH, length=4, rank=2, **FORMS[form]), small.images(1).double()
    variables = _moved(model)
    names = [name for name in variables if not name.startswith("head")]

    def function(*values: Tensor) -> Tensor:
        return model.features({**variables, **dict(zip(names, values, strict=True))}, images)

    assert torch.autograd.gradcheck(function, [variables[name].requires_grad_() for name in names])


def test_dropout_acts_where_gradients_are_recorded() -> None:
    model, plain = _model(dropout=0.5), _model()
    variables = _moved(model)
    with torch.no_grad():
        assert torch.equal(model.features(variables, _images()), plain.features(variables, _images()))
    assert not torch.equal(model.features(variables, _images()), model.features(variables, _images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_comes_close(dtype: torch.dtype) -> None:
    model = _model(small.backbone("eva_fused"), depth="deep", share_basis=True)
    variables = small.moved(dict(model.initial(0)), 0.02)
    full = model.forward(variables, small.images())
    with torch.autocast("cpu", dtype=dtype):
        half = model.forward(variables, small.images())
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 7}, r"(?s)rank 7 is not below length 7.*takes 161 scalars.*themselves 112.*1 to 4 "),
        ({"rank": 5}, r"(?s)rank 5 takes 115 scalars, the prompts themselves 112.*1 to 4 "),
        ({"rank": 7, "depth": "deep", "share_basis": True}, r"(?s)not below length.*1 to 6 "),
        ({"rank": 8, "length": 16}, r"(?s)takes 256 scalars, the prompts themselves 256.*1 to 7 "),
        ({"rank": 1, "length": 1}, r"(?s)not below length 1.*no rank"),
        ({"share_basis": True}, 'needs depth = "deep"'),
        ({"rank": 0}, "rank"),
        ({"length": 0}, "length"),
        ({"dropout": 1.0}, "dropout"),
        ({"depth": "middle"}, "depth"),
        ({"basis": True}, "unknown key"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _model(**options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [2, 5, 16, 23])
def test_the_largest_rank_that_is_allowed_is_said(length: int, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _model(length=length, rank=99, **FORMS[form])
    largest = int(str(caught.value.allowed).split()[2])
    model = _model(length=length, rank=largest, **FORMS[form])
    layers = 1 if form == "shallow" else 2
    sizes = [math.prod(s.shape) for s in model.specs.values() if s.tag.role != "head"]
    assert sum(sizes) < layers * length * WIDTH
    with pytest.raises(ConfigError, match="save nothing"):
        _model(length=length, rank=largest + 1, **FORMS[form])


def test_ranks_of_sites_are_refused_as_prompts_of_another_rank_would_start_as_others() -> None:
    with pytest.raises(ConfigError, match="ranks are for lora"):
        _model(parts=(Part(ranks={"b": 1}),))


def test_a_router_is_refused() -> None:
    with pytest.raises(ConfigError, match="'low_rank_prompts' adds its parts up"):
        _model(parts=BOTH, how="router")
