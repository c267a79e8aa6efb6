"""Composition: a study as it runs. In: what happens to its runs. Out: a live view, or lines where there is no terminal.

How far a run is, is read from its events.jsonl, wherever the run takes place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from consilium import progress
from consilium.progress import estimate
from consilium.study.prepare import Job

_METRIC = "balanced_accuracy"


class Board:
    """Shows the runs of a study; does nothing else."""

    def __init__(self, console: Console, total: int, out: Path) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left {task.fields[left]}", markup=False))
        self._progress = Progress(*columns, *times, console=console)
        self._bar = self._progress.add_task("runs", total=total, left="-:--:--")
        self._began, self._before = monotonic(), 0.0
        self._console, self._out = console, out
        self._running: dict[str, Job] = {}
        self._ended, self._total, self._failed = 0, total, 0

    def started(self, job: Job) -> None:
        """A run began, or went on."""
        self._running[job.run] = job
        self._before += self._share(job)
        if not self._console.is_terminal:
            self._say(f"start {job.run}: {job.words}")

    def ended(self, job: Job, error: str | None) -> None:
        """A run is done, or failed."""
        self._ended += 1
        self._failed += error is not None
        last = far(job.folder(self._out))
        self._running.pop(job.run, None)
        self._progress.update(self._bar, completed=self._ended)
        if error is not None:
            self._say(f"failed {job.run}: {job.words}: {' '.join(error.split())}")
        elif not self._console.is_terminal:
            self._say(f"done {self._ended} of {self._total}, {job.run}: {job.words}: {last.words}")

    def _share(self, job: Job) -> float:
        """How much of a run is done."""
        return far(job.folder(self._out)).round / job.config.train.rounds if job.config is not None else 0.0

    def _left(self) -> str:
        """Time left at the pace so far; what earlier processes did of these runs says nothing about the pace."""
        done = self._ended + sum(map(self._share, list(self._running.values())))
        if done <= self._before:
            return "-:--:--"
        return clock((self._total - done) * (monotonic() - self._began) / (done - self._before))

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        table = Table("run", "what", "rounds", "validation balanced accuracy", box=None, pad_edge=False)
        for job in list(self._running.values()):
            last = far(job.folder(self._out))
            rounds = job.config.train.rounds if job.config is not None else 0
            table.add_row(job.run, job.words, f"{last.round} of {rounds}", estimate(last.value))
        self._progress.update(self._bar, left=self._left())
        return Group(self._progress, table)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


@dataclass(frozen=True)
class Far:
    """The last closed round of a run, and the last validation it holds."""

    round: int = 0
    value: float | None = None

    @property
    def words(self) -> str:
        """For a line of a log."""
        return f"{self.round} rounds, validation balanced accuracy {estimate(self.value)}"


def far(folder: Path) -> Far:
    """How far a run is; a line without an end is being written."""
    with suppress(OSError, ValueError):
        lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        values = [value for event in events if (value := _validated(event)) is not None]
        return Far(events[-1]["round"] if events else 0, values[-1] if values else None)
    return Far()


def _validated(event: Mapping[str, Any]) -> float | None:
    value = (event.get("val_mean") or {}).get(_METRIC)
    return None if value is None else float(value)


@contextmanager
def shown(total: int, out: Path, quiet: bool) -> Iterator[Board]:
    """A board of so many runs on standard output; quiet: seen by nobody."""
    console = Console(markup=False, quiet=quiet)
    board = Board(console, total, out)
    if quiet or not console.is_terminal:
        yield board
        return
    with Live(board, console=console, refresh_per_second=2, transient=True):
        yield board


@contextmanager
def preparing(quiet: bool) -> Iterator[progress.Display]:
    """The display of what comes before the first run."""
    if quiet:
        yield lambda _: None
        return
    with progress.live(Console(stderr=True, markup=False)) as display:
        yield display
