from __future__ import annotations

import io
import json
import math
from contextlib import AbstractContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from consilium import progress

START = {"event": "start", "name": "trial", "sites": ["north", "south"], "rounds": 2, "out": "runs/trial"}
ROUND = {
    "event": "round",
    "round": 1,
    "seconds": 1.5,
    "sites": {
        "north": {"status": "ok", "loss": 0.5, "val": {"outgoing": {"balanced_accuracy": 0.75}}},
        "south": {"status": "lost"},
    },
    "val_mean": {"balanced_accuracy": 0.75},
}
FINISH = {
    "event": "finish",
    "result": "runs/trial/result.json",
    "report": "runs/trial/report.html",
    "headline": {"balanced_accuracy": {"value": 0.7, "low": 0.6, "high": 0.8, "n": 9}},
}
EVENTS = [
    {"event": "prepare", "what": "decoding images", "done": 3, "total": 3},
    {"event": "warning", "text": "2 unreadable images were dropped"},
    START,
    {"event": "site", "round": 1, "site": "north", "status": "training", "loss": None},
    ROUND,
    {"event": "reference", "name": "pooled", "kind": "start", "rounds": 2, "sites": ["pooled"]},
    {"event": "reference", "name": "pooled", "kind": "round", "round": 2},
    {"event": "reference", "name": "local", "kind": "reused", "from": "runs/earlier"},
    FINISH,
]


def _shown(show: object, **console: object) -> str:
    stream = io.StringIO()
    screen = Console(file=stream, width=100, **console)  # type: ignore[arg-type]
    with show(screen) as display:  # type: ignore[operator]
        for event in EVENTS:
            display(event)
    return stream.getvalue()


def test_where_there_is_no_terminal_a_run_is_a_few_plain_lines() -> None:
    assert _shown(progress.live).splitlines() == [
        "decoding images: 3",
        "warning: 2 unreadable images were dropped",
        "trial: 2 sites, 2 rounds, in runs/trial",
        "round 1, 1.5 s, loss 0.500, validation balanced accuracy 0.750, south: lost",
        "reference pooled: trains",
        "reference local: taken from runs/earlier",
        "balanced accuracy: 0.700 [0.600, 0.800]",
        "result: runs/trial/result.json",
        "report: runs/trial/report.html",
    ]


def test_the_live_view_has_a_row_per_site_and_ends_with_the_outcome() -> None:
    shown = _shown(progress.live, force_terminal=True)
    north = [row for row in shown.splitlines() if "north" in row][-1]
    assert "0.500" in north
    assert "0.750 ▆" in north
    assert "lost" in [row for row in shown.splitlines() if "south" in row][-1]
    assert "1/2" in [row for row in shown.splitlines() if row.startswith("rounds")][-1]
    assert "2/2" in [row for row in shown.splitlines() if "reference pooled" in row][-1]
    assert "warning: 2 unreadable images were dropped" in shown
    assert shown.rstrip().endswith("report: runs/trial/report.html")


def test_of_more_sites_than_fit_those_heard_of_last_are_shown() -> None:
    names = [f"site-{number:03d}" for number in range(300)]
    screen = Console(file=io.StringIO(), width=100, height=12, force_terminal=True)

    def lines() -> list[str]:
        rows = ["".join(piece.text for piece in row).split() for row in screen.render_lines(board)]
        return [" ".join(row[:2]) for row in rows]

    board = progress._Board(screen)
    board.take({**START, "sites": names})
    assert lines()[2:] == [*(f"{name} waiting" for name in names[:9]), "and 291"]
    for name in names[:200]:
        board.take({"event": "site", "round": 1, "site": name, "status": "ok", "kind": "round"})
    assert lines()[2:] == [*(f"{name} trained" for name in names[191:200]), "and 291"]
    board.take({**ROUND, "sites": {name: {"status": "ok", "loss": 0.5} for name in names}})
    assert lines()[2:] == [*(f"{name} ok" for name in names[191:200]), "and 291"]


def test_quiet_prints_the_outcome_only() -> None:
    assert _shown(progress.quiet).splitlines()[0] == "balanced accuracy: 0.700 [0.600, 0.800]"


def test_json_lines_are_one_valid_object_per_event(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.json_lines() as display:
        for event in [*EVENTS, {"event": "round", "loss": math.nan}]:
            display(event)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:-1] == EVENTS
    assert lines[-1]["loss"] is None


def _interrupted(show: AbstractContextManager[progress.Display]) -> None:
    with show as display:
        display(START)
        raise KeyboardInterrupt


def test_a_failing_run_closes_the_live_view() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        _interrupted(progress.live(Console(file=stream, force_terminal=True)))
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


@given(st.lists(st.floats(allow_infinity=True) | st.floats(0, 1)))
def test_a_sparkline_has_one_sign_per_value(values: list[float]) -> None:
    assert len(progress.sparkline(values)) == len(values)


def test_a_sparkline_rises_with_its_values() -> None:
    assert progress.sparkline([0.0, 0.5, 1.0, math.nan]) == "▁▅█ "


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (None, "-"),
        (math.nan, "-"),
        (3, "3"),
        ({"value": 0.5, "low": 0.25, "high": 0.75}, "0.500 [0.250, 0.750]"),
        ({"value": 0.5, "low": None, "high": None}, "0.500"),
    ],
)
def test_an_estimate_shows_its_interval_where_there_is_one(value: object, text: str) -> None:
    assert progress.estimate(value) == text


def test_the_end_of_a_run_is_told_in_quarters() -> None:
    def told(total: int, kind: str = "finish") -> list[str]:
        event = {"event": "site", "kind": kind, "round": 2, "site": "a", "status": "ok", "total": total}
        return [text for done in range(1, total + 1) if (text := progress.line({**event, "done": done}))]

    assert told(3) == [f"finish: {done} of 3 sites" for done in (1, 2, 3)]
    assert told(200) == [f"finish: {done} of 200 sites" for done in (50, 100, 150, 200)]
    assert told(3, "round") == []


def test_the_end_of_a_run_has_a_bar() -> None:
    stream = io.StringIO()
    with progress.live(Console(file=stream, width=100, force_terminal=True, markup=False)) as display:
        for event in (
            START,
            {"event": "site", "kind": "finish", "site": "north", "status": "ok", "done": 1, "total": 2},
        ):
            display(event)
    assert "finish" in stream.getvalue()
    assert "1/2" in stream.getvalue()
