"""pooled: one model on all images, tested at each site; a hospital's side refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from consilium import check, config, predict, run
from consilium.errors import TrainingError
from consilium.tensors import equal
from tests import federation

PHANTOM = {
    "seed": 1,
    "sites": {"source": "phantom", "num_images": 60},
    "tuner": [{"name": "lora", "rank": 2}],
    "train": {"rounds": 2, "batch_size": 16},
    "evaluation": {"bootstrap": 0},
    "engine": {"device": "cpu"},
}


def test_it_is_fedavg_of_one_site_that_has_all_images(tmp_path: Path) -> None:
    sites = {"pooled": federation.pooled(federation.hospitals(14, 9, 20))}
    found = [
        federation.run(tmp_path / name, federation.configure(strategy={"name": name}), sites)
        for name in ("pooled", "fedavg")
    ]
    assert equal(found[0].shared, found[1].shared)
    assert equal(found[0].served("pooled"), found[1].served("pooled"))


def test_a_hospital_refuses_and_its_images_stay(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"a: refused, .*images do not leave this site"):
        federation.run(tmp_path, federation.configure(strategy={"name": "pooled"}), federation.hospitals(14, 9))


def test_a_run_trains_one_model_and_tests_it_at_every_site(tmp_path: Path) -> None:
    settings = config.from_dict({**PHANTOM, "strategy": {"name": "pooled"}})
    prepared = run.prepare(settings, lambda _: None)
    told = check.check(settings)
    run.run(settings, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    tree = result["metrics"]["test"]["global"]["balanced_accuracy"]["per_site"]
    assert tree.keys() == prepared.sites.keys()
    assert any("images of all sites in one place" in text for text in result["warnings"])
    images = sum(len(site.train) for site in prepared.sites.values())
    assert result["image_passes"]["per_site"] == {"pooled": 2 * images} == told.image_passes
    assert {way: told.bytes[way] for way in ("up", "down")} == {way: result["bytes"][way] for way in ("up", "down")}
    table = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    assert set(table["site"]) == prepared.sites.keys()
    trained = predict.load_trained(tmp_path / "run")
    assert trained.name == "global"
    assert np.isfinite(table.filter(like="p.").to_numpy()).all()
    assert all(torch.isfinite(value).all() for value in trained.variables.values())


def test_it_sees_as_many_images_as_the_reference(tmp_path: Path) -> None:
    tables = {**PHANTOM, "strategy": {"name": "pooled"}, "evaluation": {"bootstrap": 0, "references": ["pooled"]}}
    run.run(config.from_dict(tables), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["references"]["pooled"]["image_passes"] == result["image_passes"]
