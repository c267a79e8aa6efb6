"""LoRA's own options: counts, scales, dropout, several parts, the router, ranks, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch

from consilium import registry, tensors
from consilium.backbones import recompute, timm_backbone
from consilium.config import BackboneConfig, HeadConfig
from consilium.errors import ConfigError
from consilium.products import products
from consilium.protocols import Backbone, Combination, Declaration, Part
from consilium.tuners import compose, low_rank
from consilium.tuners.lora import LoraOptions, factors
from tests import small

BOTH = (Part("shared"), Part("personal", personal=True))


def _model(
    backbone: Backbone | None = None, parts: tuple[Part, ...] = (Part(),), how: Combination = "sum", **options: object
) -> compose.TunedModel:
    built = registry.build("tuners", "lora", options)
    return compose.attach(backbone or small.backbone(), [built], HeadConfig(), 4, Declaration(parts, how), 0)


def _lora_count(model: compose.TunedModel) -> int:
    return sum(v.numel() for n, v in model.initial(0).items() if not n.startswith("head"))


@pytest.mark.parametrize(("width", "name"), [(192, "vit_tiny_patch16_224"), (768, "vit_base_patch16_224")])
def test_count_is_the_closed_formula(width: int, name: str) -> None:
    """4 d r per block on a fused qkv: 36,864 r for ViT-B; 8 d r with proj added to qkv is 6 d r."""
    if width == 768:  # the names and shapes of ViT-B without its memory
        with torch.device("meta"):
            module = timm.create_model(name, num_classes=0)
        template = timm_backbone.roles.find(module)
        backbone = Backbone(module, name, "", small.backbone().preprocessing, template, 12, 768, 0)
    else:
        backbone = timm_backbone.load(BackboneConfig(name=name, weights="random", image_size=32))
    built = registry.build("tuners", "lora", {"rank": 3, "targets": ["qkv", "proj"]})
    specs = built.attach(backbone, [Part()], "sum").specs
    sizes = {name: torch.Size(spec.shape).numel() for name, spec in specs.items()}
    assert sum(size for name, size in sizes.items() if ".qkv." in name) == 12 * 4 * width * 3
    assert sum(sizes.values()) == 12 * 6 * width * 3


def test_scale_is_alpha_over_rank_or_its_root() -> None:
    assert LoraOptions(rank=4).scale(4) == 1
    assert LoraOptions(rank=4, alpha=8).scale(4) == 2
    assert LoraOptions(rank=4, alpha=8, rank_stabilised=True).scale(4) == 4


def test_the_definition_by_hand() -> None:
    """One target, one block: W x + s B A x computed with plain matrices."""
    model = _model(rank=2, alpha=6.0, blocks=[1], targets=["fc2"])
    assert {spec.tag.module for spec in model.specs.values()} == {"blocks.1.mlp.fc2", "head"}
    variables = small.moved(dict(model.initial(0)))
    a, b = variables["blocks.1.mlp.fc2.lora.shared.a"], variables["blocks.1.mlp.fc2.lora.shared.b"]
    reference = small.backbone().module
    with torch.no_grad():
        reference.get_parameter("blocks.1.mlp.fc2.weight").add_(3.0 * b @ a)
    torch.testing.assert_close(model.features(variables, small.images()), reference(small.images()))


def test_patch_embedding_is_never_a_target_named_proj() -> None:
    model = _model(targets=["proj"], rank=2)
    assert {spec.tag.module for spec in model.specs.values()} == {"blocks.0.attn.proj", "blocks.1.attn.proj", "head"}


def test_start_of_a_is_uniform_within_one_over_root_of_width() -> None:
    model = _model(rank=8)
    initial, other = model.initial(0), model.initial(1)
    for name, value in initial.items():
        if name.endswith(".a"):
            assert 0.2 < value.abs().max() <= 16**-0.5
            assert abs(value.mean()) < 0.08
            assert not torch.equal(value, other[name])
        if name.endswith(".b"):
            assert not value.any()
    blocks = [initial[f"blocks.{i}.attn.qkv.lora.shared.a"] for i in (0, 1)]
    assert not torch.equal(*blocks)


def test_dropout_acts_where_gradients_are_recorded() -> None:
    model = _model(dropout=0.5)
    variables = small.moved(dict(model.initial(0)))
    with torch.no_grad():
        still = [model.features(variables, small.images()) for _ in range(2)]
    first, second = (model.features(variables, small.images()) for _ in range(2))
    assert torch.equal(*still)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    third = model.features(variables, small.images())
    torch.manual_seed(5)
    assert torch.equal(third, model.features(variables, small.images()))


def test_parts_are_summed() -> None:
    one, two = _model(rank=2), _model(rank=2, parts=BOTH)
    variables = small.moved(dict(two.initial(0)))
    assert {spec.tag.part for spec in two.specs.values()} == {"shared", "personal"}
    stacked = {name: value for name, value in variables.items() if name.startswith("head")}
    for name in [name for name in variables if ".shared." in name]:
        pair = [variables[name], variables[name.replace(".shared.", ".personal.")]]
        stacked[name] = torch.cat(pair, dim=0 if name.endswith(".a") else 1)  # rank 4 in the place of rank 2
    torch.testing.assert_close(one.features(stacked, small.images()), two.features(variables, small.images()))


def test_factors_cut_or_padded_with_zeros_mean_the_same() -> None:
    model = _model(rank=3, alpha=6.0, parts=(Part(ranks={"small": 1}),))
    variables = small.moved(dict(model.initial(0)))
    assert variables["blocks.0.attn.qkv.lora.shared.a"].shape == (3, 16)
    cut, padded = dict(variables), dict(variables)
    for name, value in variables.items():
        if name.endswith((".a", ".b")):
            axis = 0 if name.endswith(".a") else 1
            cut[name] = value.narrow(axis, 0, 1)
            padded[name] = torch.cat([cut[name], torch.zeros_like(value.narrow(axis, 0, 2))], axis)
    torch.testing.assert_close(model.features(cut, small.images()), model.features(padded, small.images()))


def test_a_part_may_have_a_rank_of_its_own() -> None:
    model = _model(rank=3, alpha=6.0, parts=(Part(), Part("personal", personal=True, rank=2)))
    shapes = {name: spec.shape for name, spec in model.specs.items() if name.startswith("blocks.0.attn.qkv")}
    assert {name.split(".lora.")[1]: shape for name, shape in shapes.items()} == {
        "shared.a": (3, 16),
        "shared.b": (48, 3),
        "personal.a": (2, 16),
        "personal.b": (48, 2),
    }
    assert {spec.scale for spec in model.specs.values() if spec.factor} == {2.0}, "the tuner's own alpha / r"


def test_router_starts_even_and_can_pick_one_part() -> None:
    model = _model(rank=2, parts=BOTH, how="router")
    routers = [name for name, spec in model.specs.items() if spec.tag.role == "router"]
    assert len(routers) == 2
    assert all(model.specs[name].tag.part == "personal" for name in routers)
    variables = small.moved(dict(model.initial(0)))
    swapped = {name: _swap(variables, name) for name in variables}
    assert not torch.allclose(model.features(variables, small.images()), model.features(swapped, small.images()))
    for held in (variables, swapped):
        held.update({name: torch.zeros_like(held[name]) for name in routers})
    even = [model.features(held, small.images()) for held in (variables, swapped)]
    torch.testing.assert_close(*even)
    halves = {n: v / 2 if n.endswith(".b") else v for n, v in variables.items() if n not in routers}
    summed = _model(rank=2, parts=BOTH).features(halves, small.images())
    torch.testing.assert_close(even[0], summed)
    with pytest.raises(ConfigError, match="router"):
        compose.merge(model, variables)


def _swap(variables: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name.endswith(".router"):
        return variables[name]
    other = name.replace(".shared.", ".x.").replace(".personal.", ".shared.").replace(".x.", ".personal.")
    return variables[other]


def _double(**options: object) -> tuple[compose.TunedModel, dict[str, torch.Tensor]]:
    """A model in float64 with one tuned block, and variables away from the start."""
    backbone = small.backbone()
    backbone.module.double()
    model = _model(backbone, rank=2, blocks=[1], **options)
    return model, {name: value.double() for name, value in small.moved(dict(model.initial(0))).items()}


@pytest.mark.parametrize("options", [{}, {"dora": True, "alpha": 6.0, "targets": ["qkv", "fc2"]}], ids=["lora", "dora"])
def test_gradients_are_those_of_finite_differences(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of DoRA with its norm held fast, which its gradients take for a constant."""
    model, variables = _double(**options)
    names = [name for name in variables if "lora" in name]
    images = small.images(1).double()
    norms = {}
    for module in {model.specs[name].tag.module for name in names}:
        linear = model.backbone.module.get_submodule(module)
        held = factors(linear, module, variables)
        norms[linear.weight.data_ptr()] = low_rank.norm(linear.weight, held.a, held.b, held.scale)
    monkeypatch.setattr(low_rank, "norm", lambda weight, *_: norms[weight.data_ptr()])

    def function(*values: torch.Tensor) -> torch.Tensor:
        return model.features({**variables, **dict(zip(names, values, strict=True))}, images)

    assert torch.autograd.gradcheck(function, [variables[name].requires_grad_() for name in names], fast_mode=True)


