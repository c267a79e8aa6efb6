"""Whoever leads is killed at moments drawn over a whole run, one after the other; the run ends with the same bits."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files, processes
from tests.faults import killer
from tests.faults.conftest import Lost
from tests.faults.loopback import Loopback, loopback
from tests.faults.outcome import assert_as_simulated, died, resume

ROUNDS = 4
EDGES = {"start": killer.AT_THE_START, "finish": killer.AT_THE_END}
INSTALL = "from pathlib import Path\nfrom tests.faults import killer\nkiller.install(Path({plan!r}))\n"


def drawn(seed: int) -> list[list[Any]]:
    """Every moment of a round, in a round that is drawn, as a run comes by them, between those of its two ends."""
    draw = random.Random(seed)
    rounds = sorted((draw.randint(1, ROUNDS), order, name) for order, name in enumerate(killer.IN_ROUNDS))
    first, last = ([[when, name] for name in names] for when, names in EDGES.items())
    return [*first, *([number, name] for number, _, name in rounds), *last]


@pytest.mark.faults
def test_a_coordinator_killed_at_moments_drawn_over_the_run_ends_with_the_same_bits(tmp_path: Path, lost: Lost) -> None:
    with loopback(tmp_path / "there", strategy="fedopal", rounds=ROUNDS) as made:
        plan = made.folder / "moment.json"
        app = made.at(files.COORDINATOR) / processes.APP / "consilium_federation" / "coordinator.py"
        app.write_text(INSTALL.format(plan=str(plan)) + app.read_text())
        made.link()
        made.join_all()
        for moment in drawn(6):
            plan.write_text(json.dumps(moment))
            where, name = moment
            lost.before(made, f"coordinator killed at '{name}' of {where if where in EDGES else 'a round'}")
            go_on(made)
            made.wait(plan.with_suffix(".done").is_file, f"its death at {moment}")
            plan.with_suffix(".done").unlink()
            made.wait(lambda: died(made), "news of it")
        go_on(made)
        assert_as_simulated(made, tmp_path / "here")
        assert not list(made.run.rglob("*.tmp"))
        lost.after()


def go_on(made: Loopback) -> None:
    """Begin the run, or resume it where it has a name."""
    resume(made) if (made.run / "config.json").is_file() else made.submit()


MORTAL = """
from consilium.deployment import processes
whole = processes.superlink
def mortal(folder, address):
    python, _, _, *words = whole(folder, address)
    return [python, "-m", "tests.faults.mortal", {plan!r}, *words]
processes.superlink = mortal
"""
AT_THE_LINK = [
    ("/v1/runtime/push-messages", "unanswered"),  # a request is taken from the coordinator
    ("/v1/fleet/pull-object", "unanswered"),  # a site is handed one
    ("/v1/fleet/push-messages", "before"),  # a reply comes
    ("/v1/fleet/push-messages", "unanswered"),
    ("/v1/runtime/pull-messages", "before"),  # the coordinator looks for replies
    ("/v1/runtime/pull-object", "unanswered"),  # and is handed one
]


@pytest.mark.faults
def test_a_superlink_killed_at_moments_drawn_over_the_run_ends_with_the_same_bits(tmp_path: Path, lost: Lost) -> None:
    draw = random.Random(6)
    moments = sorted((draw.randint(1, ROUNDS), order) for order in range(len(AT_THE_LINK)))
    with loopback(tmp_path / "there", strategy="fedopal", rounds=ROUNDS) as made:
        plan = made.folder / "moment.json"
        made.link(MORTAL.format(plan=str(plan)))
        made.join_all()
        made.submit()
        for number, order in moments:
            path, how = AT_THE_LINK[order]
            made.until_closed(number - 1)
            lost.before(made, f"SuperLink killed at {path.removeprefix('/v1/')}, {how}")
            plan.with_suffix(".new").write_text(json.dumps([path, how]))
            plan.with_suffix(".new").rename(plan)
            made.wait(plan.with_suffix(".done").is_file, f"its death at {path}")
            plan.with_suffix(".done").unlink()
            made.wait(lambda: died(made), "news of it")
            resume(made)
        assert_as_simulated(made, tmp_path / "here")
        lost.after()


def removed(database: Path) -> None:
    for path in database.parent.glob(f"{database.name}*"):
        path.unlink()


def damaged(database: Path) -> None:
    data = bytearray(database.read_bytes())
    data[4096 : len(data) // 2] = bytes(len(data) // 2 - 4096)
    database.write_bytes(data)


@pytest.mark.faults
def test_a_superlink_whose_database_is_gone_or_damaged_takes_the_run_again(tmp_path: Path, lost: Lost) -> None:
    """Nothing of a run is in it but messages that are under way. Nodes that were connected come back by themselves."""
    with loopback(tmp_path / "there", strategy="fedopal", rounds=3, deadline=300) as made:
        folder = made.at(files.COORDINATOR)
        mark = made.at_work()
        for number, harm in ((2, removed), (3, damaged)):
            made.until_asked("prairie", number)
            lost.before(made, f"SuperLink's database {harm.__name__} while stopped")
            made.kill("link", signal.SIGTERM)
            made.wait(lambda: died(made), "news of it")
            harm(folder / processes.DATABASE)
            made.link()
            resume(made)
            mark.write_text(str(number + 1))
        assert_as_simulated(made, tmp_path / "here")
        assert len(list(folder.glob(f"{processes.DATABASE}.damaged-*Z"))) == 1
        assert "could not be read and is now superlink.db.damaged-" in made.output("link")
        lost.after()
