"""The view of a run in a terminal: what it shows, which sites it leaves out, and lines where there is no terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("cryptography")

from consilium.deployment import files, live, office

Folder = Callable[..., Path]
SINCE = [""]  # two hours and five minutes before each test


@pytest.fixture(autouse=True)
def _since() -> None:
    SINCE[0] = (datetime.now(UTC) - timedelta(minutes=125)).isoformat()


@pytest.fixture
def leader(tmp_path: Path) -> Folder:
    """Writes what a coordinator's folder holds while a run goes on."""

    def write(closed: int, seconds: float = 60.0, **sites: str) -> Path:
        (tmp_path / files.FEDERATION).write_text('name = "skin"\n')
        replies = {site: {"status": "ok" if site != "prairie" else "late"} for site in sites}
        up = {site: 1_500 for site in sites if site != "prairie"}
        (tmp_path / files.RUN).mkdir()
        with (tmp_path / files.RUN / "events.jsonl").open("w") as out:
            for number in range(1, closed + 1):
                value = {"balanced_accuracy": number / 10}
                line = {"round": number, "seconds": seconds, "sites": replies, "bytes": {"up": up, "down": {}}}
                out.write(json.dumps({**line, "val_mean": value}) + "\n")
        return tmp_path

    return write


def table(state: str = "running", **sites: str) -> dict[str, Any]:
    rows = {site: {"status": status, "since": SINCE[0], "message": f"{status} it is"} for site, status in sites.items()}
    return {"state": state, "round": 3, "rounds": 8, "closed": 2, "sites": rows}


def seen(folder: Path, found: dict[str, Any], height: int = 40) -> str:
    console = Console(file=StringIO(), width=120, height=height, markup=False)
    console.print(live.picture(folder, found, height))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_what_is_seen_of_a_run(leader: Folder) -> None:
    sites = {"alpine": "done", "harbour": "training", "prairie": "late"}
    text = seen(leader(2, **sites), table(**sites))
    assert "round 3 of 8, 2 closed, about 6 min 0 s left" in text
    assert "balanced accuracy 0.200" in text
    alpine, harbour, prairie = ([*line.split()] for line in text.splitlines() if line.startswith(tuple(sites)))
    assert alpine == ["alpine", "done", "2", "h", "5", "min", "2", "of", "2", "3.0", "kB", "done", "it", "is"]
    assert harbour[1] == "training"
    assert prairie == ["prairie", "late", "2", "h", "5", "min", "0", "of", "2", "0", "bytes", "late", "it", "is"]


def test_on_a_small_screen_those_are_seen_who_need_attention(leader: Folder) -> None:
    sites = {f"site{number:02}": "done" for number in range(60)} | {"site57": "lost", "site03": "training"}
    text = seen(leader(2, **sites), table(**sites), height=10)
    assert "site57" in text
    assert "site03" in text
    assert "and 56 more" in text
    assert len(text.splitlines()) <= 10


def test_before_the_first_round_and_after_a_failure(leader: Folder) -> None:
    folder = leader(0)
    text = seen(folder, {"state": "starting", "round": 0, "sites": {}})
    assert "round 0 of ?, 0 closed" in text
    assert "left" not in text
    assert "too few sites" in seen(folder, {**table("failed"), "message": "too few sites"})


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `office.status` says at one look after the other."""
    found = [table(alpine="waiting"), table(alpine="waiting"), table(alpine="training"), table("finished")]
    told: Iterator[dict[str, Any]] = iter(found)
    monkeypatch.setattr(office, "status", lambda _: next(told))
    return found


def test_without_a_terminal_there_is_a_line_per_change(moments: list[dict[str, Any]], leader: Folder) -> None:
    console = Console(file=StringIO(), width=120)
    assert live.follow(leader(0), console, poll=0)["state"] == moments[-1]["state"]
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert (text.count("waiting"), text.count("training"), text.count("finished")) == (2, 2, 1)  # state and message


def test_in_a_terminal_the_view_is_drawn_at_every_look(moments: list[dict[str, Any]], leader: Folder) -> None:
    console = Console(file=StringIO(), width=120, force_terminal=True, markup=False)
    assert live.follow(leader(0), console, poll=0)["state"] == moments[-1]["state"]
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().count("skin") >= len(moments)
