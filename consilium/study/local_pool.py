"""Composition: runs beside one another on this machine. In: tasks. Out: how each ended, however it ended.

One process per run: what a run leaves in memory goes with it, and a process that is killed takes no other run along. A
pipe ties each process to this one: when it closes, for whatever reason, the process ends at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Protocol

from consilium.study.work import Task, work

Ends = list[tuple[str, str | None]]  # (run, error or None)


class Pool(Protocol):
    """Where runs are carried out."""

    def submit(self, task: Task) -> None:
        """Start a run."""

    def wait(self, seconds: float) -> Ends:
        """The runs that ended; returns when one did, and after so many seconds."""

    def stop(self) -> None:
        """End all runs at once; each can be resumed."""


@dataclass(frozen=True)
class _Child:
    process: BaseProcess
    pipe: Connection


class LocalPool:
    """Processes on this machine."""

    def __init__(self) -> None:
        self._children: dict[str, _Child] = {}

    def submit(self, task: Task) -> None:
        """Start a process for the run."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(task, theirs), name=f"run {task.run}")
        with _deaf():
            process.start()
        theirs.close()
        self._children[task.run] = _Child(process, ours)

    def wait(self, seconds: float) -> Ends:
        """The runs that ended."""
        every = [each for child in self._children.values() for each in (child.pipe, child.process.sentinel)]
        ready = connection.wait(every, seconds)
        ended = [run for run, child in self._children.items() if {child.pipe, child.process.sentinel} & {*ready}]
        return [(run, _end(self._children.pop(run))) for run in ended]

    def stop(self) -> None:
        """End all processes at once."""
        for child in self._children.values():
            child.pipe.close()
        for child in self._children.values():
            _gone(child.process)
        self._children.clear()


def _end(child: _Child) -> str | None:
    """What a run said last, or how its process died."""
    try:
        error: str | None = child.pipe.recv()
    except (EOFError, OSError):
        child.process.join()
        error = f"the process of the run died{_how(child.process.exitcode)}"
    _gone(child.process)
    child.pipe.close()
    return error


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f" with exit code {code}"
    name = signal.Signals(-code).name
    return f" by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _gone(process: BaseProcess) -> None:
    process.join(_PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


_PATIENCE_SECONDS = 10


@contextmanager
def _deaf() -> Iterator[None]:
    """A process started inside never hears Ctrl-C: this one does, and ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(task: Task, pipe: Connection) -> None:
    Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    pipe.send(work(task))


def _end_with_parent(pipe: Connection) -> None:
    """Nothing is ever sent this way: what wakes this is the end of the other side."""
    pipe.poll(None)
    os._exit(1)
