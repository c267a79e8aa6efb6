"""Processes that die, are slow, or are not there: the run goes on or can be resumed, with the bits of a simulation."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files
from tests.faults.conftest import Lost
from tests.faults.loopback import SITES, Loopback, loopback
from tests.faults.outcome import assert_as_simulated, assert_journals_whole, died, missed, resume

SLOWER = """
import time
from consilium.engines.site import Site
handle = Site.handle
def slowly(self, data):
    before = time.monotonic()
    reply = handle(self, data)
    time.sleep(max({least}, 19 * (time.monotonic() - before)))
    return reply
Site.handle = slowly
"""


STARTER = "flower-superexec of the SuperLink"  # without it no coordinator is started, and Flower does not look after it


@pytest.mark.faults
def test_a_site_that_loses_power_misses_rounds_and_catches_up_with_its_personal_state(
    tmp_path: Path, lost: Lost
) -> None:
    """Its node too is killed, so that Flower refuses it until the old one's heartbeat is overdue; it tries again."""
    with loopback(tmp_path / "there", strategy="fedopal", rounds=8, deadline=22, grace=3) as made:
        mark = made.at_work()
        lost.before(made, "site and node killed in training")
        os.kill(made.process("prairie"), signal.SIGKILL)
        made.kill("prairie")
        made.slowly("prairie", round=2)  # of which it misses the end, however soon it is let in
        made.until_closed(2)
        mark.unlink()
        assert made.ended()["state"] == "finished", made.told()
        gone = missed(made, "prairie")
        assert gone == [*range(2, 2 + len(gone))]
        assert 0 < len(gone) < 7, "it never came back"
        assert all(each["sites"][site]["status"] == "ok" for each in made.rounds() for site in SITES[:2])
        late = [made.rounds()[number - 1]["seconds"] - (made.deadline + 3) for number in gone]
        assert all(0 <= seconds < 60 for seconds in late), "deadline and grace"
        assert "still holds its last connection" in made.output("prairie")  # refused, and tried again
        assert_as_simulated(made, tmp_path / "here", {"prairie": gone})
        lost.after()


@pytest.mark.faults
def test_a_site_that_is_twenty_times_slower_holds_nobody_up(tmp_path: Path, lost: Lost) -> None:
    with loopback(tmp_path / "there", rounds=3, deadline=30, grace=2) as made:
        made.begin({"prairie": SLOWER.format(least=1.5 * made.deadline)})
        made.until_closed(1)
        lost.before(made, "site 20 times slower (replies dropped)")
        assert made.ended()["state"] == "finished", made.told()
        assert missed(made, "prairie") == [1, 2, 3]
        rows = [each["sites"]["prairie"] for each in made.rounds()]
        assert [row["status"] for row in rows] == ["late", "late", "late"]
        late = [each for each in made.log() if each["event"] == "late"]
        assert [(each["site"], each["policy"]) for each in late][:1] == [("prairie", "dropped")]
        assert all(each["bytes"] > 0 for each in late if each["policy"] == "dropped")
        assert len(made.asked("prairie")) < 3, "a site that is behind is not sent one round after the other"
        assert json.loads((made.run / "result.json").read_text())["untested"] == ["prairie"]
        assert_journals_whole(made)
        lost.after(rounds=range(1, 4))


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["coordinator", "superlink", "both", STARTER])
def test_whoever_leads_is_killed_and_the_run_goes_on_after_the_last_closed_round(
    victim: str, tmp_path: Path, lost: Lost
) -> None:
    """At two moments: just after a round was closed, and while sites train."""
    with loopback(tmp_path / "there", strategy="fedopal", rounds=4) as made:
        made.link()
        made.join("alpine")
        made.join("harbour")
        mark = made.slowly("prairie", round=3)
        made.submit()
        made.until_closed(1)
        lost.before(made, f"{victim} killed after a closed round")
        kill(made, victim)
        resume(made)
        made.until_asked("prairie", 3)
        lost.before(made, f"{victim} killed while sites train")
        kill(made, victim)
        mark.unlink()
        resume(made)
        assert_as_simulated(made, tmp_path / "here")
        lost.after()


def kill(made: Loopback, victim: str) -> None:
    if victim == "coordinator":
        os.kill(made.quick()["process"], signal.SIGKILL)
    elif victim == STARTER:
        os.kill(made.parts("link")["flower-superexec"], signal.SIGKILL)
    elif victim == "superlink":
        os.kill(made.process("link"), signal.SIGKILL)
    else:
        os.kill(made.process("link"), signal.SIGKILL)
        made.kill("link")
    made.wait(lambda: died(made), "news of it")
    if victim == "both":
        made.link()


@pytest.mark.faults
def test_a_quorum_that_is_not_reached_stops_with_names_and_can_be_resumed(tmp_path: Path, lost: Lost) -> None:
    whole = {"quorum = 0.6": "quorum = 1.0"}
    with loopback(tmp_path / "there", rounds=2, deadline=15, grace=2, change=whole) as made:
        made.link()
        for site in SITES[:2]:
            made.join(site)
        made.submit()
        state = made.ended()
        assert state["state"] == "failed"
        assert "too few sites replied to 'round' of round 1: 2 of 3" in state["message"]
        assert "prairie: absent, its node is not connected" in state["message"]
        assert made.status()["code"] == 1
        lost.before(made, "quorum not reached, then resumed")
        made.join("prairie")
        text = (made.at(files.COORDINATOR) / files.FEDERATION).read_text()
        (made.at(files.COORDINATOR) / files.FEDERATION).write_text(
            text.replace(f"deadline = {made.deadline}", "deadline = 600")
        )
        resume(made)
        assert_as_simulated(made, tmp_path / "here")
        lost.after()
