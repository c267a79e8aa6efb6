"""Gradient checkpointing: fewer kept activations, the same bits."""

from __future__ import annotations

import pytest
import torch

from consilium import registry
from consilium.backbones import recompute
from consilium.config import HeadConfig
from consilium.errors import ConfigError
from consilium.protocols import Declaration
from consilium.tuners import compose
from tests import federation, small, variants

TUNERS = sorted(registry.members("tuners"))


def _gradients(tuner: str, make: str, again: bool, options: variants.Options) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of every variable, and how often the first block's norm was computed."""
    backbone = small.backbone(make)
    if again:
        recompute.by_block(backbone.module)
    built = registry.build("tuners", tuner, options)
    model = compose.attach(backbone, [built], HeadConfig(), 4, Declaration(), 0)
    calls = []
    backbone.module.get_submodule("blocks.0.norm1").register_forward_hook(lambda *_: calls.append(1))
    live = {name: value.requires_grad_() for name, value in small.moved(dict(model.initial(0))).items()}
    torch.manual_seed(5)  # dropout
    model.forward(live, small.images()).square().sum().backward()
    return {name: value.grad for name, value in live.items() if value.grad is not None}, len(calls)


@pytest.mark.parametrize("make", small.MAKES)
@pytest.mark.parametrize("tuner", TUNERS)
def test_gradients_keep_their_bits(tuner: str, make: str) -> None:
    kept, once = _gradients(tuner, make, False, variants.TUNERS[tuner][1])
    again, twice = _gradients(tuner, make, True, variants.TUNERS[tuner][1])
    assert once == 1
    assert twice == (1 if tuner == "linear" else 2)  # nothing to differentiate below a head alone
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("tuner", ["lora"])
def test_dropout_is_drawn_alike_the_second_time(tuner: str) -> None:
    kept, again = (_gradients(tuner, "vit", flag, {"dropout": 0.5})[0] for flag in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_merging_works_on_recomputed_blocks() -> None:
    backbone = small.backbone()
    recompute.by_block(backbone.module)
    model = compose.attach(backbone, [registry.build("tuners", "lora", {})], HeadConfig(), 4, Declaration(), 0)
    variables = small.moved(dict(model.initial(0)))
    before = model.features(variables, small.images())
    torch.testing.assert_close(compose.merge(model, variables)(small.images()), before, rtol=1e-4, atol=1e-5)


def test_a_run_with_it_is_the_same_run() -> None:
    plain = federation.configure()
    saving = federation.configure(engine={"gradient_checkpointing": True})
    first, second = federation.assemble(plain), federation.assemble(saving)
    assert first.handshake == second.handshake
    variables = small.moved(dict(first.model.initial(0)), 0.01)
    size = first.backbone.preprocessing.image_size
    images = torch.randn(2, 3, size, size)
    sums = []
    for pieces in (first, second):
        live = {name: value.clone().requires_grad_() for name, value in variables.items()}
        pieces.model.forward(live, images).square().sum().backward()
        sums.append({name: value.grad for name, value in live.items()})
    assert all(torch.equal(sums[0][name], sums[1][name]) for name in variables)


def test_the_key_is_a_yes_or_no() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        federation.configure(engine={"gradient_checkpointing": "sometimes"})
