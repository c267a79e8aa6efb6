"""Every verb of the command line, one after the other, on one small federation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from consilium import cli


def _call(*words: object) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    assert not end.value.code, words


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verbs") / "small.toml"
    path.write_text("""
        name = "small"
        [backbone]
        weights = "embedded"
        [sites]
        num_images = 80
        num_sites = 2
        [train]
        rounds = 2
        local_steps = 2
        [evaluation]
        bootstrap = 20
    """)
    return path


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    out = config.parent / "run"
    _call("run", config, "--out", out, "--quiet")
    return out


def test_check_predicts_the_bytes_that_the_run_measures(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _call("check", config, "--json")
    predicted, measured = json.loads(capsys.readouterr().out), json.loads((run / "result.json").read_text())
    assert {way: predicted["bytes"][way] for way in ("up", "down")} == {
        way: measured["bytes"][way] for way in ("up", "down")
    }
    assert predicted["parameters"] == measured["parameters"]


def test_a_finished_run_is_refused_without_resume_and_untouched_with_it(config: Path, run: Path) -> None:
    before = (run / "predictions.parquet").read_bytes(), (run / "result.json").read_bytes()
    with pytest.raises(SystemExit) as end:
        cli.main(["run", str(config), "--out", str(run), "--quiet"])
    assert end.value.code == 1
    _call("run", config, "--out", run, "--quiet", "--resume")
    assert ((run / "predictions.parquet").read_bytes(), (run / "result.json").read_bytes()) == before


def test_report_writes_the_page_where_it_says(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _call("report", run, run, "--out", tmp_path / "page.html")
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == str(tmp_path / "page.html")
    assert "majority class" in shown
    assert "<html" in (tmp_path / "page.html").read_text()


def test_predict_gives_probabilities_of_the_declared_classes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((50, 70, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    site = next(iter(json.loads((run / "result.json").read_text())["sites"]))
    _call("predict", run, tmp_path / "grey.png", "--site", site, "--json")
    (row,) = json.loads(capsys.readouterr().out)
    shares = [value for key, value in row.items() if key.startswith("p.")]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("format", ["peft", "timm"])
def test_export_writes_a_folder_with_weights(run: Path, tmp_path: Path, format: str) -> None:
    _call("export", run, "--format", format, "--out", tmp_path / "exported")
    assert list((tmp_path / "exported").rglob("*.safetensors"))


def test_data_verbs_describe_and_export_the_split(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _call("data", "inspect", config, "--json")
    assert json.loads(capsys.readouterr().out)["images"] == 80
    _call("data", "audit", config, "--json")
    assert json.loads(capsys.readouterr().out)["counts"]["groups_across_splits"] == 0
    _call("data", "split", config, "--out", tmp_path / "split.parquet")
    mine = pd.read_parquet(tmp_path / "split.parquet").set_index("id")["split"]
    used = pd.read_parquet(run / "split.parquet").set_index("id")["split"]
    pd.testing.assert_series_equal(mine.sort_index(), used.sort_index(), check_dtype=False)
    assert len(mine) == 80


def test_an_exported_split_is_what_another_run_imports(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _call("data", "split", config, "--set", "sites.split.seed=5", "--out", tmp_path / "split.parquet")
    capsys.readouterr()
    _call("check", config, "--set", "sites.split.seed=5", "--json")
    drawn = json.loads(capsys.readouterr().out)
    _call("check", config, "--set", f"sites.split.file={tmp_path / 'split.parquet'}", "--json")
    imported = json.loads(capsys.readouterr().out)
    assert imported["split_hash"] == drawn["split_hash"]
    _call("check", config, "--json")
    assert json.loads(capsys.readouterr().out)["split_hash"] != drawn["split_hash"]
