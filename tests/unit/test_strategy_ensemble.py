"""ensemble: its mean of predictions against the formula, its members against training alone, and what travels when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from consilium import members
from consilium.errors import ConfigError
from consilium.tensors import equal
from tests import federation, variants

SITES = federation.hospitals(14, 9, 20)
ROUNDS = 3


def _run(folder: Path, name: str = "ensemble", mean: str | None = None, **train: Any) -> federation.Outcome:
    option = {} if mean is None else {"mean": mean}
    return federation.run(folder, federation.configure(strategy={"name": name, **option}, train=train), SITES)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def _sent(outcome: federation.Outcome) -> dict[str, Mapping[str, Tensor]]:
    return {site: tensors for number, site, tensors in outcome.sent("up")}


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_every_site_predicts_with_the_mean_of_all_models(tmp_path: Path, mean: str) -> None:
    outcome = _run(tmp_path, mean=mean)
    pieces, start = outcome.experiment, {n: v for n, v in outcome.shared.items() if "/" not in n}
    table = pd.read_parquet(tmp_path / "sites" / "b" / "predictions.parquet")
    rows = table[(table["split"] == "test") & (table["model"] == "personal")]
    mean_of, std_of = pieces.backbone.preprocessing.mean, pieces.backbone.preprocessing.std
    pixels = torch.from_numpy(SITES["b"].test.images.astype(np.float32) / 255)
    images = ((pixels - torch.tensor(mean_of)) / torch.tensor(std_of)).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = [
            pieces.model.forward({**start, **model}, images).double().numpy() for model in _sent(outcome).values()
        ]
    expected = np.mean([_softmax(z) for z in logits], 0) if mean == "probabilities" else _softmax(np.mean(logits, 0))
    np.testing.assert_allclose(rows[[f"p.{name}" for name in federation.CLASSES]], expected, rtol=0, atol=1e-6)
    other = _softmax(np.mean(logits, 0)) if mean == "probabilities" else np.mean([_softmax(z) for z in logits], 0)
    assert np.abs(expected - other).max() > 1e-5, "the two means differ, so the option is tested"


def test_a_member_is_what_the_sites_own_training_gives(tmp_path: Path) -> None:
    """One site alone under FedAvg is local training from the common start; with others beside, nothing changes it."""
    outcome = _run(tmp_path / "all")
    for site, data in SITES.items():
        settings = federation.configure(strategy={"name": "fedavg"})
        alone = federation.run(tmp_path / site, settings, {site: data})
        assert equal(_sent(outcome)[site], {name: alone.shared[name] for name in _sent(outcome)[site]})
        single = federation.run(
            tmp_path / f"one {site}", federation.configure(strategy={"name": "ensemble"}), {site: data}
        )
        (member,) = members.each(single.served(site))
        assert equal(member, alone.served(site))


def test_models_travel_once_and_bytes_are_the_formula(tmp_path: Path) -> None:
    outcome = _run(tmp_path)
    assert [(number, site) for number, site, _ in outcome.sent("up")] == [(ROUNDS, site) for site in SITES]
    assert {number for number, _, _ in outcome.sent("down")} == {1}, "the start comes once, and nothing in between"
    specs = outcome.experiment.model.specs
    scalars = sum(int(np.prod([size or 0 for size in spec.shape])) for spec in specs.values())
    drawn = sum(int(np.prod(spec.shape)) for n, spec in specs.items() if n not in outcome.experiment.common)
    ledger, head, bits, names = outcome.progress.ledger.summary(), 9, -(-len(specs) // 8), 2 * len(specs)
    assert ledger["up"]["per_site"] == dict.fromkeys(SITES, head + bits + 4 * scalars)
    start, end = (head + -(-names // 8) + extra for extra in (4 * drawn, 4 * len(specs) + 4 * len(SITES) * scalars))
    assert ledger["down"]["per_site"] == dict.fromkeys(SITES, start + end)


def test_the_sites_own_model_is_reported_beside(tmp_path: Path) -> None:
    _run(tmp_path)
    table = pd.read_parquet(tmp_path / "sites" / "a" / "predictions.parquet")
    assert set(table["model"]) == {"personal", "global", "before_aggregation"}
    p = [f"p.{name}" for name in federation.CLASSES]
    by = {model: rows[p].to_numpy() for model, rows in table.groupby("model")}
    np.testing.assert_array_equal(by["personal"], by["global"])
    assert np.abs(by["personal"] - by["before_aggregation"]).max() > 1e-4


def test_a_tuner_that_trains_other_tensors_in_other_rounds_sends_all_of_them(tmp_path: Path) -> None:
    settings = variants.settings("ensemble", tuner=variants.table("stochastic_block site"), train={"rounds": 3})
    outcome = federation.run(tmp_path, settings, SITES)
    blocks = {n.split(".")[1] for n in _sent(outcome)["a"] if n.startswith("blocks.")}
    assert len(blocks) > 1
    models = list(members.each(outcome.served("a")))
    assert len(models) == len(SITES)
    assert all(model.keys() == outcome.experiment.model.specs.keys() for model in models)


def test_sites_of_the_last_round_are_the_members(tmp_path: Path) -> None:
    outcome = _run(tmp_path, participation=0.67, rounds=2)
    assert len(_sent(outcome)) == 2
    assert [len(list(members.each(outcome.served(site)))) for site in SITES] == [2, 2, 2]


def test_what_cannot_go_is_refused() -> None:
    with pytest.raises(ConfigError, match="a model without its head cannot vote"):
        federation.assemble(federation.configure(strategy={"name": "ensemble"}, head={"share": "personal"}))
    with pytest.raises(ConfigError, match="nothing to choose from"):
        federation.assemble(federation.configure(strategy={"name": "ensemble"}, evaluation={"serve": "best"}))
    with pytest.raises(ConfigError, match="mean"):
        federation.configure(strategy={"name": "ensemble", "mean": "votes"})
