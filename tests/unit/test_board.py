"""The state of a run on the disk: one write for many events, and none is left unsaid."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from consilium import checkpoint
from consilium.deployment import board
from consilium.deployment.board import EVERY, Board

SITES = [f"site-{number:02}" for number in range(64)]
START = {"event": "start", "sites": SITES, "rounds": 3}
ROUND = {"event": "round", "round": 1, "val_mean": {}, "bytes": {}}


@dataclass
class Watched:
    """A board whose time is told, and who was put off, until when; `written`: the states that came to the disk."""

    folder: Path
    now: float = 0.0
    put_off: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    written: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.board = Board(self.folder, clock=lambda: self.now, later=self.wait)

    def wait(self, seconds: float, do: Callable[[], None]) -> None:
        self.put_off.append((self.now + seconds, do))

    def until(self, moment: float) -> None:
        """Let time go by, and do what was put off when its time comes."""
        while due := sorted((each for each in self.put_off if each[0] <= moment), key=lambda each: each[0]):
            self.put_off.remove(due[0])
            self.now = due[0][0]
            due[0][1]()
        self.now = moment

    def asked(self) -> None:
        """A round's question goes to all sites."""
        for site in SITES:
            self.board.show({"event": "link", "site": site, "status": "asked"})


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    found, plain = Watched(tmp_path), checkpoint.write_json

    def write(path: Path, value: Any) -> None:
        found.written.append({**value, "at": found.now})
        plain(path, value)

    monkeypatch.setattr(checkpoint, "write_json", write)
    return found


def standing(folder: Path) -> set[str]:
    return {row["status"] for row in board.read(folder)["sites"].values()}


def test_many_events_are_written_once_and_none_is_left_unsaid(watched: Watched) -> None:
    watched.board.show(START)
    assert standing(watched.folder) == {"waiting"}
    watched.asked()
    assert (len(watched.written), len(watched.put_off)) == (1, 1)
    watched.until(EVERY)
    assert standing(watched.folder) == {"training"}, "also where no event comes after them"
    assert len(watched.written) == 2
    assert len((watched.folder / board.LOG).read_text().splitlines()) == 65, "the log has each of them"
    watched.until(9.0)
    assert (len(watched.written), watched.put_off) == (2, [])


def test_the_end_of_a_round_is_written_at_once(watched: Watched) -> None:
    watched.board.show(START)
    watched.asked()
    watched.board.show(ROUND)
    assert board.read(watched.folder)["closed"] == 1
    assert standing(watched.folder) == {"training"}
    watched.until(9.0)
    assert len(watched.written) == 2, "what was put off was written with it"


def test_writes_that_were_put_off_keep_their_distance(watched: Watched) -> None:
    watched.board.show(START)
    for step in range(1, 40):
        watched.until(step / 8)
        watched.board.show({"event": "link", "site": SITES[step], "status": "lost"})
        if step == 6:
            watched.board.show(ROUND)
    watched.until(9.0)
    times = [table["at"] for table in watched.written]
    assert times == [0.0, 0.5, 0.75, *(0.75 + EVERY * count for count in range(1, 10))]
    assert sum(row["status"] == "lost" for row in board.read(watched.folder)["sites"].values()) == 39


@pytest.mark.parametrize("how", ["finished", "failed", "stopped"])
def test_after_its_last_word_a_run_says_nothing_more(watched: Watched, how: str) -> None:
    end = {"failed": ZeroDivisionError("by hand"), "stopped": SystemExit(0)}.get(how)
    with suppress(ZeroDivisionError, SystemExit), watched.board.reporting():
        watched.board.show(START)
        watched.asked()
        if end is not None:
            raise end
    assert (board.read(watched.folder)["state"], standing(watched.folder)) == (how, {"training"})
    before, count = (watched.folder / board.STATUS).read_bytes(), len(watched.written)
    watched.until(9.0)
    assert ((watched.folder / board.STATUS).read_bytes(), len(watched.written)) == (before, count)


def test_what_is_put_off_is_done_by_a_thread_of_its_own() -> None:
    done = threading.Event()
    board._later(0.0, done.set)
    assert done.wait(60)