def _dora_by_hand(weight: torch.Tensor, variables: dict[str, torch.Tensor], module: str, scale: float) -> torch.Tensor:
    """Liu et al. 2024, eq. 5, row by row: m_i (w_i + s b_i A) / |w_i + s b_i A|, lengths constant (section 4.3)."""
    a, b = (variables[f"{module}.lora.shared.{letter}"] for letter in "ab")
    rows = []
    for row, left, m in zip(weight, b, variables[f"{module}.lora.magnitude"], strict=True):
        moved = row + scale * sum(left[k] * a[k] for k in range(len(a)))
        rows.append(m * moved / moved.detach().square().sum().sqrt())
    return torch.stack(rows)


@pytest.mark.parametrize("replaced", [False, True], ids=["frozen base", "changed base"])
def test_dora_and_its_gradients_are_those_of_a_slow_reference(replaced: bool) -> None:
    model, variables = _double(dora=True, alpha=6.0, targets=["qkv", "fc2"])
    modules = ["blocks.1.attn.qkv", "blocks.1.mlp.fc2"]
    plain = small.backbone().module.double()
    base = {f"{module}.weight": plain.get_submodule(module).weight.clone() for module in modules}
    if replaced:
        base = {name: value + 0.3 * value.flip(0) for name, value in base.items()}
    outputs, gradients = [], []
    for slow in (False, True):
        live = {name: value.clone().requires_grad_() for name, value in variables.items()}
        if slow:
            weights = {f"{m}.weight": _dora_by_hand(base[f"{m}.weight"], live, m, 3.0) for m in modules}
            features = torch.func.functional_call(plain, weights, (small.images().double(),))
        else:
            features = model.features({**live, **(base if replaced else {})}, small.images().double())
        features.square().sum().backward()
        outputs.append(features)
        gradients.append({name: value.grad for name, value in live.items() if "lora" in name})
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)
    assert all(value.abs().max() > 0 for value in gradients[0].values())


