"""A disk that is really full, of a site and of the coordinator: a clear error, nothing damaged, on when there is room.

The folder is a file system of its own in memory, of some megabytes, in a namespace that only this test sees.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files
from tests.faults.conftest import Lost
from tests.faults.loopback import loopback
from tests.faults.outcome import assert_as_simulated, resume
from tests.faults.spaces import inside, ip

SIZE = 96 << 20  # bytes of the small disk
PIECE = 4096  # bytes that a file system hands out at once


def on_a_small_disk(folder: Path) -> None:
    """The same files, where there is room for SIZE bytes in all."""
    aside = folder.with_name(f"{folder.name}.aside")
    folder.rename(aside)
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=700", "none", str(folder)], check=True)
    shutil.copytree(aside, folder, dirs_exist_ok=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Until no byte can be written, or all but these."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(PIECE)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - leave))
    return path


@pytest.mark.faults
def test_the_disk_of_a_site_is_full(tmp_path: Path, lost: Lost) -> None:
    """With room for a line of the journal: an error. With room for nothing: no answer, until there is room again."""
    inside(full_site, tmp_path, lost)


def full_site(folder: Path, lost: Lost) -> None:
    ip("link", "set", "lo", "up")
    with loopback(folder / "there", strategy="fedopal", rounds=4, deadline=400) as made:
        on_a_small_disk(made.at("prairie"))
        mark = made.at_work()
        lost.before(made, "disk full at a site, room for the journal alone", "disk full at a site, no room at all")
        filler = fill(made.at("prairie"), leave=5 * PIECE)
        mark.write_text("3")
        made.until_asked("prairie", 3)
        filler.unlink()
        filler = fill(made.at("prairie"))
        mark.unlink()
        made.wait(lambda: made.quick()["sites"]["prairie"]["status"] == "lost", "no answer")
        filler.unlink()
        assert_as_simulated(made, folder / "here", {"prairie": [2]})
        assert made.rounds()[1]["sites"]["prairie"]["message"].startswith("see failures.jsonl at the site, ")
        kept = next(made.at("prairie").glob("state/*/failures.jsonl")).read_text().splitlines()
        assert all("a file could not be written" in json.loads(line)["text"] for line in kept)
        assert "No space left on device" in made.output("prairie")
        lost.after("disk full at a site, room for the journal alone", rounds=[2])
        lost.after(rounds=[3, 4])


@pytest.mark.faults
@pytest.mark.parametrize("room", [0, 5])
def test_the_disk_of_the_coordinator_is_full(room: int, tmp_path: Path, lost: Lost) -> None:
    """Pieces of room: none, or enough for a line of a log."""
    inside(full_coordinator, tmp_path, lost, str(room))


def full_coordinator(folder: Path, lost: Lost, room: str) -> None:
    ip("link", "set", "lo", "up")
    with loopback(folder / "there", strategy="fedopal", rounds=4, deadline=400) as made:
        there = made.at(files.COORDINATOR)
        on_a_small_disk(there)
        mark = made.at_work()
        lost.before(made, f"disk full at the coordinator, {room} pages of room")
        filler = fill(there, leave=int(room) * PIECE)
        mark.unlink()
        made.wait(lambda: made.status()["state"] in ("died", "failed"), "news of it")
        state = made.status()
        assert state["code"] == 1
        assert "No space left on device" in state["message"] or "make room" in state["message"], state
        filler.unlink()
        resume(made)
        assert_as_simulated(made, folder / "here")
        lost.after()
