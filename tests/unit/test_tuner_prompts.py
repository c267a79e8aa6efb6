"""Visual prompts against a plain loop over timm's blocks; where tokens enter and leave, starts, parts, refusals."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from consilium import registry, tensors
from consilium.config import HeadConfig
from consilium.errors import ConfigError
from consilium.experiment import own_copy
from consilium.protocols import Backbone, Combination, Declaration, Part
from consilium.tuners import compose, tokens
from tests import small

BOTH = (Part("shared"), Part("personal", personal=True))
MAKES = sorted(small.MAKES)
DEPTHS = ["shallow", "deep"]


def _model(
    backbone: Backbone | None = None,
    parts: tuple[Part, ...] = (Part(),),
    how: Combination = "sum",
    also: Sequence[tuple[str, dict[str, object]]] = (),
    **options: object,
) -> compose.TunedModel:
    tables = [("prompts", {"length": 3, **options}), *also]
    built = [registry.build("tuners", name, table) for name, table in tables]
    return compose.attach(backbone or small.backbone(), built, HeadConfig(), 4, Declaration(parts, how), 0)


def _double(make: str = "vit") -> Backbone:
    backbone = small.backbone(make)
    backbone.module.double()
    return backbone


def _moved(model: compose.TunedModel, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in small.moved(dict(model.initial(0)), 0.5).items()}


def reference(module: nn.Module, prompts: Sequence[Tensor], images: Tensor) -> Tensor:
    """Features of an untouched timm model, one prompt [p, d] per block that has its own; prompts are not rotated."""
    embedded = module._pos_embed(module.patch_embed(images))
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    x, before, length = module.norm_pre(x), module.num_prefix_tokens, len(prompts[0])
    extra = {}
    if rope is not None:
        half = rope.shape[-1] // 2
        still = torch.cat([rope.new_zeros(length, half), rope.new_ones(length, half)], dim=-1)  # sines, cosines
        extra = {"rope": torch.cat([still, rope])}
    for number, block in enumerate(module.blocks):
        if number < len(prompts):
            patches = x[:, -module.patch_embed.num_patches :]
            x = torch.cat([x[:, :before], torch.stack([prompts[number]] * len(images)), patches], dim=1)
        x = block(x, **extra)
    return module.forward_head(module.norm(torch.cat([x[:, :before], x[:, before + length :]], dim=1)))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("make", MAKES)
def test_it_is_the_plain_loop_over_the_blocks(make: str, depth: str) -> None:
    model, images = _model(_double(make), depth=depth), small.images().double()
    variables = _moved(model)
    prompts = [variables[f"prompts.shared.tokens.{layer}"] for layer in range(2 if depth == "deep" else 1)]
    expected = reference(_double(make).module, prompts, images)
    torch.testing.assert_close(model.features(variables, images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", MAKES)
def test_prompts_have_no_position(make: str) -> None:
    model, images = _model(_double(make), depth="deep"), small.images().double()
    variables = _moved(model)
    turned = {name: value.flip(0) if name.startswith("prompts.") else value for name, value in variables.items()}
    torch.testing.assert_close(model.features(turned, images), model.features(variables, images))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("make", MAKES)
def test_blocks_see_the_prompts_and_nothing_else_does(make: str, depth: str) -> None:
    model, seen = _model(depth=depth, backbone=small.backbone(make)), {}
    module = model.backbone.module
    for name in ("patch_embed", "norm_pre", "blocks.0.attn", "blocks.1.mlp", "norm"):
        module.get_submodule(name).register_forward_hook(lambda *io, name=name: seen.update({name: io[2].shape[1]}))
    model.features(_moved(model, torch.float32), small.images())
    outside = 4 + module.num_prefix_tokens
    assert seen == {
        "patch_embed": 4,
        "norm_pre": outside,
        "blocks.0.attn": outside + 3,
        "blocks.1.mlp": outside + 3,
        "norm": outside,
    }


@pytest.mark.parametrize("make", MAKES)
def test_deep_prompts_that_are_what_shallow_ones_became_are_shallow_ones(make: str) -> None:
    shallow, image = _model(_double(make)), small.images(1).double()
    variables, became = _moved(shallow), []
    module = shallow.backbone.module
    at = module.num_prefix_tokens
    module.blocks[1].register_forward_pre_hook(lambda _, inputs: became.append(inputs[0][0, at : at + 3]))
    expected = shallow.features(variables, image)
    deep = _model(_double(make), depth="deep")
    same = {**variables, "prompts.shared.tokens.1": became[0]}
    torch.testing.assert_close(deep.features(same, image), expected)
    same["prompts.shared.tokens.1"] = became[0].flip(-1)
    assert not torch.allclose(deep.features(same, image), expected)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_projection_is_one_linear_map_for_all_layers(depth: str) -> None:
    narrow, plain = _model(_double(), depth=depth, project=5), _model(_double(), depth=depth)
    variables = _moved(narrow)
    weight, bias = (variables[f"prompts.shared.projection.{end}"] for end in ("weight", "bias"))
    assert {n.rpartition(".")[2] for n, s in narrow.specs.items() if s.tag.role == "prompt_projection"} == {
        "weight",
        "bias",
    }
    wide = {n: v @ weight.T + bias if ".tokens." in n else v for n, v in variables.items() if ".projection." not in n}
    images = small.images().double()
    torch.testing.assert_close(narrow.features(variables, images), plain.features(wide, images))


def _first_input(model: compose.TunedModel, variables: tensors.Tensors, images: Tensor, block: int = 0) -> Tensor:
    seen: list[Tensor] = []
    handle = model.backbone.module.blocks[block].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.features(variables, images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("block", [0, 1])
def test_dropout_takes_entries_of_every_image_apart_and_only_where_gradients_are_recorded(block: int) -> None:
    model = _model(length=40, depth="deep", dropout=0.5)
    variables, images = _moved(model, torch.float32), torch.cat([small.images(1)] * 2)
    prompt = variables[f"prompts.shared.tokens.{block}"]
    with torch.no_grad():
        still = _first_input(model, variables, images, block)[:, 1:41]
    assert torch.equal(still, prompt.expand(2, -1, -1))
    torch.manual_seed(3)
    x = _first_input(model, variables, images, block)
    dropped = x[:, 1:41] == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(x[:, 1:41], torch.where(dropped, 0.0, 2 * prompt))
    assert not (x[:, 41:] == 0).any()
    torch.manual_seed(3)
    assert torch.equal(_first_input(model, variables, images, block), x)


def test_the_published_bound() -> None:
    """0.0625 for patches of 16 and 768 channels; a projection's columns take the place of d."""
    backbone = small.backbone()
    backbone.module.patch_embed.patch_size = (16, 16)
    assert tokens.bound(backbone, 768) == 0.0625
    assert tokens.bound(small.backbone(), 16) == pytest.approx((6 / (3 * 8 * 8 + 16)) ** 0.5)


