"""How a run stands: what its own process wrote, whether it lives, and before it lives what Flower says of it."""

from __future__ import annotations

import fcntl
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from consilium import checkpoint, run_folder
from consilium.deployment import board, files, init, office, processes
from consilium.deployment.board import Board
from consilium.errors import StateError

LONG_AGO = "2020-01-01T00:00:00.000+00:00"
WORKS = """
import sys
from pathlib import Path
from consilium.deployment.board import Board
board = Board(Path(sys.argv[1]))
with board.reporting():
    board.show({"event": "start", "sites": ["alpine"], "rounds": 3})
    print("at work", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a coordinator's, as far as its state goes."""
    (tmp_path / "federation.toml").write_text('[deployment]\nsites = ["alpine"]\naddress = "127.0.0.1:1"\n')
    return tmp_path


def handed_over(folder: Path, when: str = LONG_AGO, **more: object) -> None:
    table = {"state": "starting", "round": 0, "sites": {}, "time": when, **more}
    (folder / board.STATUS).write_text(json.dumps(table))
    (folder / office.FLOWER_RUN).write_text('{"run": "7"}')


def flower(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Any], listens: bool = True) -> list[tuple[str, ...]]:
    asked: list[tuple[str, ...]] = []

    def flwr(_: Path, *words: str) -> Any:
        asked.append(words)
        return answer()

    monkeypatch.setattr(processes, "flwr", flwr)
    monkeypatch.setattr(processes, "is_guarded", lambda *_: listens)
    return asked


def told(status: str) -> dict[str, Any]:
    return {"success": True, "runs": [{"run-id": "7", "status": status}]}


def broken() -> Any:
    raise StateError("flwr list failed")


