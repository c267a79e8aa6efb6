"""Figures of the faults: what was tried, what came through it, what was lost; in runs/ after `--faults`."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.faults import loss
from tests.faults.loss import Lost as Lost

RUNS = Path(__file__).parents[2] / "runs"
_tried: dict[str, dict[str, Any]] = {}
_began = time.monotonic()


@pytest.fixture
def lost(record_property: Callable[[str, object], None]) -> Lost:
    """What is about to happen, and what it cost."""
    return Lost(record_property)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note every fault that a test names; those of a test that failed were not recovered from."""
    if report.when == "call":
        rows = [(name, row) for name, row in report.user_properties if name.startswith("fault: ")]
        for name, row in rows:
            assert isinstance(row, dict)
            recovered = report.passed and row["bytes_lost"] is not None
            _tried[name.removeprefix("fault: ")] = {**row, "recovered": recovered, "test": report.nodeid}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the figures where any were taken, by the release of Flower that they were taken with."""
    whole = not hasattr(session.config, "workerinput")  # of pytest-xdist, where each worker knows its own tests alone
    if _tried and whole and session.config.getoption("--faults"):
        where = {"flower": metadata.version("flwr"), "cores": os.cpu_count(), "commit": _commit()}
        found = {**loss.figures(_tried, time.monotonic() - _began), **where}
        loss.write(RUNS / f"faults-{where['flower']}.json", found)


def _commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"