def test_start_is_uniform_and_apart_for_every_layer() -> None:
    limit = (6 / (3 * 8 * 8 + 16)) ** 0.5
    initial = _model(length=500, depth="deep").initial(0)
    first, second = (initial[f"prompts.shared.tokens.{layer}"] for layer in (0, 1))
    assert not torch.equal(first, second)
    for value in (first, second):
        assert 0.99 * limit < value.abs().max() <= limit
        assert float(value.std()) == pytest.approx(limit / 3**0.5, rel=0.02)


def test_start_of_a_projection_is_kaiming_by_fan_out() -> None:
    initial = _model(length=100, project=400).initial(0)
    assert float(initial["prompts.shared.projection.weight"].std()) == pytest.approx((2 / 16) ** 0.5, rel=0.03)
    assert 0.01 < initial["prompts.shared.projection.bias"].abs().max() <= 400**-0.5
    limit = (6 / (3 * 8 * 8 + 400)) ** 0.5
    assert 0.99 * limit < initial["prompts.shared.tokens.0"].abs().max() <= limit


def test_attaching_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    backbone = small.backbone()
    torch.set_rng_state(before)
    _model(backbone, project=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"depth": "deep"}, {"depth": "deep", "project": 5}])
def test_parts_are_added_entry_by_entry(options: dict[str, object]) -> None:
    one, two = _model(_double(), **options), _model(_double(), BOTH, **options)
    assert {spec.tag.part for spec in two.specs.values()} == {"shared", "personal"}
    images = small.images().double()
    start = {name: value.double() for name, value in two.initial(0).items()}
    alone = {name: value for name, value in start.items() if ".personal." not in name}
    assert torch.equal(two.features(start, images), one.features(alone, images))
    variables, layers = _moved(two), 2 if "depth" in options else 1
    prompts = [sum(_prompt(variables, part.name, layer) for part in BOTH) for layer in range(layers)]
    expected = reference(_double().module, prompts, images)
    torch.testing.assert_close(two.features(variables, images), expected)


