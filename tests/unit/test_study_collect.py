"""The files of a study: a row per run, a row per number, and nothing of the test split where values are selected."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from consilium.study.collect import Collection
from consilium.study.prepare import Job
from tests.unit.test_study_plan import STUDY, planned


def value(number: float, **more: object) -> dict[str, Any]:
    return {"value": number, "low": number - 0.1, "high": None, "n": 4, **more}


def tree(number: float) -> dict[str, Any]:
    levels = {"pooled": value(number), "mean": value(number, sites=2), "worst": value(number, site="s")}
    return {"balanced_accuracy": {**levels, "per_site": {"s": value(number), "t": value(number)}}}


def result(number: float) -> dict[str, Any]:
    both = {"val": {"global": tree(number), "personal": tree(number)}, "test": {"global": tree(0.77)}}
    return {
        "parameters": {"backbone": 10, "trainable": 3, "exchanged": 2},
        "bytes": {"up": {"total": 5, "per_site": {}}, "down": {"total": 7, "per_site": {}}, "control": {}},
        "seconds": 1.5,
        "image_passes": {"total": 9, "per_site": {}},
        "peak_memory_bytes": 99,
        "metrics": both,
        "references": {"local": {"metrics": {"val": {"personal": tree(0.2)}, "test": {"personal": tree(0.77)}}}},
        "majority": {"test": tree(0.77)},
        "held_out": {"metrics": {"global": tree(0.77)}},
    }


def collection(folder: Path, text: str = STUDY) -> Collection:
    made = planned(folder, text)
    jobs = [Job(str(n), cell.settings, 0, cell.config) for n, cell in enumerate(made.cells)]
    jobs[-1] = Job(jobs[-1].run, jobs[-1].settings, 0, None, refused="no")
    return Collection(made, folder, jobs, {job.run: job.folder(folder) for job in jobs}, ["odd"])


def finish(made: Collection, run: str, number: float) -> None:
    made.folders[run].mkdir(parents=True)
    (made.folders[run] / "result.json").write_text(json.dumps(result(number)))
    made.mark(run, "done")


def test_every_run_has_a_row_whatever_became_of_it(tmp_path: Path) -> None:
    made = collection(tmp_path)
    finish(made, "0", 0.5)
    made.mark("1", "failed", "broken")
    made.mark("2", "running")
    made.write()
    table = pd.read_parquet(tmp_path / "runs.parquet")
    assert list(table["status"]) == ["done", "failed", "running", "refused"]
    assert list(table["error"]) == ["", "broken", "", "no"]
    assert list(table["tuner"]) == ["lora", "lora", "linear", "linear"]
    first = table.iloc[0]
    assert (first["folder"], first["bytes.up"], first["bytes.down"], first["bytes.total"]) == ("runs/0", 5, 7, 12)
    assert (first["parameters.trainable"], first["image_passes"], first["majority"]) == (3, 9, 0.77)
    assert table["bytes.total"].isna().tolist() == [False, True, True, True]
    made.stopped()
    assert list(pd.read_csv(tmp_path / "runs.csv")["status"]) == ["done", "failed", "waiting", "refused"]


def test_images_in_one_place_are_no_bytes_of_messages(tmp_path: Path) -> None:
    text = (
        'name = "x"\n[axes.strategy.pooled]\nstrategy.name = "pooled"\n[axes.strategy.local]\nstrategy.name = "local"\n'
    )
    made = collection(tmp_path, text + '[axes.strategy.fedavg]\nstrategy.name = "fedavg"\n')
    finish(made, "0", 0.5)
    finish(made, "1", 0.5)
    runs = made.runs().set_index("run")
    assert runs.loc["0", ["bytes.up", "bytes.down", "bytes.total"]].isna().all()
    assert runs.loc["0", "parameters.trainable"] == 3
    assert runs.loc["1", "bytes.total"] == 12


def test_every_number_has_a_row(tmp_path: Path) -> None:
    made = collection(tmp_path)
    finish(made, "0", 0.5)
    made.write()
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert len(table) == 5 * (2 + 1 + 2 + 1)  # three levels and two sites of each tree
    assert set(zip(table["split"], table["model"], strict=True)) == {
        ("val", "global"),
        ("val", "personal"),
        ("val", "local reference"),
        ("test", "global"),
        ("test", "local reference"),
        ("held_out", "global"),
    }
    row = table.query("split == 'val' and model == 'global' and site == 't'").iloc[0]
    assert (row["run"], row["tuner"], row["where"], row["seed"], row["level"]) == ("0", "lora", "natural", 0, "site")
    assert (row["value"], row["low"], row["n"]) == (0.5, 0.4, 4)
    assert pd.isna(row["high"])


def test_a_study_without_a_finished_run_can_be_read(tmp_path: Path) -> None:
    made = collection(tmp_path)
    made.write()
    assert len(pd.read_parquet(tmp_path / "results.parquet")) == 0
    about = json.loads((tmp_path / "study.json").read_text())
    assert [run["status"] for run in about["runs"]] == ["waiting"] * 3 + ["refused"]
    assert about["compare"]["method"] == "tuner"
    assert about["warnings"] == ["odd"]
    assert about["axes"][1] == {"name": "where", "values": ["natural", "iid"]}


def test_values_of_several_types_become_words_of_one_column(tmp_path: Path) -> None:
    made = collection(tmp_path)
    labels = (1, 0.5, "auto", True)
    made.jobs = [
        replace(job, settings={"tuner": at, "where": n})
        for n, (job, at) in enumerate(zip(made.jobs, labels, strict=True))
    ]
    made.write()
    table = pd.read_parquet(tmp_path / "runs.parquet")
    assert table["tuner"].tolist() == ["1", "0.5", "auto", "True"]
    assert table["where"].tolist() == [0, 1, 2, 3]


SELECT = STUDY.replace("[0, 3]", "[0]") + '[select]\nover = ["where"]\n'


def test_where_values_are_selected_nothing_of_the_test_split_is_written(tmp_path: Path) -> None:
    made = collection(tmp_path, SELECT)
    for run, number in zip("012", (0.3, 0.4, 0.6), strict=True):
        finish(made, run, number)
    made.write()
    assert made.select() == tmp_path / "selected.toml"
    for path in tmp_path.glob("*.*"):
        assert b"0.77" not in path.read_bytes(), path
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert set(table["split"]) == {"val"}
    assert pd.read_parquet(tmp_path / "runs.parquet")["majority"].isna().all()
    chosen = tomllib.loads((tmp_path / "selected.toml").read_text())
    assert chosen["values"]["lora"] == {"sites.partition": {"kind": "iid", "num_sites": 3}}
    assert (chosen["split"], chosen["seeds"]) == ("val", [0])


def test_nothing_is_selected_before_all_runs_have_ended(tmp_path: Path) -> None:
    made = collection(tmp_path, SELECT)
    finish(made, "0", 0.3)
    assert made.select() is None
    assert not (tmp_path / "selected.toml").exists()
