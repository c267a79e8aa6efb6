"""Halves of a backbone: bit for bit the whole, at every depth, with whatever tuners hung in; or none at all."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from consilium import registry
from consilium.backbones import timm_backbone
from consilium.backbones.weights import Weights
from consilium.config import HeadConfig
from consilium.data import Preprocessing
from consilium.halves import Halves, place, split
from consilium.protocols import Declaration
from consilium.tuners import compose
from tests import federation, small, variants

DEEPEST = 3  # two blocks and the pooled features


@cache
def _case(make: str, variant: str) -> tuple[compose.TunedModel, dict[str, Tensor]]:
    tables = [dict(table) for table in variants.table(variant)]
    tuners = [registry.build("tuners", str(table.pop("name")), table) for table in tables]
    model = compose.attach(small.backbone(make), tuners, HeadConfig(), 3, Declaration(), 0)
    moved = small.moved(dict(model.initial(0)))
    return model, {name: value for name, value in moved.items() if not name.startswith("head.")}


def _halves(model: compose.TunedModel) -> Halves:
    assert model.halves is not None
    return model.halves


@pytest.mark.parametrize("make", small.MAKES)
@pytest.mark.parametrize("variant", ["lora everywhere", "prompts deep", "ssf", "adapter", "full", "linear"])
def test_the_upper_half_of_the_lower_half_is_the_whole(make: str, variant: str) -> None:
    model, variables = _case(make, variant)
    halves = _halves(model)
    with torch.no_grad():
        whole = model.features(variables, small.images())
        for depth in range(1, DEEPEST + 1):
            tokens = halves.run(variables, small.images(), 0, depth)
            assert torch.equal(model.features(variables, tokens, depth), whole)
            assert tokens[0].numel() == halves.sizes[depth]
    assert halves.deepest == DEEPEST


@given(
    st.sampled_from(["wide", *sorted(small.MAKES)]),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_any_stops_on_the_way_in_batches_of_any_size_change_no_bit(make: str, stops: list[int], size: int) -> None:
    model, variables = _wide() if make == "wide" else _case(make, "lora + prompts")
    halves, images = _halves(model), small.images(7) if make != "wide" else torch.rand(7, 3, 32, 32)
    assert make != "wide" or halves.even == halves.deepest
    size = size if halves.even == halves.deepest else len(images)  # few channels: see the last test
    with torch.no_grad():
        whole, tokens, at = model.features(variables, images), images, 0
        for depth in sorted(min(stop, halves.deepest) for stop in stops):
            tokens = torch.cat([halves.run(variables, part, at, depth) for part in tokens.split(size)])
            at = depth
        assert torch.equal(model.features(variables, tokens, at), whole)


@cache
def _wide() -> tuple[compose.TunedModel, dict[str, Tensor]]:
    model = cast(compose.TunedModel, federation.assemble(federation.configure()).model)
    moved = small.moved(dict(model.initial(0)))
    return model, {name: value for name, value in moved.items() if not name.startswith("head.")}


def test_gradients_of_the_upper_half_are_those_of_the_whole() -> None:
    model, variables = _case("vit", "lora")
    found: list[Mapping[str, Tensor]] = []
    for depth in (0, 1):
        live = {name: value.clone() for name, value in variables.items()}
        upper = {name: value.requires_grad_() for name, value in live.items() if place(name, DEEPEST) >= 1}
        with torch.no_grad():
            inputs = _halves(model).run(live, small.images(), 0, depth) if depth else small.images()
        model.features(live, inputs, depth).square().sum().backward()
        found.append({name: value.grad for name, value in upper.items() if value.grad is not None})
    assert federation.bits(found[0]) == federation.bits(found[1]) != {}


def test_where_a_tensor_acts() -> None:
    depths = {"blocks.1.attn.qkv.weight": 1, "norm.bias": 2, "fc_norm.weight": 2, "pos_embed": 0, "prompts.shared.x": 0}
    assert {name: place(name, DEEPEST) for name in depths} == depths


def test_up_to_where_training_draws_nothing() -> None:
    def quiet(**options: Any) -> int:
        tuner = registry.build("tuners", "lora", {"rank": 2, **options})
        return _halves(compose.attach(small.backbone(), [tuner], HeadConfig(), 3, Declaration(), 0)).quiet

    assert (quiet(), quiet(dropout=0.1), quiet(dropout=0.1, blocks=[1])) == (3, 0, 1)


def test_what_lies_below_is_plain_until_a_tuner_has_hung_something_there() -> None:
    tuner = registry.build("tuners", "lora", {"rank": 2, "blocks": [1]})
    halves = _halves(compose.attach(small.backbone(), [tuner], HeadConfig(), 3, Declaration(), 0))
    assert [halves.plain(depth) for depth in (1, 2, 3)] == [True, False, False]


def _between(module: nn.Module) -> None:
    first = module.get_submodule("blocks.0")

    def blocks(x: Tensor) -> Tensor:
        return module.get_submodule("blocks.1")(first(x)) * 2  # type: ignore[no-any-return]

    module.get_submodule("blocks").forward = blocks  # type: ignore[method-assign]


def _behind(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x) + 1  # type: ignore[method-assign, assignment]


def _around(module: nn.Module) -> None:
    module.get_submodule("blocks").forward = lambda x: x  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("change", [_between, _behind, _around])
def test_a_model_that_is_built_in_another_way_is_not_split(change: Any) -> None:
    module = small.backbone().module
    assert split(module, {}, small.SIZE) is not None
    change(module)
    assert split(module, {}, small.SIZE) is None


def test_variables_that_change_rotations_forbid_a_split() -> None:
    assert not _halves(_case("eva_apart", "linear")[0]).usable(["rope.freqs"])
    assert _halves(_case("vit", "linear")[0]).usable(["rope.freqs"])


@pytest.mark.parametrize(("width", "even"), [(16, 0), (48, DEEPEST)])
def test_up_to_where_bits_do_not_depend_on_the_size_of_a_batch(width: int, even: int) -> None:
    """A SwiGLU of 8/3 times the width: 42 channels fill no vector registers, 128 do."""
    arguments = {"embed_dim": width, "depth": 2, "num_heads": 2, "patch_size": 8, "class_token": False}
    settings = Preprocessing(small.SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    name = small.MAKES["eva_apart"][0]
    module = timm_backbone.assemble(name, Weights(name, None, {}, arguments | {"global_pool": "avg"}), settings).module
    found = split(module, {}, small.SIZE)
    assert found is not None
    assert found.even == even
