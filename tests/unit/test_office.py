"""What an engineer may ask of a coordinator's folder when a run has ended in an odd way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

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
