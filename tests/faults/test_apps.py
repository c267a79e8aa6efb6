"""A node whose client app ends unseen by Flower: it is back by itself, and no round, byte or bit is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from tests.faults import dying
from tests.faults.conftest import Lost
from tests.faults.loopback import loopback
from tests.faults.test_network import LONG, assert_nothing_lost

pytestmark = pytest.mark.faults
ENDED = "why=a client app has ended, and no reply of it is there"


@pytest.mark.parametrize(("call", "ends"), [("PullTaskInput", False), ("PullMessages", True)])
def test_an_app_killed_before_it_has_its_message_costs_nothing(
    call: str, ends: bool, tmp_path: Path, lost: Lost
) -> None:
    """Before its first call Flower starts another one after half a minute. Between the two its node waits without end:
    it answers for an app that died only where that had fetched a message."""
    with loopback(tmp_path / "there", **LONG) as made:
        plan = tmp_path / "call"
        made.link()
        made.join_all({"prairie": dying.install(tmp_path / "bin", plan)})
        lost.before(made, f"client app killed before {call}")
        plan.write_text(call)
        made.submit()
        made.wait(plan.with_suffix(".done").is_file, "its death")
        assert_nothing_lost(made, tmp_path / "here")
        assert (ENDED in made.output("prairie")) == ends
        lost.after()


def test_an_app_that_is_asked_to_end_costs_nothing(tmp_path: Path, lost: Lost) -> None:
    """It ends well, as it says, and without a reply; the service's is remembered, and handed over when it is asked
    again."""
    with loopback(tmp_path / "there", **LONG) as made:
        mark = made.at_work()
        made.wait(lambda: "flwr-clientapp" in made.parts("prairie"), "an app of prairie")
        lost.before(made, "client app of a node asked to end")
        os.kill(made.parts("prairie")["flwr-clientapp"], signal.SIGTERM)
        made.wait(lambda: ENDED in made.output("prairie"), "the node to end")
        mark.unlink()
        assert_nothing_lost(made, tmp_path / "here")
        assert "repeated kind=round round=2" in made.output("prairie")
        lost.after()
