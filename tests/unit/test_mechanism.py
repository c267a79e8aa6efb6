"""What adapters tell of the site, asked of finished runs, and runs of which it cannot be asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium import checkpoint, config, mechanism, predict, run
from consilium.cli import main
from consilium.errors import DataError, StateError
from consilium.local.predict import pooled_features
from tests.e2e import runs

SMALL = ("train.rounds=2", "train.local_steps=3", "sites.num_images=160", "sites.split={train=0.5, val=0.3, test=0.2}")
Made = Callable[[str], Path]


def _settings(folder: Path, *settings: str) -> config.Config:
    (folder / "tiny.toml").write_text(runs.CONFIG)
    return config.load(folder / "tiny.toml", [*SMALL, *settings])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    known: dict[str, Path] = {}

    def one(strategy: str) -> Path:
        if strategy not in known:
            folder = tmp_path_factory.mktemp("run")
            known[strategy] = run.run(_settings(folder, f"strategy={strategy}"), folder / "out")
        return known[strategy]

    return one


@pytest.fixture(autouse=True)
def _one_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "SHUFFLES", 1)


def _adapters(found: dict[str, Any], part: str) -> list[str]:
    return [each["adapter"] for each in found["probes"] if each["part"] == part]


def test_a_run_of_two_parts_is_asked_part_by_part(made: Made) -> None:
    folder = made('{name="fedopal"}')
    found = mechanism.examine(folder)
    sites = list(found["sites"])
    assert found == runs.read(folder / "mechanism.json")
    assert list(found["parts"]) == [*mechanism.ORDER]
    assert _adapters(found, "shared") == [""], "one for all"
    assert _adapters(found, "personal") == _adapters(found, "whole") == sites
    assert found["chance"] == 1 / len(sites)
    for each in (*found["probes"], *found["parts"].values()):
        assert 0 <= each["low"] <= each["value"] <= each["high"] <= 1
        assert 0 <= each["control"] <= 1
    for pair, difference in found["differences"].items():
        first, second = (found["parts"][name]["value"] for name in pair.split(" - "))
        assert difference["value"] == pytest.approx(first - second)
    assert mechanism.examine(folder) == found, "nothing is drawn anew"


def test_features_are_those_of_all_sites_images_by_one_part(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of one site's personal part sees every site's validation images with that part alone."""
    folder, seen = made('{name="fedopal"}'), []
    ask = mechanism._ask

    def look(question: Any, shuffles: Any, part: str, adapter: str, features: Any) -> Any:
        seen.append((part, adapter, features))
        return ask(question, shuffles, part, adapter, features)

    monkeypatch.setattr(mechanism, "_ask", look)
    found = mechanism.examine(folder)
    prepared = run.prepare(config.from_dict(runs.read(folder / "config.json")["config"]), lambda _: None)
    features = {(part, adapter): each for part, adapter, each in seen}
    for site in found["sites"]:
        trained = predict.load_trained(folder, site)
        own = {n: v for n, v in trained.variables.items() if ".personal." in n}
        assert own
        setting = trained.experiment.setting
        expected = torch.cat(
            [
                pooled_features(trained.model, own, prepared.sites[each].val, setting.preprocessing, setting.device)
                for each in found["sites"]
            ]
        )
        torch.testing.assert_close(features["personal", site], expected, rtol=0, atol=0)
        adds = features["personal", site] - features["backbone", ""]
        torch.testing.assert_close(features["personal_adds", site], adds, rtol=0, atol=0)
        assert adds.abs().max() > 0
    assert not torch.equal(features["shared", ""], features["backbone", ""])


def test_each_site_s_model_is_measured_at_every_site(made: Made) -> None:
    """On the diagonal stand the run's own numbers."""
    folder = made('{name="fedopal"}')
    found, result = mechanism.examine(folder), runs.read(folder / "result.json")
    assert list(found["cross"]) == list(found["sites"])
    own = result["metrics"]["val"]["personal"]["balanced_accuracy"]["per_site"]
    for site, values in found["cross"].items():
        assert list(values) == list(found["sites"])
        assert values[site]["value"] == pytest.approx(own[site]["value"])
    columns = [{site: values[at]["value"] for site, values in found["cross"].items()} for at in found["sites"]]
    assert any(len(set(column.values())) > 1 for column in columns)


