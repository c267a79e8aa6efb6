"""IA3 against the `peft` library: outputs and gradients on the same timm model with the same vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from consilium import registry
from consilium.config import HeadConfig
from consilium.protocols import Declaration
from consilium.tuners import compose
from consilium.tuners.ia3 import vectors
from tests import small

peft = pytest.importorskip("peft")


def _theirs(
    module: nn.Module, found: dict[str, tuple[torch.Tensor, bool]]
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Their model with our vectors, and their parameters under our layers' names."""
    config = peft.IA3Config(
        target_modules=sorted(found), feedforward_modules=sorted(name for name, (_, before) in found.items() if before)
    )
    model = peft.get_peft_model(module, config)
    live = {name: value for name, value in model.named_parameters() if value.requires_grad}
    by_layer = {name.removeprefix("base_model.model.").partition(".ia3_l")[0]: value for name, value in live.items()}
    assert by_layer.keys() == found.keys()
    for name, value in by_layer.items():
        value.data.copy_(found[name][0].reshape(value.shape))
    return model, by_layer


@pytest.mark.parametrize("make", ["vit", "distilled", "registers", "eva_apart"])
@pytest.mark.parametrize(
    "options", [{}, {"targets": ["q", "k", "v", "fc2"]}, {"targets": ["v"], "blocks": [1]}], ids=["kvf", "qkvf", "v"]
)
def test_outputs_and_gradients_agree(make: str, options: dict[str, object]) -> None:
    backbone = small.backbone(make)
    plain = copy.deepcopy(backbone.module)
    built = registry.build("tuners", "ia3", options)
    model = compose.attach(backbone, [built], HeadConfig(), 4, Declaration(), 0)
    moved = small.moved(dict(model.initial(0)))
    variables = {name: value.requires_grad_() for name, value in moved.items() if "ia3" in name}
    theirs, parameters = _theirs(plain, dict(vectors(backbone, variables)))
    outputs = [model.features(variables, small.images()), theirs(small.images())]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], backbone.module(small.images()))
    for output in outputs:
        output.tanh().sum().backward()
    for name, value in variables.items():
        gradient = parameters[name.partition(".ia3")[0]].grad
        assert gradient is not None
        torch.testing.assert_close(
            value.grad, _ours(gradient.flatten(), value, options), rtol=1e-4, atol=1e-6, msg=name
        )


def _ours(gradient: torch.Tensor, value: torch.Tensor, options: dict[str, object]) -> torch.Tensor:
    """Of a fused qkv only the thirds that are tuned: q comes first, so ours are the last ones."""
    assert options.get("targets") in (None, ["q", "k", "v", "fc2"], ["v"])
    return gradient[-len(value) :]


@pytest.mark.parametrize("make", ["vit", "eva_apart"])
def test_merged_weights_agree(make: str) -> None:
    backbone = small.backbone(make)
    plain = copy.deepcopy(backbone.module)
    model = compose.attach(backbone, [registry.build("tuners", "ia3", {})], HeadConfig(), 4, Declaration(), 0)
    variables = small.moved(dict(model.initial(0)))
    theirs, _ = _theirs(plain, dict(vectors(backbone, variables)))
    expected = theirs.merge_and_unload().state_dict()
    merged = compose.merge(model, variables).state_dict()
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