# ------------------------------------------------------------------------------------------------ a process that lived
def test_a_process_that_was_killed_is_missed_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = flower(monkeypatch, broken)
    with subprocess.Popen(
        [sys.executable, "-c", WORKS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as work:
        assert work.stdout is not None
        assert work.stdout.readline() == b"at work\n"
        assert office.status(folder)["state"] == "running"
        work.kill()
    monkeypatch.setattr(office, "LITTLE", 0)
    found = office.status(folder)
    said = "the coordinator's process ended without a word: resume it"
    assert (found["state"], found["message"]) == ("died", said)
    assert asked == []
    monkeypatch.setattr(office, "LITTLE", float("inf"))
    assert "make room, as its disk has " in office.status(folder)["message"]


def test_a_process_says_itself_how_it_ended(folder: Path) -> None:
    with Board(folder).reporting():
        assert office.status(folder)["state"] == "starting"
    assert office.status(folder)["state"] == "finished"
    with pytest.raises(ZeroDivisionError), Board(folder).reporting():
        raise ZeroDivisionError("by hand")
    assert office.status(folder)["message"] == "ZeroDivisionError: by hand"
    with pytest.raises(SystemExit), Board(folder).reporting():
        raise SystemExit(0)
    assert office.status(folder)["state"] == "stopped"


def test_a_second_process_does_not_speak_for_the_first(folder: Path) -> None:
    with Board(folder).reporting():
        before = (folder / board.STATUS).read_bytes()
        with pytest.raises(StateError, match="another process"), Board(folder).reporting():
            pass
        assert (folder / board.STATUS).read_bytes() == before
    assert office.status(folder)["state"] == "finished"


def test_who_looks_keeps_nobody_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / run_folder.LOCK).open("ab") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as `is_held` does for a moment
        monkeypatch.setattr(run_folder.time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
        with run_folder.locked(folder):
            assert run_folder.is_held(folder)


# ------------------------------------------------------------------------------------------------ before it lives
@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("pending", "starting"),
        ("starting", "starting"),
        ("running", "starting"),
        ("finished:failed", "died"),
        ("finished:completed", "died"),
        ("finished:stopped", "stopped"),
    ],
)
def test_flower_knows_whether_the_process_may_yet_come(
    answer: str, state: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over(folder)
    asked = flower(monkeypatch, lambda: told(answer))
    found = office.status(folder)
    assert found["state"] == state
    assert asked == [("list", processes.CONNECTION, "--run-id", "7")]
    assert (answer in found.get("message", "")) == (state == "died")


def test_a_superlink_that_is_away_begins_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_over(folder)
    flower(monkeypatch, broken, listens=False)
    found = office.status(folder)
    assert (found["state"], "SuperLink does not answer" in found["message"]) == ("died", True)
    flower(monkeypatch, broken)  # it listens, and is busy
    assert office.status(folder)["state"] == "starting"


def test_flower_is_not_asked_before_its_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_over(folder, board.now())
    asked = flower(monkeypatch, lambda: told("finished:failed"))
    assert office.status(folder)["state"] == "starting"
    assert asked == []


def test_a_run_that_flower_never_got(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = flower(monkeypatch, broken)
    handed_over(folder, board.now())
    (folder / office.FLOWER_RUN).unlink()
    assert office.status(folder)["state"] == "starting"  # `submit` is at work
    handed_over(folder)
    (folder / office.FLOWER_RUN).unlink()
    assert office.status(folder)["state"] == "died"
    assert asked == []


def test_a_process_that_comes_while_flower_is_asked_has_the_last_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over(folder)

    def comes() -> Any:
        with Board(folder).reporting():
            pass
        return told("finished:completed")

    flower(monkeypatch, comes)
    assert office.status(folder)["state"] == "finished"


@pytest.mark.parametrize("state", ["died", "stopped", "failed"])
def test_what_ended_can_be_begun_again(state: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr")
    handed_over(folder, state=state, process=1)
    (folder / "nodes").mkdir()
    init.node_key(folder, "alpine")
    (folder / processes.PUBLIC_KEY).rename(folder / "nodes" / "alpine.pub")
    monkeypatch.setattr(files, "settled", files.deployment)
    flower(monkeypatch, lambda: {"success": True, "run-id": 8})
    assert office.submit(folder)["run-id"] == 8
    assert json.loads((folder / office.FLOWER_RUN).read_text()) == {"run": "8"}
    with pytest.raises(StateError, match="going on"):
        office.submit(folder)


@pytest.mark.parametrize("listens", [True, False])
def test_a_run_that_cannot_be_handed_over_leaves_what_was_known(
    listens: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flwr")
    handed_over(folder, state="failed", process=1, message="too few sites")
    (folder / "nodes").mkdir()
    init.node_key(folder, "alpine")
    (folder / processes.PUBLIC_KEY).rename(folder / "nodes" / "alpine.pub")
    monkeypatch.setattr(files, "settled", files.deployment)
    before = {path: path.read_bytes() for path in (folder / board.STATUS, folder / office.FLOWER_RUN)}
    flower(monkeypatch, broken, listens)
    said = "flwr list failed" if listens else r"the SuperLink does not answer(.|\n)*consilium coordinator start"
    with pytest.raises(StateError, match=said):
        office.submit(folder)
    assert before == {path: path.read_bytes() for path in before}
    assert office.status(folder)["message"] == "too few sites"


def test_two_who_submit_at_one_moment_do_not_both_begin_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = flower(monkeypatch, broken)
    with (
        run_folder.locked(folder / processes.HOME),
        pytest.raises(StateError, match="another submit is at work"),
    ):
        office.submit(folder)
    assert not asked


def test_what_was_stopped_a_moment_ago_is_not_stopped_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def over() -> Any:
        raise StateError("flwr stop failed", received="[code: 18] Run is already finished.")

    with run_folder.locked(folder):  # its process has yet to say that it ends
        handed_over(folder, process=1, state="running")
        asked = flower(monkeypatch, over)
        with pytest.raises(StateError, match="works on"):
            office.stop(folder, patience=0.0)
        assert asked == [("stop", "7", processes.CONNECTION)]
        flower(monkeypatch, broken)
        with pytest.raises(StateError, match="flwr list failed"):
            office.stop(folder)


def test_stop_says_so_when_the_run_has_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def stopped() -> Any:
        threading.Timer(0.5, end.set).start()
        return {"success": True}

    def run() -> None:
        with suppress(SystemExit), Board(folder).reporting():
            works.set()
            end.wait()
            raise SystemExit

    works, process = threading.Event(), threading.Thread(target=run)
    process.start()
    works.wait()
    checkpoint.write_json(folder / office.FLOWER_RUN, {"run": "7"})
    flower(monkeypatch, stopped)
    office.stop(folder)
    assert end.is_set()
    assert office.status(folder)["state"] == "stopped"
    process.join()


def test_after_the_last_round_a_site_that_is_asked_reads_its_test_images(folder: Path) -> None:
    here = Board(folder, clock=itertools.count().__next__)
    asked = {"event": "link", "site": "alpine", "status": "asked"}
    here.show({"event": "start", "sites": ["alpine"], "rounds": 2, "closed": 1})
    here.show(asked)
    assert board.read(folder)["sites"]["alpine"]["status"] == "training"
    here.show({"event": "round", "round": 2, "val_mean": {}, "bytes": {}})
    here.show(asked)
    assert board.read(folder)["sites"]["alpine"]["status"] == "testing"