@pytest.mark.parametrize("make", small.MAKES)
def test_dora_starts_as_the_backbone_moves_and_merges_exactly(make: str) -> None:
    options = {"dora": True, "rank": 2, "targets": ["qkv", "proj", "fc1", "fc2"]}
    backbone = small.backbone(make)
    plain = backbone.module(small.images())
    model = _model(backbone, **options)
    torch.testing.assert_close(model.features(model.initial(0), small.images()), plain, rtol=1e-6, atol=1e-6)
    backbone.module.double()
    start = {name: value.double() for name, value in model.initial(0).items()}
    names = [name for name, spec in model.specs.items() if spec.tag.role == "magnitude"]
    assert len(names) == len({spec.tag.module for spec in model.specs.values()} - {"head"})
    longer = {**start, **{name: 1.5 * start[name] for name in names}}
    assert not torch.allclose(model.features(longer, small.images().double()), plain.double())
    variables = small.moved(start)
    with torch.no_grad():
        before = model.features(variables, small.images().double())
        merged = compose.merge(model, variables)(small.images().double())
    torch.testing.assert_close(merged, before, rtol=1e-10, atol=1e-10)


def test_dora_adds_one_magnitude_per_output() -> None:
    without, model = _model(rank=2), _model(rank=2, dora=True)
    assert _lora_count(model) - _lora_count(without) == 2 * 48
    magnitude = model.initial(0)["blocks.1.attn.qkv.lora.magnitude"]
    torch.testing.assert_close(magnitude, model.backbone.module.get_parameter("blocks.1.attn.qkv.weight").norm(dim=1))


