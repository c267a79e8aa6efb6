"""For tuners of the backbone's own tensors: large ViTs without their memory, and a step of plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import timm
import torch
from torch import Tensor, nn

from consilium import registry
from consilium.backbones import roles
from consilium.config import HeadConfig
from consilium.protocols import Attached, Backbone, Declaration, Part, Specs
from consilium.tuners import compose
from tests import small

WIDTHS = {"vit_tiny_patch16_224": 192, "vit_small_patch16_224": 384, "vit_base_patch16_224": 768}
RATE = 0.1


def empty(name: str) -> Backbone:
    """Names and shapes of a timm model, whose tensors hold no numbers."""
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=0)
    places = roles.find(module)
    return Backbone(module, name, "", small.backbone().preprocessing, places, roles.num_blocks(places), 0, 0)


def attached(tuner: str, backbone: Backbone, **options: object) -> Attached:
    """What a registered tuner adds to a backbone."""
    found: Attached = registry.build("tuners", tuner, options).attach(backbone, [Part()], "sum")
    return found


def count(specs: Specs) -> int:
    """Number of scalars."""
    return sum(prod(size or 0 for size in spec.shape) for spec in specs.values())


def tuned(tuner: str, make: str = "vit", **options: object) -> compose.TunedModel:
    """A small model in float64."""
    backbone = small.backbone(make)
    backbone.module.double()
    built = registry.build("tuners", tuner, options)
    return compose.attach(backbone, [built], HeadConfig(), 4, Declaration(), 0)


def plain_step(make: str, chosen: Callable[[str], bool] | Iterable[str]) -> nn.Module:
    """The slow reference: one step of SGD, in float64, on timm's own module and the parameters chosen by name."""
    module = small.backbone(make).module.double()
    named = chosen if callable(chosen) else set(chosen).__contains__
    live = {name: value.requires_grad_() for name, value in module.named_parameters() if named(name)}
    gradients = torch.autograd.grad(loss(module(small.images().double())), list(live.values()))
    with torch.no_grad():
        for value, gradient in zip(live.values(), gradients, strict=True):
            value -= RATE * gradient
    return module.requires_grad_(False)


def step(model: compose.TunedModel) -> dict[str, Tensor]:
    """The same step through the tuned model, without the head."""
    inside = {name: value for name, value in model.initial(0).items() if not name.startswith("head.")}
    live = {name: value.requires_grad_() for name, value in inside.items()}
    gradients = torch.autograd.grad(loss(model.features(live, small.images().double())), list(live.values()))
    return {n: (p - RATE * g).detach() for (n, p), g in zip(live.items(), gradients, strict=True)}


def loss(features: Tensor) -> Tensor:
    """Any function in which all features differ."""
    return (features * torch.linspace(-1, 1, features.numel()).reshape(features.shape)).tanh().sum()


def assert_same_step(tuner: str, make: str, chosen: Callable[[str], bool] | Iterable[str], **options: object) -> None:
    """One step through the tuner, merged, gives all the tensors that plain autograd gives."""
    model, reference = tuned(tuner, make, **options), plain_step(make, chosen).state_dict()
    start = small.backbone(make).module.double().state_dict()
    assert any(not torch.equal(reference[name], start[name]) for name in start)
    merged = compose.merge(model, {**model.initial(0), **step(model)}).state_dict()
    assert merged.keys() == reference.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-10, atol=1e-12, msg=name)
