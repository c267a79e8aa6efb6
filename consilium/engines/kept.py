"""Engine: a site's folder from outside. In: the folder. Out: a lock on it; the rounds whose states lie there.

Nothing heavy is imported: who only looks, or deletes, waits for no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from consilium.errors import StateError

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a site's folder for this process; StateError where another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout as error:
        remedy = "stop the other service of this site first"
        raise StateError("another process serves this site's folder", where=str(folder), remedy=remedy) from error


def runs(folder: Path) -> list[str]:
    """Names of the runs of which a site keeps something, sorted."""
    return sorted(path.name for path in folder.glob("*/"))


def rounds(folder: Path) -> list[int]:
    """Rounds of the states that are there, sorted."""
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("state-*.safetensors"))
