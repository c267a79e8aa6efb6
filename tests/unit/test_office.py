"""What an engineer may ask of a coordinator's folder when a run has ended in an odd way."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium import rounds
from consilium.deployment import board, office, processes
from tests.hospitals_apart import made


def test_a_coordinator_killed_after_its_last_file_is_begun_once_more_and_says_that_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = made(tmp_path)
    out, folder = apart.conduct(), apart.at("coordinator")
    result, asked = (out / "result.json").read_bytes(), len(apart.seen)
    (out / "report.html").unlink()
    left = out / "checkpoints" / ".round-00003.safetensors.12.tmp"
    left.write_bytes(b"half of it")
    table = {"state": "running", "round": 3, "sites": {}, "time": "2020-01-01T00:00:00.000+00:00"}
    (folder / board.STATUS).write_text(json.dumps(table))
    assert office.status(folder)["state"] == "died"
    monkeypatch.setattr(processes, "flwr", lambda *words, **named: {"run-id": "7"})  # noqa: ARG005
    office.begun(folder)
    assert office.submit(folder)["run-id"] == "7"
    apart.conduct()
    assert board.read(folder)["state"] == "finished"
    assert (out / "report.html").is_file()
    assert not left.exists()
    assert (out / "result.json").read_bytes() == result
    assert len(apart.seen) == asked, "no site is asked again"


def test_a_database_that_cannot_be_read_is_set_aside_and_a_sound_one_stays(tmp_path: Path) -> None:
    path = tmp_path / processes.DATABASE
    assert processes.set_aside(tmp_path) is None
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE message (content BLOB)")
        database.executemany("INSERT INTO message VALUES (?)", [(bytes(5000),)] * 50)
    database.close()
    assert processes.set_aside(tmp_path) is None
    with sqlite3.connect(path) as database:  # of a SuperLink that is at work
        database.execute("BEGIN EXCLUSIVE")
        assert processes.set_aside(tmp_path) is None
    database.close()
    good = path.read_bytes()
    for bad in (b"no database" * 1000, good[: len(good) // 2], good[:5000] + bytes(100_000) + good[105_000:]):
        path.write_bytes(bad)
        kept = processes.set_aside(tmp_path)
        assert kept is not None
        assert kept.read_bytes() == bad
        assert not path.exists()
        kept.unlink()


def test_a_run_that_goes_on_says_how_many_rounds_are_closed(tmp_path: Path) -> None:
    told = board.Board(tmp_path)
    told.show({"event": "start", "sites": ["alpine"], "rounds": 6, "closed": 2})
    assert board.lines(board.read(tmp_path))[0] == "running: round 2 of 6, 2 closed"
    told.show({"event": "start", "sites": ["alpine"], "rounds": 6, "closed": 0})
    apart = made(tmp_path)
    assert rounds.numbers(apart.run) == []
    apart.conduct()
    assert rounds.numbers(apart.run)[-1] == 3
