"""What is seen of a running study: how far each run is, what failed, and an honest time left."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from consilium.config import Config, TrainConfig
from consilium.study import board
from tests.unit.test_study_runner import job

LONG = replace(job("a"), config=Config(train=TrainConfig(rounds=4)))


def closed(out: Path, rounds: int, run: str = "a") -> None:
    folder = out / "runs" / run
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"round": n, "val_mean": {"balanced_accuracy": n / 10} if n % 2 else {}} for n in range(1, rounds + 1)]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def made(out: Path, terminal: bool, total: int = 2) -> tuple[board.Board, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, color_system=None)
    return board.Board(console, total, out), text


def seen(shown: board.Board) -> str:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_the_last_round_and_the_last_validation_are_read_from_the_run(tmp_path: Path) -> None:
    assert board.far(tmp_path) == board.Far()
    closed(tmp_path, 4)
    assert board.far(tmp_path / "runs/a") == board.Far(4, 0.3)
    (tmp_path / "runs/a/events.jsonl").write_text("")
    assert board.far(tmp_path / "runs/a") == board.Far()


def test_without_a_terminal_there_is_a_line_for_each_start_and_end(tmp_path: Path) -> None:
    shown, text = made(tmp_path, terminal=False)
    shown.started(LONG)
    closed(tmp_path, 4)
    shown.ended(LONG, None)
    shown.ended(job("b"), "broken\n  where: here")
    assert text.getvalue().splitlines() == [
        "start a: axis = a, seed = 0",
        "done 1 of 2, a: axis = a, seed = 0: 4 rounds, validation balanced accuracy 0.300",
        "failed b: axis = b, seed = 0: broken where: here",
    ]


def test_the_time_left_is_that_of_the_pace_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(board, "monotonic", lambda: now)
    closed(tmp_path, 1)  # an earlier process got that far
    shown, _ = made(tmp_path, terminal=True)
    shown.started(LONG)
    assert "left -:--:--" in seen(shown)
    closed(tmp_path, 2)  # a quarter of a run in a minute: of two runs, six quarters are left
    now = 160.0
    assert "2 of 4" in seen(shown)
    assert "left 0:06:00" in seen(shown)
    shown.ended(LONG, None)
    assert "1/2" in seen(shown)
    assert "2 of 4" not in seen(shown)
