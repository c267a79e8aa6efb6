"""Composition: what a hospital keeps of every run. In: its folder. Out: a table of it; one run's share, deleted.

States hold what the site learnt from its images. What left is noted in the journal, which stays.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from consilium.deployment import files
from consilium.deployment.log import Log
from consilium.engines import kept
from consilium.engines.kept import claimed
from consilium.errors import ConfigError, StateError


def states(folder: Path) -> list[dict[str, Any]]:
    """Of each run that the site keeps something of: its rounds, and bytes."""
    found = []
    for each in (folder / files.STATE / run for run in kept.runs(folder / files.STATE)):
        size = sum(path.stat().st_size for path in each.rglob("*") if path.is_file())
        found.append({"run": each.name, "rounds": kept.rounds(each), "bytes": size})
    return found


def kept_bytes(folder: Path, run: str) -> int:
    """Of a run; ConfigError where the site keeps nothing of it."""
    known = {row["run"]: int(row["bytes"]) for row in states(folder)}
    if run not in known:
        allowed = ", ".join(known) or "none: nothing is kept here"
        raise ConfigError("the site keeps nothing of this run", where=str(folder), allowed=allowed, received=run)
    return known[run]


def delete(folder: Path, run: str) -> int:
    """Remove what the site keeps of a run; how many bytes. StateError while its service is running."""
    size = kept_bytes(folder, run)
    with claimed(folder / files.STATE):
        shutil.rmtree(folder / files.STATE / run)
        (folder / files.PAGE).unlink(missing_ok=True)  # it may speak of this run; `site page` makes that of another
    Log(folder / files.LOG)({"event": "deleted", "run": run, "bytes": size})
    return size


def check_unanswered(folder: Path) -> None:
    """StateError where the site keeps something of runs: then a journal without a line tells nothing."""
    runs = [str(row["run"]) for row in states(folder)]
    if runs:
        remedy = "was the journal moved away? Restore it; an answer that could not be written down leaves the same"
        what = "the journal has no line, and yet the site learnt in runs"
        raise StateError(what, where=str(folder), received=", ".join(runs), remedy=remedy)
