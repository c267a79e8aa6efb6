"""A stage after one with two models a site: its own goes on at the site, and the one of all is kept beside."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from consilium import checkpoint, config, run, stages
from consilium.continued import COMMON
from consilium.stages import same_bits
from consilium.tensors import within

SITES = ("alpine", "harbour", "prairie")
LORA = {"name": "lora", "rank": 2}
TABLE = {
    "seed": 3,
    "sites": {"source": "phantom", "num_images": 48, "image_size": 32, "num_sites": 3},
    "backbone": {"name": "test_vit", "weights": "random", "image_size": 32},
    "train": {"rounds": 1, "batch_size": 8, "learning_rate": 0.01},
    "evaluation": {"bootstrap": 0},
    "engine": {"device": "cpu"},
    "stages": [
        {"name": "tune", "tuner": LORA, "strategy": {"name": "ditto"}},
        {"name": "again", "tuner": LORA, "part": "second"},
    ],
}
Values = dict[str, Tensor]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.run(config.from_dict(TABLE), tmp_path_factory.mktemp("common") / "run")


def loaded(path: Path) -> Values:
    return checkpoint.load(path)[0]


def adapters(values: Values) -> Values:
    """Of the first stage."""
    return {name: value for name, value in values.items() if ".lora.shared." in name}


def test_a_site_begins_with_its_own_model_and_keeps_that_of_all_beside(out: Path) -> None:
    shared = adapters(loaded(out / "stages" / "1-tune" / "adapters" / "global.safetensors"))
    assert shared
    for site in SITES:
        start = loaded(out / "sites" / site / stages.START)
        own = adapters(loaded(out / "stages" / "1-tune" / "sites" / site / "served.safetensors"))
        assert all(same_bits(start[name], own[name]) for name in own)
        common = adapters(within(COMMON, start))
        assert common, "two models, which differ"
        assert all(same_bits(value, shared[name]) for name, value in common.items())
        alike = shared.keys() - common.keys()  # what both models have the same is there once
        assert all(same_bits(shared[name], own[name]) for name in alike)


def test_both_models_are_there_at_the_end(out: Path) -> None:
    before = adapters(loaded(out / "stages" / "1-tune" / "adapters" / "global.safetensors"))
    everywhere = adapters(loaded(out / "adapters" / "global.safetensors"))
    assert all(torch.equal(everywhere[name], before[name]) for name in before)
    for site in SITES:
        own = adapters(loaded(out / "stages" / "1-tune" / "sites" / site / "served.safetensors"))
        served = adapters(loaded(out / "sites" / site / "served.safetensors"))
        assert all(torch.equal(served[name], own[name]) for name in own)
        assert not all(torch.equal(served[name], everywhere[name]) for name in own)


def test_a_model_of_all_is_measured_with_what_all_have(out: Path) -> None:
    """Were the common tensors not handed over, it would be each site's own model under another name."""
    table = pd.read_parquet(out / "predictions.parquet")
    scores = [name for name in table.columns if name.startswith("p.")]
    models = {str(model): rows.sort_values(["site", "id"])[scores].to_numpy() for model, rows in table.groupby("model")}
    assert {"personal", "global"} <= models.keys()
    assert not (models["personal"] == models["global"]).all()
