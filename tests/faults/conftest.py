"""Figures of the faults: what was tried, what came through it, what was lost; runs/faults.json after `--faults`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FIGURES = Path(__file__).parents[2] / "runs" / "faults.json"
_tried: dict[str, dict[str, Any]] = {}
Lost = Callable[..., None]


@pytest.fixture
def lost(record_property: Callable[[str, object], None]) -> Lost:
    """Note what a fault cost, where all that a test says of it holds. `rounds`: of the site that it befell."""

    def note(fault: str, *, rounds: int = 0, bytes: int = 0) -> None:
        record_property(f"fault: {fault}", {"rounds_lost": rounds, "bytes_lost": bytes})

    return note


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note every fault that a test names by `lost`; the rows of a test that failed did not recover."""
    if report.when == "call":
        for name, row in report.user_properties:
            if name.startswith("fault: "):
                _tried[name.removeprefix("fault: ")] = {**_as_row(row), "recovered": report.passed}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the figures where any were taken."""
    if _tried and session.config.getoption("--faults"):
        rows = list(_tried.values())
        total: dict[str, int] = {
            "tried": len(rows),
            "recovered": sum(row["recovered"] for row in rows),
            "rounds_lost": sum(row["rounds_lost"] for row in rows),
            "bytes_lost": sum(row["bytes_lost"] for row in rows),
        }
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps({**total, "faults": _tried}, indent=1, sort_keys=True) + "\n")


def _as_row(value: object) -> dict[str, Any]:
    assert isinstance(value, dict)
    return value
