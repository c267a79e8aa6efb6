"""The same configuration gives the same bits, whatever happens beside it; another seed gives others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.processes import Parent
from tests.e2e.runs import KINDS, Finished, assert_same, contents, events, read, words

BACKWARDS = """
from consilium.engines.simulate import Transport
original = Transport.round
Transport.round = lambda self, requests: reversed(list(original(self, requests)))
"""


@pytest.mark.parametrize("kind", ["fedavg", "half"])
def test_a_second_run_is_the_same(consilium: Parent, finished: Finished, tmp_path: Path, kind: str) -> None:
    done = consilium(*words(tmp_path, *KINDS[kind]), "--out", tmp_path / "again", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    assert_same(finished(kind), tmp_path / "again")


@pytest.mark.parametrize(("kind", "workers"), [("fedper", 2), ("best", 3), ("drawless", 3)])
def test_the_number_of_workers_changes_nothing(
    consilium: Parent, finished: Finished, tmp_path: Path, kind: str, workers: int
) -> None:
    settings = (*KINDS[kind], f"engine.workers={workers}")
    done = consilium(*words(tmp_path, *settings), "--out", tmp_path / "out", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    assert_same(finished(kind), tmp_path / "out")


def test_the_order_in_which_sites_finish_changes_nothing(consilium: Parent, finished: Finished, tmp_path: Path) -> None:
    done = consilium(*words(tmp_path, *KINDS["half"]), "--out", tmp_path / "out", "--quiet", hook=BACKWARDS)
    assert (done.code, done.stderr) == (0, "")
    assert_same(finished("half"), tmp_path / "out")


def test_another_seed_is_another_run_on_the_same_split(consilium: Parent, finished: Finished, tmp_path: Path) -> None:
    done = consilium(*words(tmp_path, *KINDS["half"], "seed=4"), "--out", tmp_path / "out", "--quiet")
    assert done.code == 0
    one, other = (read(folder / "result.json") for folder in (finished("half"), tmp_path / "out"))
    files, others = contents(finished("half")), contents(tmp_path / "out")
    for name in ("predictions.parquet", "adapters/global.safetensors", "adapters/summit.safetensors"):
        assert files[name] != others[name], name
    assert one["metrics"] != other["metrics"]
    assert files["split.parquet"] == others["split.parquet"]
    for key in ("split_hash", "data_digest", "sites"):
        assert one[key] == other[key]
    drawn = [
        [[site for site, row in event["sites"].items() if row["status"] == "ok"] for event in events(folder)]
        for folder in (finished("half"), tmp_path / "out")
    ]
    assert drawn[0] != drawn[1]


def test_another_seed_of_the_split_is_another_split(consilium: Parent, finished: Finished, tmp_path: Path) -> None:
    file = words(tmp_path, *KINDS["half"])[1]
    before, after = (
        json.loads(consilium("check", file, "--json", "--set", f"sites.split.seed={seed}").stdout) for seed in (0, 1)
    )
    assert before["split_hash"] == read(finished("half") / "result.json")["split_hash"]
    assert after["split_hash"] != before["split_hash"]


# ------------------------------------------------------------------------------------------------ references
def _beside(finished: Finished, folder: Path) -> Path:
    """A folder with a finished run `first` that has both references."""
    shutil.copytree(finished("fedavg"), folder / "first")
    return folder


def test_a_reference_of_a_neighbour_is_used_again(consilium: Parent, finished: Finished, tmp_path: Path) -> None:
    _beside(finished, tmp_path)
    (tmp_path / "broken" / "references" / "local").mkdir(parents=True)
    for name in ("config.json", "summary.json"):
        (tmp_path / "broken" / "references" / "local" / name).write_text("{")
    settings = (*KINDS["fedavg"], "strategy.name=fedprox", "strategy.mu=0.1")
    done = consilium(*words(tmp_path, *settings), "--out", tmp_path / "second", "--json")
    assert (done.code, done.stderr) == (0, "")
    reused = [event for event in done.events if event["event"] == "reference"]
    assert [(event["name"], event["kind"]) for event in reused] == [("local", "reused"), ("pooled", "reused")]
    assert {event["from"] for event in reused} == {
        str(tmp_path / "first" / "references" / n) for n in ("local", "pooled")
    }
    first, second = tmp_path / "first", tmp_path / "second"
    assert contents(first / "references") == contents(second / "references")
    assert read(first / "result.json")["references"] == read(second / "result.json")["references"]
    assert (first / "predictions.parquet").read_bytes() != (second / "predictions.parquet").read_bytes()


@pytest.mark.parametrize("setting", ["seed=4", "train.rounds=2", "sites.seed=1", "sites.split.seed=1", "tuner.rank=3"])
def test_a_reference_of_something_else_is_not(
    consilium: Parent, finished: Finished, tmp_path: Path, setting: str
) -> None:
    settings = (*KINDS["fedavg"], "evaluation.references=['local']", setting)
    command = (*words(tmp_path, *settings), "--out", _beside(finished, tmp_path) / "second", "--json")
    kinds = {event["kind"] for event in consilium(*command).events if event["event"] == "reference"}
    assert kinds == {"start", "round"}


COPY_HALF = """
import os, shutil, signal
original, copied = shutil.copy2, []
def copy(source, target, **options):
    copied.append(source)
    if len(copied) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(source, target, **options)
