"""A site that answers twice: it gives the reply of the first time, and is counted once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files
from tests.faults.conftest import Lost
from tests.faults.loopback import SITES, loopback
from tests.faults.outcome import assert_as_simulated, up, written

HELD = """
import pathlib, time
from consilium.deployment.guard import Guard
from consilium.messages import envelope_of
mark, answer = pathlib.Path({mark!r}), Guard.answer
def held(self, data):
    reply = answer(self, data)
    if envelope_of(data)["round"] == 2 and mark.exists():
        mark.write_text("answered")
        while mark.exists():
            time.sleep(0.1)
    return reply
Guard.answer = held
"""
TWIN = """
from consilium.deployment import processes
whole = processes.supernode
def hostile(*where):
    python, _, _, *words = whole(*where)
    return [python, "-m", "tests.faults.twin", {notes!r}, *words]
processes.supernode = hostile
"""


@pytest.mark.faults
def test_a_reply_that_was_lost_on_its_way_is_given_again_and_counted_once(tmp_path: Path, lost: Lost) -> None:
    """The node is killed after the service has answered, and before the reply is pushed."""
    with loopback(tmp_path / "there", strategy="fedopal", rounds=3, deadline=300) as made:
        mark = made.folder / "held"
        mark.touch()
        made.begin({"prairie": HELD.format(mark=str(mark))})
        made.wait(lambda: mark.read_text() == "answered", "prairie's answer in round 2")
        lost.before(made, "reply lost on its way, request delivered twice")
        os.kill(made.process("prairie"), signal.SIGKILL)
        mark.unlink()
        here = assert_as_simulated(made, tmp_path / "here")
        assert "repeated kind=round round=2" in made.output("prairie")
        first, second = written(made, "prairie", round=2)
        assert first["request"] == second["request"]
        assert first["reply"] == second["reply"]
        assert [len(written(made, site, round=2)) for site in SITES[:2]] == [1, 1]
        assert up(made.run) == up(here), "bytes of its tensors are counted once"
        lost.after()


@pytest.mark.faults
def test_a_second_answer_to_the_same_request_does_not_come_in(tmp_path: Path, lost: Lost) -> None:
    """The node's program was changed at the hospital, and holds a registered key."""
    with loopback(tmp_path / "there", rounds=3) as made:
        notes = made.folder / "notes"
        made.begin({"prairie": TWIN.format(notes=str(notes))})
        made.until_closed(1)
        lost.before(made, "a second answer to one request")
        here = assert_as_simulated(made, tmp_path / "here")
        tried = [json.loads(line)["when"] for line in notes.read_text().splitlines()]
        assert {"at once", "a round later"} <= set(tried)
        assert up(made.run) == up(here)
        link = (made.at(files.COORDINATOR) / "superlink.log").read_text()
        assert "duplicate reply" in link
        lost.after()
