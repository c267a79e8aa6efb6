"""Hybrids, heads, and which tuner decides about which tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from consilium import registry
from consilium.config import HeadConfig
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, Declaration, Part, Selector, Spec, Specs, Tuner
from consilium.tensors import Tensors
from consilium.tuners import base, compose
from tests import small


class OneBlock:
    """A minimal stranger: trains one norm of one block, and only in odd rounds."""

    def __init__(self, block: int = 0) -> None:
        self.name = f"blocks.{block}.norm1.weight"

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        part = base.only_part("one_block", parts, combination)
        value = base.parameters(backbone.module)[self.name].detach()
        spec = Spec(tuple(value.shape), base.tag(backbone, self.name, part.name))
        return Attached({self.name: spec}, lambda _: {self.name: value.clone()}, {"norm": 1e-2, "head": 5e-4})

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        return lambda _: bool(round % 2)

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        base.replace(backbone.module, {self.name: variables[self.name]})


def _attach(*tuners: Tuner, seed: int = 0, **head: object) -> compose.TunedModel:
    return compose.attach(small.backbone(), tuners, HeadConfig.model_validate(head), 4, Declaration(), seed)


def _lora(**options: object) -> Tuner:
    built: Tuner = registry.build("tuners", "lora", options)
    return built


def _full() -> Tuner:
    built: Tuner = registry.build("tuners", "full", {})
    return built


def test_the_order_of_a_hybrid_changes_nothing() -> None:
    first, second = _attach(_lora(), OneBlock(), _full_less()), _attach(_full_less(), OneBlock(), _lora())
    assert list(first.specs) == list(second.specs)
    assert first.learning_rates == second.learning_rates
    variables = small.moved(dict(first.initial(0)))
    assert torch.equal(first.forward(variables, small.images()), second.forward(variables, small.images()))
    for one in (first, second):
        before = one.features(variables, small.images())
        torch.testing.assert_close(compose.merge(one, variables)(small.images()), before, rtol=1e-4, atol=1e-5)


def _full_less() -> Tuner:
    return _lora(targets=["fc1"], rank=2)


@pytest.mark.parametrize("turn", [1, -1])
def test_full_claims_no_tensor_of_an_adapter(turn: int) -> None:
    model = _attach(*[_lora(), _full()][::turn])
    variables = small.moved(dict(model.initial(0)))
    with torch.no_grad():
        before = model.features(variables, small.images())
        torch.testing.assert_close(compose.merge(model, variables)(small.images()), before, rtol=1e-4, atol=1e-5)


def test_each_tuner_decides_about_its_own_tensors() -> None:
    model = _attach(_lora(), OneBlock())
    chosen = {round: {n for n, s in model.specs.items() if model.active(round, "a", 0)(s.tag)} for round in (1, 2)}
    assert chosen[1] == set(model.specs)
    assert chosen[1] - chosen[2] == {"blocks.0.norm1.weight"}


def test_two_tuners_of_one_tensor_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)claim the same.*blocks.1.norm1.weight"):
        _attach(_full(), OneBlock(1))


def test_several_parts_need_modules_of_their_own() -> None:
    two = Declaration((Part("shared"), Part("personal", personal=True)))
    with pytest.raises(ConfigError, match="which exist once"):
        compose.attach(small.backbone(), [_full()], HeadConfig(), 4, two, 0)


def test_the_smaller_rate_wins_where_two_tuners_differ() -> None:
    assert _attach(registry.build("tuners", "linear", {})).learning_rates == {"head": 3e-3}
    both = _attach(registry.build("tuners", "linear", {}), _lora(), OneBlock())
    assert both.learning_rates["head"] == 5e-4
    assert both.learning_rates["norm"] == 1e-2
    assert _attach(_lora()).learning_rates["head"] == 1e-3


def test_head_linear_by_hand() -> None:
    model = _attach(_lora())
    variables = small.moved(dict(model.initial(0)))
    features = model.features(variables, small.images())
    expected = features @ variables["head.weight"].T + variables["head.bias"]
    torch.testing.assert_close(model.forward(variables, small.images()), expected)
    assert model.specs["head.weight"].shape == (4, 16)
    assert {model.specs[name].tag.part for name in ("head.weight", "head.bias")} == {"shared"}


def test_head_mlp_by_hand() -> None:
    model = _attach(_lora(), kind="mlp", hidden=5)
    assert {n: model.specs[n].shape for n in model.specs if n.startswith("head")} == {
        "head.0.bias": (5,), "head.0.weight": (5, 16), "head.2.bias": (4,), "head.2.weight": (4, 5)}  # fmt: skip
    v = small.moved(dict(model.initial(0)))
    hidden = model.features(v, small.images()) @ v["head.0.weight"].T + v["head.0.bias"]
    expected = torch.nn.functional.gelu(hidden) @ v["head.2.weight"].T + v["head.2.bias"]
    torch.testing.assert_close(model.forward(v, small.images()), expected)


def test_a_personal_head_is_tagged_so() -> None:
    model = _attach(_lora(), share="personal")
    assert {spec.tag.part for spec in model.specs.values() if spec.tag.role == "head"} == {"personal"}
    assert model.active(1, "a", 0)(model.specs["head.weight"].tag)


def test_a_frozen_head_is_one_common_function_and_no_variable() -> None:
    first, second, other = (_attach(_lora(), share="frozen", seed=seed) for seed in (0, 0, 1))
    assert not any(name.startswith("head") for name in first.specs)
    outputs = [model.forward(first.initial(0), small.images()) for model in (first, second, other)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert outputs[0].std() > 0.1
    live = {name: value.requires_grad_() for name, value in first.initial(0).items()}
    first.forward(live, small.images()).sum().backward()
    assert any(value.grad is not None and value.grad.any() for value in live.values())


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        _attach(registry.build("tuners", "linear", {}), share="frozen")


def test_a_changed_base_is_merged_too() -> None:
    model = _attach(_lora())
    variables = small.moved(dict(model.initial(0)))
    name = "blocks.1.attn.qkv.weight"
    variables[name] = model.backbone.module.get_parameter(name) + 0.1
    with torch.no_grad():
        before = model.features(variables, small.images())
        torch.testing.assert_close(compose.merge(model, variables)(small.images()), before, rtol=1e-4, atol=1e-5)


MIXES = {
    "all on one layer": [("lora", {"dora": True}), ("bitfit", {}), ("ia3", {}), ("ssf", {})],
    "both layers of the MLP": [("lora", {"targets": ["qkv", "fc1", "fc2"]}), ("ia3", {}), ("ssf", {})],
    "the backbone's own": [("attention", {}), ("lora", {"dora": True}), ("ia3", {}), ("norm", {})],
    "two of the backbone's own": [("attention", {}), ("norm", {}), ("ssf", {})],
}


@pytest.mark.parametrize("make", small.MAKES)
@pytest.mark.parametrize("mix", MIXES)
def test_a_hybrid_is_one_function_in_any_order_and_merges_to_it(mix: str, make: str) -> None:
    outputs, merged = [], []
    for order in itertools.permutations(MIXES[mix]):
        built = [registry.build("tuners", name, options) for name, options in order]
        model = compose.attach(small.backbone(make), built, HeadConfig(), 4, Declaration(), 0)
        variables = small.moved(dict(model.initial(0)))
        outputs.append(model.features(variables, small.images()))
        merged.append(compose.merge(model, variables)(small.images()))
    assert all(torch.equal(outputs[0], each) for each in outputs)
    assert all(torch.equal(merged[0], each) for each in merged)
    torch.testing.assert_close(merged[0], outputs[0], rtol=1e-3, atol=1e-4)


def test_a_bias_in_parts_and_as_a_whole_is_claimed_twice() -> None:
    for other in (("stochastic_block", {"targets": ["qkv"]}), ("attention", {})):
        built = [registry.build("tuners", name, options) for name, options in (("bitfit", {}), other)]
        with pytest.raises(ConfigError, match=r"claim the same tensor(.|\n)*qkv\.bias|claim the same tensor"):
            compose.attach(small.backbone(), built, HeadConfig(), 4, Declaration(), 0)
