"""The embedded backbone: the file is what its card says, and a short run of the recipe learns and repeats itself."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from timm.models.vision_transformer import VisionTransformer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "consilium" / "backbones" / "embedded"
CARD: dict[str, Any] = json.loads((FOLDER / "card.json").read_text())
DATA = (FOLDER / "embedded.safetensors").read_bytes()


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield importlib.import_module("pretrain_embedded")
    torch.set_num_threads(threads)


def shipped() -> VisionTransformer:
    model = VisionTransformer(**CARD["architecture"])
    model.load_state_dict({name: tensor.float() for name, tensor in load(DATA).items()}, strict=True)
    return model.eval()


def test_the_file_is_the_one_on_the_card() -> None:
    assert hashlib.sha256(DATA).hexdigest() == CARD["sha256"]
    assert len(DATA) == CARD["num_bytes"] <= 6_000_000
    assert CARD["licence"] == "Apache-2.0"
    assert CARD["preprocessing"]["image_size"] == CARD["architecture"]["img_size"]


def test_the_weights_load_strictly_and_are_finite() -> None:
    features = shipped()(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, CARD["architecture"]["embed_dim"])
    assert torch.isfinite(features).all()


def test_the_card_holds_the_recipe_of_the_script(recipe: ModuleType) -> None:
    written = recipe.card(recipe.Recipe(), DATA, [1.0], 0.0)
    measured = ("loss", "seconds", "torch")
    plain = json.loads(json.dumps(written))
    assert {k: v for k, v in plain.items() if k not in measured} == {k: v for k, v in CARD.items() if k not in measured}


def test_the_shipped_weights_tell_colour_and_count_and_random_ones_do_not(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    untrained = VisionTransformer(**CARD["architecture"]).eval()
    pixels, labels = recipe.images.draw(10**6, 0, 600, 64)  # a seed that pre-training never saw
    for model, told in ((shipped(), True), (untrained, False)):
        with torch.no_grad():
            features = model(recipe._normalised(pixels)).numpy().astype(np.float64)
        for task in ("hue", "count"):
            assert (_probe(features, labels[task], recipe.images.TASKS[task]) > 0.6) == told


def _probe(features: Any, label: Any, number: int) -> float:
    """Accuracy on the last 200 rows of a ridge regression fitted on the others."""
    features = (features - features.mean(0)) / features.std(0)
    fit = features[:-200]
    weights = np.linalg.solve(fit.T @ fit + 100 * np.eye(fit.shape[1]), fit.T @ np.eye(number)[label[:-200]])
    return float(((features[-200:] @ weights).argmax(1) == label[-200:]).mean())


def test_a_short_pre_training_learns_and_repeats_itself(recipe: ModuleType) -> None:
    def short(seed: int, num_steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        losses: list[float] = []
        settings = recipe.Recipe(seed=seed, num_steps=num_steps, batch_size=16, warmup_steps=2, num_threads=1)
        return losses, recipe.pretrain(settings, lambda _, loss: losses.append(loss))

    (losses, weights), (again, same), (_, other) = short(0, 16), short(0, 16), short(1, 1)
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not torch.equal(weights["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert np.mean(losses[-4:]) < losses[0] - 0.05
    assert weights.keys() == load(DATA).keys()


def test_scenes_are_a_function_of_seed_and_step(recipe: ModuleType) -> None:
    pixels, labels = recipe.images.draw(0, 3, 16, 64)
    assert np.array_equal(pixels, recipe.images.draw(0, 3, 16, 64)[0])
    assert not np.array_equal(pixels, recipe.images.draw(0, 4, 16, 64)[0])
    assert pixels.shape == (16, 64, 64, 3)
    assert pixels.dtype == np.uint8
    for task, number in recipe.images.TASKS.items():
        known = labels[task][labels[task] != recipe.images.UNKNOWN]
        assert known.min() >= 0
        assert known.max() < number