def test_where_sites_have_shared_parts_of_their_own_each_is_asked(made: Made) -> None:
    found = mechanism.examine(made('{name="dual_lora", server="leave_one_out"}'))
    assert _adapters(found, "shared") == list(found["sites"])


def test_where_there_is_one_part_the_whole_model_is_asked(made: Made) -> None:
    found = mechanism.examine(made('{name="fedavg"}'))
    assert list(found["parts"]) == ["label", "backbone", "whole"]
    assert _adapters(found, "whole") == [""]
    assert found["cross"] == {}, "one model"
    alone = mechanism.examine(made('{name="fedper"}'))
    assert _adapters(alone, "whole") == [""], "sites differ in their heads alone, of which features know nothing"
    assert len(alone["cross"]) == 4


def test_the_verb_prints_a_table_or_json_and_true_exit_codes(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made('{name="fedavg"}')
    for words, code in ((["mechanism", str(folder)], 0), (["mechanism", str(folder.parent)], 1)):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert (left.value.code or 0) == code
    shown = capsys.readouterr()
    assert "features of the backbone alone" in shown.out
    assert "there is no result.json" in shown.err
    with pytest.raises(SystemExit):
        main(["mechanism", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["split"] == "val"


# ------------------------------------------------------------------------------------------------ refused
def _copied(folder: Path, to: Path, *names: str) -> dict[str, Any]:
    for name in names:
        (to / name).write_bytes((folder / name).read_bytes())
    stored: dict[str, Any] = runs.read(folder / "config.json")
    return stored


def test_data_that_are_not_the_run_s_are_refused(made: Made, tmp_path: Path) -> None:
    stored = _copied(made('{name="fedavg"}'), tmp_path, "result.json", "split.parquet")
    checkpoint.write_json(tmp_path / "config.json", {**stored, "data_digest": "0" * 64})
    with pytest.raises(StateError, match="the data are not those of this run: data_digest"):
        mechanism.examine(tmp_path)


def test_a_folder_without_the_sites_adapters_is_refused(made: Made, tmp_path: Path) -> None:
    _copied(made('{name="fedavg"}'), tmp_path, "result.json", "config.json", "split.parquet")
    with pytest.raises(StateError, match="this run is not finished"):
        mechanism.examine(tmp_path)


def test_a_deployment_s_folder_is_refused_before_anything_is_read(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator knows neither the split nor what the images are."""
    stored = _copied(made('{name="fedavg"}'), tmp_path, "result.json")
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("images were read"))
    without = {key: value for key, value in stored.items() if key not in ("data_digest", "split_hash")}
    checkpoint.write_json(tmp_path / "config.json", without)
    with pytest.raises(StateError, match="only a simulation can be asked this"):
        mechanism.examine(tmp_path)


def test_sites_with_too_few_patients_are_left_out_and_two_must_stay(tmp_path: Path) -> None:
    prepared = run.prepare(_settings(tmp_path), lambda _: None)
    names = sorted(prepared.sites)

    def cut(*few: str) -> Any:
        return replace(prepared, sites={n: _cut(data) if n in few else data for n, data in prepared.sites.items()})

    assert mechanism._probed(cut(names[0])) == (names[1:], names[:1])
    with pytest.raises(DataError, match="needs two sites"):
        mechanism._probed(cut(*names[1:]))


def _cut(data: Any) -> Any:
    """The same site with the validation images of its first patient alone."""
    keep = np.flatnonzero(data.val.groups == data.val.groups[0])
    columns = {key: getattr(data.val, key)[keep] for key in ("rows", "labels", "ids", "groups", "origins")}
    return replace(data, val=replace(data.val, **columns))
