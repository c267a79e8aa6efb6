"""A registered hospital that sends what it must not: refused by name, every time; the others keep their bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files
from tests.faults.conftest import Lost
from tests.faults.liar import PATIENT
from tests.faults.loopback import SITES, Loopback, loopback
from tests.faults.outcome import assert_as_simulated

REFUSE = {'name = "fedavg"': 'name = "fedavg"\nrefuse_updates = 1000'}


NAMES = {
    "old": "answer of an old round",
    "exception": "exception that names a patient",
    "times": "update times 1e4 in a reply",
}


def played(made: Loopback, plan: dict[int, str], lost: Lost) -> None:
    """A run in which prairie does what the plan says."""
    made.begin({"prairie": f"from tests.faults import liar\nliar.install({plan!r})"})
    made.until_closed(1)
    lost.before(made, *map(named, plan.values()))


def named(lie: str) -> str:
    return NAMES.get(lie, f"{lie} in a reply")


def told(made: Loopback) -> list[str]:
    """Files that speak of the patient, at the coordinator, with the SuperLink's log and database, or at others."""
    names = (files.COORDINATOR, *SITES[:2])
    looked = [path for name in names for path in made.at(name).rglob("*") if path.is_file()]
    looked += [made.folder / f"{name}.out" for name in ("link", *SITES[:2])]
    assert {"superlink.db", "superlink.log", "log.jsonl", "events.jsonl"} <= {path.name for path in looked}
    parts = [part.encode() for part in (*PATIENT.removesuffix(".png").split("_"), "data/patients")]
    return [str(path) for path in looked for part in parts if part in path.read_bytes()]


def over(plan: dict[int, str], lost: Lost) -> None:
    """What every lie cost, in its round."""
    for number, lie in plan.items():
        lost.after(named(lie), rounds=[number])


def expect(made: Loopback, folder: Path, plan: dict[int, str], said: dict[str, tuple[str, str]]) -> None:
    """Every round of the plan closed without prairie, for the reason given, and with the others."""
    assert_as_simulated(made, folder, {"prairie": plan})
    for each in made.rounds():
        assert [each["sites"][site]["status"] for site in SITES[:2]] == ["ok", "ok"]
        row = each["sites"]["prairie"]
        if each["round"] in plan:
            code, text = said[plan[each["round"]]]
            assert row["status"] == code, row
            assert text in row["message"], row


@pytest.mark.faults
def test_tensors_that_must_not_come_are_refused_by_name(tmp_path: Path, lost: Lost) -> None:
    plan = dict(enumerate(("nan", "inf", "shape", "names", "norm", "oversize", "noise"), start=2))
    with loopback(tmp_path / "there", rounds=len(plan) + 2, change=REFUSE) as made:
        played(made, plan, lost)
        said = {
            "nan": ("non_finite", "site prairie"),
            "inf": ("non_finite", "site prairie"),
            "shape": ("refused", "site prairie"),
            "names": ("refused", "site prairie"),
            "norm": ("refused", "the update of prairie is too long"),
            "oversize": ("refused", "the reply of prairie is too large"),
            "noise": ("refused", "the reply of prairie is too large"),
        }
        expect(made, tmp_path / "here", plan, said)
        over(plan, lost)


@pytest.mark.faults
def test_old_and_foreign_replies_and_texts_of_exceptions_do_not_come_in(tmp_path: Path, lost: Lost) -> None:
    lies = ("old", "other", "images", "cut", "number", "absurd", "times", "exception", "fault")
    plan = dict(enumerate(lies, start=2))
    with loopback(tmp_path / "there", rounds=len(plan) + 2) as made:
        played(made, plan, lost)
        without = {number: lie for number, lie in plan.items() if lie != "fault"}  # which is asked again
        said = {
            "old": ("stale", "asked prairie for round 2, got an answer of prairie for round 1"),
            "other": ("stale", "got an answer of harbour"),
            "images": ("refused", "1000000 training images"),
            "cut": ("refused", "no whole message"),
            "number": ("refused", "seconds nan"),
            "absurd": ("refused", "the update of prairie is absurdly large"),
            "times": ("refused", "the update of prairie is too long beside those of its peers"),
            "exception": ("error", "see failures.jsonl at the site, "),
        }
        expect(made, tmp_path / "here", without, said)
        (kept,) = next(made.at("prairie").glob("state/*/failures.jsonl")).read_text().splitlines()
        assert PATIENT in json.loads(kept)["text"]
        assert PATIENT in (made.at("prairie") / "log.jsonl").read_text()
        row = made.rounds()[-3]["sites"]["prairie"]
        assert row == {"status": "error", "message": f"see failures.jsonl at the site, {json.loads(kept)['digest']}"}
        assert not told(made), "nothing of the text is anywhere but at prairie"
        over(plan, lost)
