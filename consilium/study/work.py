"""Composition: one run of a study, in a process of its own. In: a task. Out: nothing, or why the run failed.

What a run prints goes to its log. The process may be anywhere that sees the same files.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilium.config import Config
from consilium.errors import ConsiliumError, StateError


@dataclass(frozen=True)
class Task:
    """All that a process needs to carry out a run, and what it takes."""

    run: str
    config: Config
    folder: Path
    log: Path
    identity: Mapping[str, Any]
    cores: int
    memory_bytes: int
    device: str


def work(task: Task) -> str | None:
    """Carry a run out, or on from where it stopped; the text of the error where it failed."""
    from consilium import progress, run

    def show(event: Mapping[str, Any]) -> None:
        text = progress.line(event)
        if text is not None:
            print(text, flush=True)

    with _logged(task.log):
        try:
            _check_code(task)
            run.run(task.config, task.folder, resume=(task.folder / "config.json").is_file(), display=show)
            _check(task, ("config_hash", "data_digest", "split_hash", "device"))
        except ConsiliumError as error:
            print(f"error: {error}", file=sys.stderr)
            return str(error)
        except Exception as error:  # whatever it is, the other runs go on
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send what is printed here, by libraries in other languages too, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(1), os.dup(2)]
    with path.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def _check_code(task: Task) -> None:
    """Runs of different code are no study; this process may have started after the package was changed."""
    from consilium import surroundings

    here = {"code": surroundings.code_digest(), "versions": surroundings.versions()}
    different = [key for key, value in here.items() if task.identity[key] != value]
    if different:
        remedy = "leave the installation alone while a study runs, and have the same one on every machine"
        raise StateError(
            "this process has another version than the study began with", received=different, remedy=remedy
        )


def _check(task: Task, keys: tuple[str, ...]) -> None:
    from consilium import checkpoint

    stored = checkpoint.read_json(task.folder / "config.json")
    different = [key for key in keys if stored.get(key) != task.identity[key]]
    if different:
        remedy = "run the study again; every machine must see the same files"
        raise StateError("the run found something else than the study did", received=different, remedy=remedy)