def test_dora_sums_parts_inside_one_norm_and_shares_the_magnitude() -> None:
    one, two = _model(rank=2, dora=True), _model(rank=2, dora=True, parts=BOTH[::-1])
    variables = small.moved(dict(two.initial(0)))
    assert {spec.tag.part for spec in two.specs.values() if spec.tag.role == "magnitude"} == {"shared"}
    stacked = {name: value for name, value in variables.items() if ".personal." not in name}
    for name in [name for name in variables if ".shared." in name]:
        pair = [variables[name], variables[name.replace(".shared.", ".personal.")]]
        stacked[name] = torch.cat(pair, dim=0 if name.endswith(".a") else 1)
    torch.testing.assert_close(one.features(stacked, small.images()), two.features(variables, small.images()))
    with pytest.raises(ConfigError, match="router"):
        _model(dora=True, parts=BOTH, how="router")


def test_a_row_of_zeros_has_no_direction_and_stays_finite() -> None:
    model = _model(rank=2, dora=True)
    name = "blocks.0.attn.qkv.weight"
    weight = model.backbone.module.get_parameter(name).clone()
    weight[3] = 0
    variables = {n: v.requires_grad_() for n, v in model.initial(0).items()}
    model.features({**variables, name: weight}, small.images()).sum().backward()
    assert all(torch.isfinite(value.grad).all() for n, value in variables.items() if "lora" in n)


def test_norms_are_never_taken_in_half_precision() -> None:
    weight, a, b = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = low_rank.norm(weight, a[:2], b[:, :2], 0.5)
    assert half.dtype == torch.float32
    assert torch.equal(half, low_rank.norm(weight, a[:2], b[:, :2], 0.5))


@pytest.mark.parametrize("dora", [False, True])
def test_blocks_that_are_computed_again_give_the_same_gradients(dora: bool) -> None:
    gradients = []
    for again in (False, True):
        backbone = small.backbone()
        if again:
            recompute.by_block(backbone.module)
        model = _model(backbone, rank=2, dora=dora)
        live = {name: value.requires_grad_() for name, value in small.moved(dict(model.initial(0))).items()}
        model.forward(live, small.images()).square().sum().backward()
        gradients.append({name: value.grad for name, value in live.items()})
    assert tensors.equal(*gradients)


def test_ranks_by_layer_follow_the_longest_front_of_a_name() -> None:
    ranks = {"blocks.1": 3, "blocks.1.mlp.fc2": 5}
    model = _model(rank=2, alpha=6.0, ranks=ranks, targets=["qkv", "fc2"])
    found = {name: (spec.shape, spec.scale) for name, spec in model.specs.items() if name.endswith(".a")}
    assert found == {
        "blocks.0.attn.qkv.lora.shared.a": ((2, 16), 3.0),
        "blocks.0.mlp.fc2.lora.shared.a": ((2, 64), 3.0),
        "blocks.1.attn.qkv.lora.shared.a": ((3, 16), 2.0),
        "blocks.1.mlp.fc2.lora.shared.a": ((5, 64), 1.2),
    }
    assert _lora_count(model) == 2 * (16 + 48) + 2 * (64 + 16) + 3 * (16 + 48) + 5 * (64 + 16)
    assert {p.right: p.scale for p in products(model.specs)} == {name: scale for name, (_, scale) in found.items()}
    variables = small.moved(dict(model.initial(0)))
    with torch.no_grad():
        before = model.features(variables, small.images())
        torch.testing.assert_close(compose.merge(model, variables)(small.images()), before, rtol=1e-4, atol=1e-5)


