"""The round loop: who is drawn, which round is served, when a run stops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilium.coordinator import drawn_sites
from consilium.engines.simulate import secrets_of
from consilium.errors import ConfigError, TrainingError
from tests import federation

SITES = federation.hospitals(10, 7, 12)


def _run(folder: Path, sites: dict[str, Any] | None = None, **tables: Any) -> federation.Outcome:
    return federation.run(folder, federation.configure(**tables), sites or SITES)


@pytest.mark.parametrize(("share", "count"), [(1.0, 5), (0.5, 2), (0.7, 4), (0.01, 1)])
def test_a_share_of_the_sites_is_drawn_by_seed_and_round(share: float, count: int) -> None:
    draws = [drawn_sites(share, "edcba", 3, number) for number in range(1, 40)]
    assert all(len(set(draw)) == count and draw == tuple(sorted(draw)) for draw in draws)
    assert draws == [drawn_sites(share, "abcde", 3, number) for number in range(1, 40)], "whatever their order"
    assert {site for draw in draws for site in draw} == set("abcde")
    if count < 5:
        assert draws != [drawn_sites(share, "abcde", 4, number) for number in range(1, 40)]


def test_simulated_secrets_differ_by_site_and_seed_and_from_the_seed() -> None:
    secrets = [*secrets_of(3, SITES).values(), *secrets_of(4, SITES).values(), 3, 4]
    assert len(set(secrets)) == 8
    assert secrets_of(3, SITES) == secrets_of(3, SITES)


@pytest.mark.parametrize(("select", "better"), [("loss", min), ("balanced_accuracy", max)])
def test_the_best_validated_round_is_served(tmp_path: Path, select: str, better: Any) -> None:
    train = {"rounds": 5, "batch_size": 6, "learning_rate": 0.2, "schedule": {"name": "constant", "warmup": 0}}
    outcome = _run(tmp_path, train=train, evaluation={"serve": "best", "select": select})
    told = [event for event in outcome.events if event["event"] == "site" and event["kind"] in ("round", "evaluate")]
    rounds: dict[int, list[float]] = {}
    for event in told:
        judged = event["round"] if event["kind"] == "evaluate" else event["round"] - 1
        rounds.setdefault(judged, []).append(event["val"]["incoming"][select])
    means = {judged: math.fsum(values) / 3 for judged, values in rounds.items() if judged}
    assert len(means) == 5
    assert means[outcome.progress.server.round] == better(means.values())
    assert len(set(means.values())) > 1


def test_an_unknown_metric_to_select_by_is_refused_before_training() -> None:
    settings = federation.configure(evaluation={"serve": "best", "select": "balanced"})
    with pytest.raises(ConfigError, match=r"no such validation metric(.|\n)*balanced_accuracy"):
        federation.assemble(settings)


def test_a_metric_that_no_site_defines_stops_the_run_early(tmp_path: Path) -> None:
    one_class = {}
    for name, data in SITES.items():
        labels = np.zeros_like(data.val.labels)
        one_class[name] = replace(data, val=replace(data.val, labels=labels))
    with pytest.raises(TrainingError, match="no site's validation images define macro_auroc"):
        _run(tmp_path, one_class, evaluation={"serve": "best", "select": "macro_auroc"})
    assert (tmp_path / "checkpoints" / "round-00001.safetensors").is_file()


def test_a_site_that_diverges_stops_the_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"non-finite numbers from site a, b, c in round 1(.|\n)*learning_rate"):
        _run(tmp_path, train={"learning_rate": 1e30, "clip_norm": 1e30, "optimizer": "sgd", "rounds": 2})


@pytest.mark.parametrize("serve", ["last", "best"])
def test_the_time_of_each_site_is_the_sum_of_what_it_said(tmp_path: Path, serve: str) -> None:
    outcome = _run(tmp_path, train={"rounds": 3, "batch_size": 6, "learning_rate": 0.2}, evaluation={"serve": serve})
    told = [event for event in outcome.events if event["event"] == "site" and event["kind"] == "round"]
    for site in SITES:
        said = [event["seconds"] for event in told if event["site"] == site]
        assert len(said) == 3
        assert outcome.progress.site_seconds[site] == pytest.approx(sum(said))


def test_a_site_without_training_images_takes_part_and_changes_nothing(tmp_path: Path) -> None:
    with_empty = {**SITES, "d": federation.hospital("d", 0, 50)}
    first, second = _run(tmp_path / "with", with_empty), _run(tmp_path / "without")
    assert federation.bits(first.shared) == federation.bits(second.shared)
    assert federation.bits(first.served("d")) == federation.bits(first.shared)


def test_class_counts_of_the_federation_reach_every_site(tmp_path: Path) -> None:
    weighted = {"class_weight": "inverse", "class_counts": "federation"}
    outcome = _run(tmp_path / "federation", task=weighted)
    assert outcome.progress.class_counts == [4 + 3 + 4, 3 + 2 + 4, 3 + 2 + 4]
    asked = [outcome.decode("down", data) for way, _, data in outcome.wire if way == "down"]
    assert [request.kind for request in asked[:3]] == ["describe"] * 3
    assert all(r.context["class_counts"] == [11, 9, 9] for r in asked if r.kind == "round")
    own = _run(tmp_path / "own", task={"class_weight": "inverse"})
    assert federation.bits(own.shared) != federation.bits(outcome.shared)
