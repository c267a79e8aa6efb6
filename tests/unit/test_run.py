"""Composition of a run: its folder, what can be served, and its references."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium import config, run
from consilium.errors import ConfigError
from consilium.sites.federation import Federation
from tests import federation

WEIGHTED = {"class_weight": "inverse", "class_counts": "federation"}
SMALL = {
    "sites": {"source": "phantom", "num_images": 24, "num_sites": 2, "image_size": 32},
    "train": {"rounds": 1, "batch_size": 6, "learning_rate": 0.01},
    "evaluation": {"bootstrap": 0, "references": ["local"]},
}


@pytest.mark.parametrize("train", [{"quorum": 0.5}, {"participation": 0.5}])
def test_the_best_round_needs_every_site_in_every_round(train: dict[str, float]) -> None:
    settings = federation.configure(evaluation={"serve": "best"}, train={**federation.TABLE["train"], **train})
    sites = federation.hospitals(6, 6)
    prepared = Federation.__new__(Federation)
    object.__setattr__(prepared, "sites", sites)
    with pytest.raises(ConfigError, match="every site"):
        run.check_serving(settings, prepared)
    run.check_serving(settings.model_copy(update={"train": config.TrainConfig()}), prepared)


@pytest.mark.parametrize("name", ["local", "pooled"])
def test_a_reference_counts_the_classes_of_its_own_site(name: str) -> None:
    alone = run.reference_config(federation.configure(task=WEIGHTED), name, {"a": 9, "b": 12})
    assert federation.assemble(alone).task.class_counts == "site"
    assert alone.task.options()["class_weight"] == "inverse"


def test_class_counts_do_not_leave_a_site_that_shares_nothing() -> None:
    with pytest.raises(ConfigError, match="class counts would leave"):
        federation.assemble(federation.configure(task=WEIGHTED, strategy={"name": "local"}))


def test_the_folder_of_a_run_may_be_the_one_it_is_called_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.run(federation.configure(**SMALL), Path()) == tmp_path
    assert (tmp_path / "references" / "local" / "summary.json").is_file()