def _prompt(variables: tensors.Tensors, part: str, layer: int) -> Tensor:
    value, projection = variables[f"prompts.{part}.tokens.{layer}"], f"prompts.{part}.projection"
    if f"{projection}.weight" not in variables:
        return value
    return value @ variables[f"{projection}.weight"].T + variables[f"{projection}.bias"]


def test_tags_say_which_block_a_prompt_enters() -> None:
    specs = _model(depth="deep", project=5).specs
    places = {name: spec.tag.block for name, spec in specs.items() if name.startswith("prompts")}
    assert places == {
        "prompts.shared.projection.bias": None,
        "prompts.shared.projection.weight": None,
        "prompts.shared.tokens.0": 0,
        "prompts.shared.tokens.1": 1,
    }


@pytest.mark.parametrize("make", ["vit", "eva_fused"])
@pytest.mark.parametrize("options", [{}, {"depth": "deep", "project": 5}])
def test_gradients_are_those_of_finite_differences(make: str, options: dict[str, object]) -> None:
    model, images = _model(_double(make), BOTH, length=2, **options), small.images(1).double()
    variables = _moved(model)
    names = [name for name in variables if name.startswith("prompts.")]

    def function(*values: Tensor) -> Tensor:
        return model.features({**variables, **dict(zip(names, values, strict=True))}, images)

    assert torch.autograd.gradcheck(function, [variables[name].requires_grad_() for name in names])


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_order_of_a_hybrid_changes_no_bit(make: str, depth: str) -> None:
    tables = [
        ("lora", {"rank": 2, "targets": ["qkv", "proj", "fc1", "fc2"]}),
        ("prompts", {"length": 3, "depth": depth}),
    ]
    outputs = []
    for order in (tables, tables[::-1]):
        built = [registry.build("tuners", name, options) for name, options in order]
        model = compose.attach(small.backbone(make), built, HeadConfig(), 4, Declaration(), 0)
        outputs.append(model.features(small.moved(dict(model.initial(0))), small.images()))
    assert torch.equal(*outputs)


def test_a_copy_of_the_backbone_is_left_alone() -> None:
    backbone = small.backbone("eva_fused")
    plain, mine = backbone.module(small.images()), own_copy(backbone)
    _model(mine, depth="deep")
    assert torch.equal(backbone.module(small.images()), plain)
    assert [block.attn.num_prefix_tokens for block in backbone.module.blocks] == [1, 1]
    assert [block.attn.num_prefix_tokens for block in mine.module.blocks] == [4, 4]


def test_a_copy_with_prompts_has_prompts_of_its_own() -> None:
    module = _model(depth="deep").backbone.module
    before, copied = module(small.images()), copy.deepcopy(module)
    with torch.no_grad():
        copied.get_parameter("prompts.shared.tokens.1")[:, 0].add_(1)
    assert not torch.equal(copied(small.images()), before)
    assert torch.equal(module(small.images()), before)


@pytest.mark.parametrize("make", ["vit", "eva_fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_comes_close(make: str, dtype: torch.dtype) -> None:
    model = _model(small.backbone(make), depth="deep", project=5)
    variables = small.moved(dict(model.initial(0)), 0.02)
    live = {name: value.clone().requires_grad_() for name, value in variables.items()}
    full = model.forward(variables, small.images())
    with torch.autocast("cpu", dtype=dtype):
        half = model.forward(live, small.images())
        half.square().sum().backward()
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in live.values())


@pytest.mark.parametrize("pair", [("prompts", "low_rank_prompts"), ("low_rank_prompts", "prompts")])
def test_two_tuners_of_prompts_are_refused(pair: tuple[str, str]) -> None:
    built = [registry.build("tuners", name, {}) for name in pair]
    with pytest.raises(ConfigError, match="two tuners put prompts"):
        compose.attach(small.backbone(), built, HeadConfig(), 4, Declaration(), 0)


def test_a_router_is_refused() -> None:
    with pytest.raises(ConfigError, match="no router"):
        _model(parts=BOTH, how="router")


def test_a_model_with_another_kind_of_attention_is_refused_untouched() -> None:
    backbone = small.backbone()
    other = Backbone(**{**vars(backbone), "module": nn.Sequential(backbone.module)})
    with pytest.raises(ConfigError, match=r"(?s)position biases.*Sequential"):
        _model(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "length"),
        ({"depth": "middle"}, "depth"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"project": 0}, "project"),
        ({"lenght": 3}, "unknown key"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _model(**options)
