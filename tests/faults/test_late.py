"""Replies that come after their round, under late = "next_round": each counts once, in the round after its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from tests.faults.conftest import Lost
from tests.faults.loopback import loopback
from tests.faults.outcome import assert_as_simulated, missed

OVERDUE = """
import pathlib, time
from consilium.engines.site import Site
from consilium.messages import envelope_of
handle = Site.handle
def slowly(self, data):
    fields = envelope_of(data)
    mark = pathlib.Path({mark!r} + str(fields["round"]))
    while fields["kind"] == "round" and fields["round"] in {rounds} and not mark.exists():
        time.sleep(0.1)
    return handle(self, data)
Site.handle = slowly
"""


@pytest.mark.faults
def test_a_slow_sites_replies_count_in_the_rounds_after_their_own(tmp_path: Path, lost: Lost) -> None:
    """It works on rounds 1 and 3 until these are closed; the bits are those of a simulation in which it does."""
    change = {"grace = 2": 'grace = 2\nlate = "next_round"'}
    with loopback(tmp_path / "there", strategy="fedper", rounds=5, deadline=25, grace=2, change=change) as made:
        mark = tmp_path / "done"
        made.begin({"prairie": OVERDUE.format(mark=str(mark), rounds=(1, 3))})
        for number in (1, 3):
            made.until_closed(number)
            if number == 1:
                lost.before(made, "site slower than rounds (late replies counted in the next round)")
            Path(f"{mark}{number}").touch()
        assert_as_simulated(made, tmp_path / "here", late={"prairie": (1, 3)})
        rows = {each["round"]: each["sites"]["prairie"] for each in made.rounds()}
        assert {number: row["late_from"] for number, row in rows.items() if "late_from" in row} == {2: 1, 4: 3}
        assert made.asked("prairie") == [1, 3, 5]
        late = [(each["site"], each["policy"]) for each in made.log() if each["event"] == "late"]
        assert late == [("prairie", "next_round")] * 2
        result = json.loads((made.run / "result.json").read_text())
        assert result["late"] == {"policy": "next_round", "counted": {"prairie": [2, 4]}}
        assert "reply to the round before" in (made.run / "report.html").read_text()
        lost.after(rounds=range(1, 6))


@pytest.mark.faults
def test_a_reply_that_comes_when_flower_takes_it_no_more_costs_the_site_nothing_else(
    tmp_path: Path, lost: Lost
) -> None:
    """It is at work on round 1 until that request has been given up, and its time at Flower is over."""
    with loopback(tmp_path / "there", rounds=12, deadline=14, grace=1) as made:
        mark = tmp_path / "done"
        made.begin({"prairie": OVERDUE.format(mark=str(mark), rounds=(1,))})
        made.until_closed(4)
        lost.before(made, "reply refused by Flower, as its time was over")
        Path(f"{mark}1").touch()
        assert made.ended()["state"] == "finished", made.told()
        gone = missed(made, "prairie")
        assert gone[:4] == [1, 2, 3, 4]
        assert len(gone) < 12, "it never came back"
        assert made.rounds()[-1]["sites"]["prairie"]["status"] == "ok"
        policies = [each["policy"] for each in made.log() if each["event"] == "late"]
        assert policies[0] == "given up"
        asked = made.asked("prairie")
        assert asked[0] == 1
        assert sum(number in gone for number in asked) <= 4, "closed rounds queued up"
        assert_as_simulated(made, tmp_path / "here", {"prairie": gone})
        lost.after(rounds=range(1, 13))
