"""A run in stages that is killed, within a stage or between two, goes on to the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.processes import Parent
from tests.e2e.runs import assert_same, read

CONFIG = """
name = "staged"
seed = 3

[sites]
source = "phantom"
num_images = 24
num_sites = 2
image_size = 32

[backbone]
name = "test_vit"
weights = "random"
image_size = 32

[train]
rounds = 2
batch_size = 8
learning_rate = 0.01
moments = "keep"

[evaluation]
bootstrap = 0
serve = "best"
{references}

[[stages]]
name = "linear"
tuner = "linear"

[[stages]]
name = "lora"
strategy = {{ name = "fedper" }}
head = {{ share = "personal" }}
tuner = {{ name = "lora", rank = 2, dropout = 0.1 }}

[[stages]]
name = "personal"
strategy = {{ name = "local" }}
part = "personal"
tuner = {{ name = "lora", rank = 2, dropout = 0.1 }}
"""
KILL = """
import os, signal
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
AT_STEP = """
from consilium.local.train import Optimizer
original, taken = Optimizer.step, []
def step(self, share):
    taken.append(share)
    return die() if len(taken) == {number} else original(self, share)
Optimizer.step = step
"""
AT_WRITE = """
import pathlib
original, written = pathlib.Path.replace, []
def replace(self, target):
    written.append(target)
    return die() if len(written) == {number} else original(self, target)
pathlib.Path.replace = replace
"""
BETWEEN = """
from consilium import stages
original, done = stages.hand_over, []
def hand_over(*arguments):
    done.append(arguments)
    {before}
    original(*arguments)
    {after}
stages.hand_over = hand_over
"""
DIES = "die() if len(done) == {number} else None"


def _words(folder: Path, references: str = "") -> list[str | Path]:
    file = folder / "staged.toml"
    file.write_text(CONFIG.format(references=references))
    return ["run", file, "--json"]


@pytest.fixture(scope="module")
def whole(consilium: Parent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = consilium(*_words(folder), "--out", folder / "out")
    assert (done.code, done.stderr) == (0, ""), done
    return folder / "out"


def _killed_and_resumed(consilium: Parent, folder: Path, hook: str, whole: Path) -> list[tuple[str, int]]:
    """The rounds that were closed before and after, as (stage, round)."""
    words = [*_words(folder), "--out", folder / "out"]
    before = consilium(*words, hook=KILL + hook)
    assert before.code == -signal.SIGKILL, before
    after = consilium(*words, "--resume")
    assert (after.code, after.stderr) == (0, ""), after
    assert_same(whole, folder / "out")
    rounds, stage = [], ""
    for event in (*before.events, *after.events):
        stage = event["name"] if event["event"] == "start" else stage
        rounds += [(stage, event["round"])] if event["event"] == "round" else []
    return rounds


@pytest.mark.parametrize("number", [3, 8, 14])
def test_killed_within_a_stage(consilium: Parent, whole: Path, tmp_path: Path, number: int) -> None:
    rounds = _killed_and_resumed(consilium, tmp_path, AT_STEP.format(number=number), whole)
    assert rounds == [(f"staged, stage {name}", at) for name in ("linear", "lora", "personal") for at in (1, 2)]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("where", ["before", "after"])
def test_killed_between_stages(consilium: Parent, whole: Path, tmp_path: Path, number: int, where: str) -> None:
    hook = BETWEEN.format(**{"before": "pass", "after": "pass", where: DIES.format(number=number)})
    rounds = _killed_and_resumed(consilium, tmp_path, hook, whole)
    assert len(rounds) == len(set(rounds)) == 6, "a stage that ended is not trained again"


def test_killed_before_any_write(consilium: Parent, whole: Path, tmp_path: Path) -> None:
    """Every eleventh file that a run writes: the process dies when it is about to put it in place."""
    for number in range(2, 200, 11):
        folder = tmp_path / str(number)
        folder.mkdir()
        words = [*_words(folder), "--out", folder / "out"]
        done = consilium(*words, hook=KILL + AT_WRITE.format(number=number))
        if done.code == 0:
            assert number > 40
            return
        resumed = consilium(*words, "--resume")
        assert (number, resumed.code, resumed.stderr) == (number, 0, "")
        assert_same(whole, folder / "out")
    pytest.fail("a run without an end")


def test_the_number_of_workers_changes_nothing(consilium: Parent, tmp_path: Path) -> None:
    for workers in (1, 2):
        words = _words(tmp_path, 'references = ["local", "pooled"]')
        done = consilium(*words, "--set", f"engine.workers={workers}", "--out", tmp_path / str(workers))
        assert (done.code, done.stderr) == (0, ""), done
    assert_same(tmp_path / "1", tmp_path / "2")


def test_a_damaged_end_of_a_stage_is_named(consilium: Parent, tmp_path: Path) -> None:
    words = [*_words(tmp_path), "--out", tmp_path / "out"]
    consilium(*words, hook=KILL + BETWEEN.format(before=DIES.format(number=2), after="pass"))
    path = tmp_path / "out" / "stages" / "2-lora" / "end.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    done = consilium(*words, "--resume")
    assert done.code == 1
    assert "Traceback" not in done.stderr
    assert str(path) in done.stderr


def test_another_configuration_of_an_earlier_stage_is_another_run(consilium: Parent, whole: Path) -> None:
    words = [*_words(whole.parent), "--out", whole]
    done = consilium(*words, "--set", "stages.0.train={rounds=3}", "--resume")
    assert done.code == 1
    assert "another configuration" in done.stderr
    assert [stage["rounds"] for stage in read(whole / "result.json")["stages"]] == [2, 2, 2]
