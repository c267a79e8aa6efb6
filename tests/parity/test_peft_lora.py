"""LoRA and DoRA against the `peft` library: outputs, gradients and optimiser steps on the same timm model."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch.nn import functional as F

from consilium import registry
from consilium.config import HeadConfig
from consilium.protocols import Declaration
from consilium.tuners import compose
from tests import small

peft = pytest.importorskip("peft")

ALL = {"qkv": r"attn\.(qkv|[qkv]_proj)", "proj": r"attn\.proj", "fc1": r"mlp\.fc1(_[gx])?", "fc2": r"mlp\.fc2"}


def _theirs(module: torch.nn.Module, options: dict[str, object], head: torch.nn.Linear) -> torch.nn.Module:
    targets = "|".join(ALL[role] for role in options["targets"])  # type: ignore[attr-defined]
    config = peft.LoraConfig(
        r=options["rank"],
        lora_alpha=options.get("alpha", options["rank"]),
        use_rslora=options.get("rank_stabilised", False),
        use_dora=options.get("dora", False),
        rank_pattern={rf"{front}\..*": rank for front, rank in options["ranks"].items()},  # type: ignore[attr-defined]
        target_modules=rf".*blocks\.\d+\.({targets})",
    )
    return torch.nn.Sequential(peft.get_peft_model(module, config), head)


def _our_name(theirs: str) -> str:
    name = re.sub(r"^1\.", "head.", theirs.removeprefix("0.base_model.model."))
    name = name.replace("lora_magnitude_vector.default.weight", "lora.magnitude")
    return re.sub(r"lora_([AB])\.default\.weight", lambda found: f"lora.shared.{found[1].lower()}", name)


def _take_over(theirs: torch.nn.Module, variables: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """Put our values into their trainable parameters, which come back under our names."""
    found = {_our_name(name): value for name, value in theirs.named_parameters() if value.requires_grad}
    for name, value in found.items():
        value.data.copy_(variables[name])
    return found


METHODS: list[dict[str, object]] = [
    {"rank": 4, "targets": ["qkv"]},
    {"rank": 2, "alpha": 6.0, "targets": ["qkv", "proj", "fc1", "fc2"]},
    {"rank": 4, "alpha": 6.0, "rank_stabilised": True, "targets": ["fc1", "proj"]},
    {"rank": 3, "alpha": 6.0, "targets": ["qkv"], "ranks": {"blocks.1": 5}},
    {"rank": 4, "targets": ["qkv"], "dora": True},
    {"rank": 2, "alpha": 6.0, "targets": ["qkv", "proj", "fc1", "fc2"], "dora": True},
    {"rank": 4, "alpha": 6.0, "rank_stabilised": True, "targets": ["qkv", "fc2"], "dora": True},
]


@pytest.mark.parametrize("make", ["vit", "distilled", "eva_apart"])
@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_outputs_gradients_and_steps_agree(make: str, options: dict[str, object], optimizer: str) -> None:
    backbone = small.backbone(make)
    plain = copy.deepcopy(backbone.module)
    tuner = registry.build("tuners", "lora", options)
    model = compose.attach(backbone, [tuner], HeadConfig(), 4, Declaration(), 0)
    variables = {name: value.requires_grad_() for name, value in small.moved(dict(model.initial(0))).items()}
    theirs = _theirs(plain, {"ranks": {}, **options}, torch.nn.Linear(backbone.num_features, 4))
    parameters = _take_over(theirs, variables)
    assert parameters.keys() == variables.keys()

    build = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    ours, other = (build(held.values(), lr=1e-2) for held in (variables, parameters))
    for number in range(4 if optimizer == "sgd" else 1):
        images, labels = small.images() + number, torch.tensor([0, 3, 1])
        outputs = model.forward(variables, images), theirs(images)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        for each, step in zip(outputs, (ours, other), strict=True):
            step.zero_grad()
            F.cross_entropy(each, labels).backward()
            step.step()
        for name, value in variables.items():
            torch.testing.assert_close(value.grad, parameters[name].grad, rtol=1e-3, atol=1e-6, msg=name)
            torch.testing.assert_close(value, parameters[name], rtol=1e-4, atol=1e-4, check_dtype=False, msg=name)


@pytest.mark.parametrize("make", ["vit", "eva_apart"])
def test_magnitudes_start_where_theirs_do(make: str) -> None:
    backbone = small.backbone(make)
    plain = copy.deepcopy(backbone.module)
    options: dict[str, object] = {"rank": 2, "targets": ["qkv", "fc2"], "dora": True}
    model = compose.attach(backbone, [registry.build("tuners", "lora", options)], HeadConfig(), 4, Declaration(), 0)
    theirs = _theirs(plain, {"ranks": {}, **options}, torch.nn.Linear(backbone.num_features, 4))
    found = {_our_name(name): value for name, value in theirs.named_parameters() if "magnitude" in name}
    assert found.keys() == {name for name, spec in model.specs.items() if spec.tag.role == "magnitude"}
    for name, value in found.items():
        torch.testing.assert_close(model.initial(0)[name], value.detach(), msg=name)
