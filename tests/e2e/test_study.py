"""Whole studies in processes of their own: as many at once as may be, killed and resumed, on a local Ray instance."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.e2e import processes, runs

STUDY = """
name = "small"
base = "base.toml"
seeds = [0]
[axes.tuner.lora]
tuner = [{ name = "lora", rank = 2 }]
[axes.tuner.linear]
tuner = [{ name = "linear" }]
[axes.strategy.fedavg]
strategy = { name = "fedavg" }
[axes.strategy.fedit]
strategy = { name = "fedit" }
"""
BROKEN = """
[axes.tuner.broken]
tuner = [{ name = "lora", rank = 1 }]
train.learning_rate = 1e30
"""
TIMES = ["seconds", "peak_memory_bytes"]


def written(folder: Path, text: str = STUDY) -> Path:
    (folder / "base.toml").write_text(runs.CONFIG + 'references = ["local"]\n')
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


@pytest.fixture(scope="module")
def whole(consilium: processes.Parent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing disturbed, with two runs beside one another; for reading only."""
    folder = tmp_path_factory.mktemp("whole")
    done = consilium("study", written(folder), "--workers", "2", "--out", folder / "out", "--json")
    assert (done.code, done.stderr) == (0, ""), done
    said = json.loads(done.stdout)
    assert (said["done"], said["failed"], len(said["refused"])) == (3, [], 1)
    return folder / "out"


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A folder with the study's files and a copy of its outcome."""
    written(tmp_path)
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path


def words_of(folder: Path) -> list[str | Path]:
    return ["study", folder / "study.toml", "--workers", "1", "--out", folder / "out", "--json"]


def assert_same(one: Path, other: Path) -> None:
    """The same runs with the same numbers, to the last bit."""
    first, second = (pd.read_parquet(out / "runs.parquet").drop(columns=TIMES) for out in (one, other))
    pd.testing.assert_frame_equal(first, second)
    first, second = (pd.read_parquet(out / "results.parquet") for out in (one, other))
    pd.testing.assert_frame_equal(first, second)
    assert len(first)
    for run in first["run"].unique():
        runs.assert_same(one / "runs" / run, other / "runs" / run)


def table(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "runs.parquet").set_index(["tuner", "strategy"])


def test_pairs_that_do_not_fit_are_refused_and_all_others_run(whole: Path) -> None:
    rows = table(whole)
    assert rows["status"].to_dict() == {
        ("lora", "fedavg"): "done",
        ("lora", "fedit"): "done",
        ("linear", "fedavg"): "done",
        ("linear", "fedit"): "refused",
    }
    assert "product" in rows.loc[("linear", "fedit"), "error"]
    assert (rows["bytes.total"] > 0).sum() == 3
    assert {path.name for path in whole.iterdir()} >= {"report.html", "tables", "figures", "results.csv", "runs.csv"}


def test_a_reference_is_trained_once_for_runs_that_share_it(whole: Path) -> None:
    texts = [log.read_text() for log in (whole / "logs").iterdir()]
    assert sum("reference local: taken from" in text for text in texts) == 1
    assert sum("reference local: trains" in text for text in texts) == 2


# In the process that conducts the study: does something when a run has closed its first round, after so many are done.
HOOK = """
from consilium.study import local_pool, board
ended, tasks = [], {{}}
def submit(self, task, submit=local_pool.LocalPool.submit):
    tasks[task.run] = task
    submit(self, task)
def wait(self, seconds, wait=local_pool.LocalPool.wait):
    found = wait(self, seconds)
    ended.extend(found)
    for run, child in self._children.items():
        if len(ended) >= {ended} and board.far(tasks[run].folder).round >= 1:
            open({note!r}, "w").write(str(child.process.pid))
            {do}
    return found
local_pool.LocalPool.submit, local_pool.LocalPool.wait = submit, wait
import consilium.study.runner as runner
runner.TICK_SECONDS = 0.01
"""


def hook(do: str, note: Path, ended: int = 0) -> str:
    return "import os, signal\n" + HOOK.format(do=do, note=str(note), ended=ended)