shutil.copytree.__defaults__ = tuple(copy if value is original else value for value in shutil.copytree.__defaults__)
shutil.copytree.__kwdefaults__ = None
"""


@pytest.mark.parametrize("number", [3, 12])
def test_killed_while_a_reference_is_copied(consilium: Parent, finished: Finished, tmp_path: Path, number: int) -> None:
    settings = (*KINDS["fedavg"], "strategy.weights=uniform")
    command = (*words(tmp_path, *settings), "--out", _beside(finished, tmp_path) / "second")
    assert consilium(*command, hook=COPY_HALF.format(number=number)).code == -9
    shutil.rmtree(tmp_path / "first" / "references" / "local")
    done = consilium(*command, "--resume", "--json")
    assert (done.code, done.stderr) == (0, "")
    kinds = {(event["name"], event["kind"]) for event in done.events if event["event"] == "reference"}
    assert kinds == {("local", "start"), ("local", "round"), ("pooled", "reused")}
    assert_same(finished("fedavg") / "references", tmp_path / "second" / "references")


def test_references_see_as_many_images_as_the_run(finished: Finished) -> None:
    result = read(finished("fedavg") / "result.json")
    passes, references = result["image_passes"], result["references"]
    assert references["local"]["image_passes"] == passes
    assert references["pooled"]["image_passes"] == {"total": passes["total"], "per_site": {"pooled": passes["total"]}}
    assert passes["total"] == sum(passes["per_site"].values())
    images = {name: sizes["train"]["n"] for name, sizes in result["sites"].items()}
    assert passes["per_site"] == {name: 3 * count for name, count in images.items()}


def test_whatever_a_site_does_in_a_round(consilium: Parent, tmp_path: Path) -> None:
    """Steps whose batches are not all whole, and only some of the sites in a round."""
    settings = ("evaluation.references=['local', 'pooled']", "train.local_steps=3", "train.participation=0.5")
    done = consilium(*words(tmp_path, *settings), "--out", tmp_path / "out", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    result = read(tmp_path / "out" / "result.json")
    passes, references = result["image_passes"], result["references"]
    assert len(set(passes["per_site"].values())) > 1
    assert references["local"]["image_passes"] == passes
    assert abs(references["pooled"]["image_passes"]["total"] - passes["total"]) <= 3 / 2, "a whole number in each round"


# ------------------------------------------------------------------------------------------------ unseen hospitals
def test_a_held_out_site_gives_no_training_image_and_is_measured(consilium: Parent, tmp_path: Path) -> None:
    held = ("sites.held_out=['summit']", "evaluation.references=['pooled']")
    done = consilium(*words(tmp_path, *held), "--out", tmp_path / "out", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    result = read(tmp_path / "out" / "result.json")
    trained = {"alpine", "harbour", "prairie"}
    assert set(result["sites"]) == set(result["image_passes"]["per_site"]) == trained
    assert set(result["bytes"]["up"]["per_site"]) == set(result["bytes"]["down"]["per_site"]) == trained
    assert set(result["metrics"]["test"]["personal"]["accuracy"]["per_site"]) == trained
    unseen = result["held_out"]["metrics"]["global"]["accuracy"]["per_site"]
    assert set(unseen) == {"summit"}
    assert unseen["summit"]["value"] is not None
    assert not (tmp_path / "out" / "sites" / "summit").exists()


def test_where_nothing_is_left_for_an_unseen_hospital_the_reason_is_given(consilium: Parent, tmp_path: Path) -> None:
    settings = ("sites.held_out=['summit']", "strategy.name=fedper")
    assert consilium(*words(tmp_path, *settings), "--out", tmp_path / "out", "--quiet").code == 0
    held_out = read(tmp_path / "out" / "result.json")["held_out"]
    assert held_out["metrics"] is None
    assert "no global model" in held_out["reason"]
