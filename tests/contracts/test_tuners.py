"""What every registered tuner must keep to, on every make of backbone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from consilium import registry, tensors
from consilium.config import HeadConfig
from consilium.errors import ConfigError
from consilium.protocols import Backbone, Declaration
from consilium.tuners import base, compose
from tests import small, variants

TUNERS = sorted(registry.members("tuners"))
CLASSES = 4


@dataclass
class Case:
    tuner: str
    make: str
    backbone: Backbone
    frozen: dict[str, torch.Tensor]
    plain: torch.Tensor
    model: compose.TunedModel

    @property
    def moved(self) -> dict[str, torch.Tensor]:
        return small.moved(dict(self.model.initial(0)))


@pytest.fixture(params=[(tuner, make) for tuner in TUNERS for make in small.MAKES], ids=lambda pair: "-".join(pair))
def case(request: pytest.FixtureRequest) -> Case:
    tuner, make = request.param
    backbone = small.backbone(make)
    frozen = tensors.detach(backbone.module.state_dict())
    plain = backbone.module(small.images())
    built = registry.build("tuners", tuner, variants.TUNERS[tuner][1])
    model = compose.attach(backbone, [built], HeadConfig(), CLASSES, Declaration(), 0)
    return Case(tuner, make, backbone, frozen, plain, model)


def test_start_is_drawn_from_the_seed_alone(case: Case) -> None:
    built = registry.build("tuners", case.tuner, variants.TUNERS[case.tuner][1])
    again = compose.attach(small.backbone(case.make), [built], HeadConfig(), CLASSES, Declaration(), 9)
    assert tensors.equal(case.model.initial(0), again.initial(0))
    assert not tensors.equal(case.model.initial(0), case.model.initial(1))


def test_start_is_the_frozen_backbone_where_declared(case: Case) -> None:
    same = torch.equal(case.model.features(case.model.initial(0), small.images()), case.plain)
    assert registry.get("tuners", case.tuner).facts["start"] == ("identity" if same else "changed")


def test_specs_describe_the_variables(case: Case) -> None:
    initial, specs = case.model.initial(0), case.model.specs
    assert list(initial) == list(specs) == sorted(specs)
    for name, spec in specs.items():
        assert (tuple(initial[name].shape), initial[name].dtype) == (spec.shape, spec.dtype)
        assert name.startswith(f"{spec.tag.module}.") or "." not in name
    assert {spec.tag.role for spec in specs.values()} <= case.model.learning_rates.keys()


def test_gradients_reach_every_variable_that_is_active_in_some_round(case: Case) -> None:
    """In float64, where rounding does not pass for a gradient."""
    case.backbone.module.double()
    live = {name: value.double().requires_grad_() for name, value in case.moved.items()}
    case.model.forward(live, small.images().double()).square().sum().backward()
    selectors = [case.model.active(round, "a", 0) for round in range(1, 30)]
    for name, spec in case.model.specs.items():
        assert any(chosen(spec.tag) for chosen in selectors), name
        assert live[name].grad is not None, name
        assert live[name].grad.abs().max() > 1e-9, name


def test_variables_change_the_output_and_nothing_else_moves(case: Case) -> None:
    live = {name: value.requires_grad_() for name, value in case.moved.items()}
    features = case.model.features(live, small.images())
    inside = [name for name, spec in case.model.specs.items() if spec.tag.role != "head"]
    assert torch.equal(features, case.plain) == (not inside)
    case.model.forward(live, small.images()).sum().backward()
    own = base.parameters(case.backbone.module)
    assert own.keys() <= case.frozen.keys()
    assert all(torch.equal(value, case.frozen[name]) and value.grad is None for name, value in own.items())


def test_merged_equals_unmerged_and_leaves_plain_names_or_is_refused_and_leaves_all(case: Case) -> None:
    variables, facts = case.moved, registry.get("tuners", case.tuner).facts
    with torch.no_grad():
        before = case.model.features(variables, small.images())
        if facts["merge"] != "exact":
            with pytest.raises(ConfigError, match=case.tuner):
                compose.merge(case.model, variables)
            assert torch.equal(case.model.features(variables, small.images()), before)
            assert facts["merge"] == "refused"
            assert facts["merge_refused"]
            return
        merged = compose.merge(case.model, variables)
        after = merged(small.images())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == case.frozen.keys()


def test_merging_leaves_other_users_of_the_weights_alone(case: Case) -> None:
    held = base.parameters(case.backbone.module)
    if registry.get("tuners", case.tuner).facts["merge"] == "exact":
        compose.merge(case.model, case.moved)
    assert all(torch.equal(value, case.frozen[name]) for name, value in held.items())


def test_a_hybrid_that_cannot_be_merged_is_left_as_it_was() -> None:
    names = [name for name in TUNERS if registry.get("tuners", name).facts["merge"] != "exact"]
    for name in names:
        built = [registry.build("tuners", each, variants.TUNERS[each][1]) for each in ("lora", name)]
        model = compose.attach(small.backbone(), built, HeadConfig(), CLASSES, Declaration(), 0)
        variables = small.moved(dict(model.initial(0)))
        before = model.features(variables, small.images())
        with pytest.raises(ConfigError, match=name):
            compose.merge(model, variables)
        assert torch.equal(model.features(variables, small.images()), before)


def test_what_is_said_of_it_is_whole(case: Case) -> None:
    member = registry.get("tuners", case.tuner)
    assert member.facts.keys() >= {"start", "merge", "formula", "count"}
    assert member.source


def test_saving_and_loading_is_the_identity(case: Case) -> None:
    variables = tensors.detach(case.moved)
    loaded = tensors.loads(tensors.dumps(variables))
    assert tensors.equal(variables, loaded)
    assert torch.equal(case.model.forward(variables, small.images()), case.model.forward(loaded, small.images()))


def test_half_precision_comes_close_and_gives_full_precision_outputs(case: Case) -> None:
    variables = small.moved(dict(case.model.initial(0)), 0.02)
    full = case.model.forward(variables, small.images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = case.model.forward(variables, small.images())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)


def test_a_name_of_the_base_overrides_the_frozen_weight(case: Case) -> None:
    name = "blocks.0.norm1.weight"
    variables = {**case.model.initial(0), name: case.frozen[name] + 1}
    assert not torch.equal(case.model.features(variables, small.images()), case.plain)
    assert torch.equal(case.backbone.module.get_parameter(name), case.frozen[name])


def test_an_unknown_name_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match="no such variable"):
        case.model.forward({**case.model.initial(0), "blocks.0.attn.qkw.weight": torch.zeros(1)}, small.images())


@pytest.mark.parametrize("tuner", TUNERS)
def test_attaching_twice_is_refused_or_harmless(tuner: str) -> None:
    backbone = small.backbone()
    built = registry.build("tuners", tuner, variants.TUNERS[tuner][1])
    if not built.attach(backbone, Declaration().parts, "sum").specs:
        return
    with pytest.raises(ConfigError):
        compose.attach(small.backbone(), [built, built], HeadConfig(), CLASSES, Declaration(), 0)