def test_block_1_is_not_the_front_of_block_11() -> None:
    backbone = timm_backbone.load(BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=32))
    specs = _model(backbone, ranks={"blocks.1": 2}).specs
    ranks = {spec.tag.block: spec.shape[0] for spec in specs.values() if spec.tag.role == "lora_a"}
    assert ranks == {block: 2 if block == 1 else 8 for block in range(12)}


def test_ranks_by_layer_and_by_site_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)per layer and ranks per site.*north"):
        _model(ranks={"blocks.0": 2}, parts=(Part(ranks={"north": 3}),))


def test_an_orthonormal_start_has_orthonormal_rows() -> None:
    model, other = _model(rank=4, start="orthonormal", targets=["qkv", "fc2"]), _model(rank=4, targets=["qkv", "fc2"])
    starts = {name: value for name, value in model.initial(0).items() if "lora" in name}
    for name, value in starts.items():
        if name.endswith(".a"):
            torch.testing.assert_close(value @ value.T, torch.eye(4), rtol=0, atol=1e-6)
            assert not torch.equal(value, model.initial(1)[name])
            assert not torch.allclose(value, other.initial(0)[name])
        else:
            assert not value.any()
    assert len({tuple(v.flatten()[:4].tolist()) for n, v in starts.items() if n.endswith(".a")}) == 4


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_a_is_never_trained(freeze: bool) -> None:
    model = _model(rank=2, freeze_a=freeze, dora=True)
    chosen = model.active(3, "north", 0)
    asleep = {spec.tag.role for spec in model.specs.values() if not chosen(spec.tag)}
    assert asleep == ({"lora_a"} if freeze else set())


def test_a_product_is_declared_for_every_layer_unless_a_router_mixes_it() -> None:
    model = _model(rank=2, alpha=6.0, parts=BOTH, targets=["qkv", "fc1"])
    found = {(product.base, product.part): product for product in products(model.specs)}
    assert len(found) == 2 * 2 * 2
    name = "blocks.0.mlp.fc1"
    product = found[(f"{name}.weight",), "personal"]
    assert (product.left, product.right) == ((f"{name}.lora.personal.b",), f"{name}.lora.personal.a")
    assert product.scale == 3.0
    assert products(_model(rank=2, parts=BOTH, how="router").specs) == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": [0, 2]}, "no such block"),
        ({"blocks": [-1]}, "no such block"),
        ({"rank": 17}, "rank exceeds"),
        ({"targets": []}, "targets"),
        ({"targets": ["attn"]}, "targets"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"),
        ({"alpah": 1.0}, "unknown key"),
        ({"rank_stabilised": True}, "needs alpha"),
        ({"ranks": {"blocks.7": 2}}, r"(?s)no layer takes its rank.*blocks\.0\.attn\.qkv.*blocks\.7"),
        ({"ranks": {"qkv": 2}}, "no layer takes its rank"),
        ({"ranks": {"blocks.0": 2, "blocks.0.attn.qkv": 3}}, r"(?s)no layer takes its rank.*received: \['blocks\.0'\]"),
        ({"ranks": {"blocks.0": 0}}, "ranks"),
        ({"ranks": {"blocks.0": 17}}, "rank exceeds"),
        ({"start": "zero"}, "start"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _model(**options)


def test_a_target_without_a_module_is_refused() -> None:
    backbone = small.backbone()
    places = {name: place for name, place in backbone.modules.items() if place.role != "fc1"}
    lacking = Backbone(**{**vars(backbone), "modules": places})
    with pytest.raises(ConfigError, match="no module has this role"):
        _model(lacking, targets=["qkv", "fc1"])


def test_merging_twice_is_refused() -> None:
    model = _model()
    compose.merge(model, model.initial(0))
    with pytest.raises(ConfigError, match="no adapter left"):
        compose.merge(model, model.initial(0))