def wait_for_the_end(pid: int) -> None:
    """Of a process that is nobody's child any more."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], processes.PATIENCE_SECONDS)[0], f"process {pid} lives on"
    os.close(descriptor)


def test_interrupted_killed_and_resumed_equals_uninterrupted(
    whole: Path, consilium: processes.Parent, tmp_path: Path
) -> None:
    written(tmp_path)
    words, note = words_of(tmp_path), tmp_path / "pid"
    done = consilium(*words, hook=hook("os.kill(os.getpid(), signal.SIGINT)", note))
    assert done.code == 130, done
    wait_for_the_end(int(note.read_text()))
    assert sorted(table(tmp_path / "out")["status"]) == ["refused", "waiting", "waiting", "waiting"]
    done = consilium(*words, hook=hook("os.kill(os.getpid(), signal.SIGKILL)", note, ended=1))
    assert done.code == -9, done
    wait_for_the_end(int(note.read_text()))
    assert sorted(table(tmp_path / "out")["status"])[0] == "done"
    done = consilium(*words)
    assert (done.code, done.stderr) == (0, ""), done
    assert_same(whole, tmp_path / "out")


def test_a_run_that_fails_or_is_killed_does_not_stop_the_others(consilium: processes.Parent, tmp_path: Path) -> None:
    text = STUDY.replace('[axes.strategy.fedit]\nstrategy = { name = "fedit" }\n', BROKEN)
    words: list[str | Path] = ["study", written(tmp_path, text), "--workers", "1", "--out", tmp_path / "out"]
    words += ["--set", "evaluation.references=[]"]
    done = consilium(*words, hook=hook("len(ended) == 1 and os.kill(child.process.pid, 9)", tmp_path / "pid", ended=1))
    assert done.code == 1, done
    rows = table(tmp_path / "out")
    assert list(rows["status"]) == ["done", "failed", "failed"]
    assert "died by SIGKILL" in rows.loc[("linear", "fedavg"), "error"]
    assert "non-finite" in rows.loc[("broken", "fedavg"), "error"]
    assert "1 runs done, 2 failed, 0 refused" in done.stdout
    assert "non-finite" in (tmp_path / "out/logs" / f"{rows.loc[('broken', 'fedavg'), 'run']}.log").read_text()
    kept = (tmp_path / "out/runs" / rows.iloc[0]["run"] / "result.json").stat().st_mtime_ns
    done = consilium(*words, "--set", "exclude=[{tuner='broken'}]")
    assert done.code == 0
    assert list(table(tmp_path / "out")["status"]) == ["done", "done"]
    assert (tmp_path / "out/runs" / rows.iloc[0]["run"] / "result.json").stat().st_mtime_ns == kept


def test_an_edited_configuration_is_a_new_run_and_the_others_are_kept(
    copied: Path, consilium: processes.Parent
) -> None:
    edit = "axes.tuner.lora.tuner=[{name='lora', rank=1}]"
    changed = consilium(*words_of(copied), "--set", "exclude=[{strategy='fedit'}]", "--set", edit)
    assert (changed.code, json.loads(changed.stdout)["done"]) == (0, 2)
    assert len(list((copied / "out/runs").iterdir())) == 4
    assert len(list((copied / "out/logs").iterdir())) == 4


def test_runs_of_another_version_are_made_again_unless_they_are_to_be_kept(
    copied: Path, consilium: processes.Parent
) -> None:
    words = [*words_of(copied), "--set", "exclude=[{strategy='fedit'}, {tuner='lora'}]"]
    older = "from consilium import surroundings\nsurroundings.versions = lambda: {'torch': 'older'}\n"
    kept = consilium(*words, "--keep-old", hook=older)
    said: dict[str, Any] = json.loads(kept.stdout)
    assert (said["done"], kept.code) == (1, 0)
    assert "another version" in said["warnings"][-1]
    again = consilium(*words, hook=older)
    assert again.code == 1  # this process says it is older, the run's own does not
    assert "another version than the study began with" in json.loads(again.stdout)["failed"][0]["error"]


def test_a_report_is_written_again_from_the_tables(copied: Path, consilium: processes.Parent) -> None:
    (copied / "out/report.html").unlink()
    done = consilium("report", copied / "out")
    assert (done.code, done.stdout) == (0, f"{copied / 'out/report.html'}\n")
    assert (copied / "out/report.html").is_file()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(consilium: processes.Parent, tmp_path: Path) -> None:
    done = consilium("study", written(tmp_path), "--dry-run", "--json", "--out", tmp_path / "out")
    assert (done.code, done.stderr) == (0, ""), done
    said = json.loads(done.stdout)
    assert (said["runs"], len(said["variants"]), len(said["refused"])) == (3, 3, 1)
    assert said["variants"]["tuner = lora, strategy = fedavg"]["bytes"] > 0
    assert not (tmp_path / "out").exists()


REFUSED = {
    "metric": ('[compare]\nmetric = "acc"\n', "compare.metric"),
    "budget": ('[grid]\ntrain.local_epochs = [1, 2]\n[select]\nover = ["strategy"]\n', "unequal budgets"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_that_only_data_and_models_show_stops_before_the_first_run(
    mistake: str, consilium: processes.Parent, tmp_path: Path
) -> None:
    more, said = REFUSED[mistake]
    done = consilium("study", written(tmp_path, STUDY + more), "--out", tmp_path / "out", "--json")
    assert done.code == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(consilium: processes.Parent, whole: Path, tmp_path: Path) -> None:
    before = runs.contents(tmp_path)
    written(tmp_path)
    done = consilium("study", tmp_path / "study.toml", "--out", tmp_path)
    assert (done.code, "not the folder of a study" in done.stderr) == (1, True)
    done = consilium("study", tmp_path / "study.toml", "--set", "name=other", "--out", whole)
    assert (done.code, "another study" in done.stderr) == (1, True)
    assert runs.contents(tmp_path).keys() - before.keys() == {"base.toml", "study.toml"}


def test_ray_gives_the_same(whole: Path, consilium: processes.Parent, tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    done = consilium("study", written(tmp_path), "--ray", "local", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done
    assert_same(whole, tmp_path / "out")


def test_a_ray_cluster_that_is_not_there_is_said_at_once(consilium: processes.Parent, tmp_path: Path) -> None:
    done = consilium("study", written(tmp_path), "--ray", "127.0.0.1:1", "--out", tmp_path / "out")
    assert done.code == 2
    assert ("no Ray cluster answers" if importlib.util.find_spec("ray") else "not installed") in done.stderr
    without = "import sys\nsys.modules['ray'] = None\n"
    done = consilium("study", written(tmp_path), "--ray", "local", "--out", tmp_path / "out", hook=without)
    assert "consilium[ray]" in done.stderr
