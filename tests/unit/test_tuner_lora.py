"""LoRA's own options: counts, scales, dropout, several parts, the router, ranks, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch

from consilium import registry
from consilium.backbones import timm_backbone
from consilium.config import BackboneConfig, HeadConfig
from consilium.errors import ConfigError
from consilium.protocols import Backbone, Combination, Declaration, Part
from consilium.tuners import compose
from consilium.tuners.lora import LoraOptions
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
    model = _model(rank=2, alpha=4.0, parts=(Part(ranks={"small": 1, "large": 3}),))
    variables = small.moved(dict(model.initial(0)))
    assert variables["blocks.0.attn.qkv.lora.shared.a"].shape == (3, 16)
    cut, padded = dict(variables), dict(variables)
    for name, value in variables.items():
        if name.endswith((".a", ".b")):
            axis = 0 if name.endswith(".a") else 1
            cut[name] = value.narrow(axis, 0, 1)
            padded[name] = torch.cat([cut[name], torch.zeros_like(value.narrow(axis, 0, 2))], axis)
    torch.testing.assert_close(model.features(cut, small.images()), model.features(padded, small.images()))


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


def test_gradients_are_those_of_finite_differences() -> None:
    backbone = small.backbone()
    backbone.module.double()
    model = _model(backbone, rank=2, blocks=[1])
    variables = {name: value.double() for name, value in small.moved(dict(model.initial(0))).items()}
    names = [name for name in variables if "lora" in name]
    images = small.images(1).double()

    def function(*values: torch.Tensor) -> torch.Tensor:
        return model.features({**variables, **dict(zip(names, values, strict=True))}, images)

    assert torch.autograd.gradcheck(function, [variables[name].requires_grad_() for name in names], fast_mode=True)


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
