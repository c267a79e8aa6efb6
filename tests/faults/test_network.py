"""A hospital that is cut off, or whose node loses a part: it is back by itself, and no round, byte or bit is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files
from tests.faults.conftest import Lost
from tests.faults.loopback import SITES, Loopback, loopback, steady_port
from tests.faults.outcome import assert_as_simulated
from tests.faults.spaces import COORDINATOR, apart, inside

LONG = {"deadline": 400.0}  # seconds: Flower gives a node up after one minute, and refuses it for one more


def given_up(made: Loopback) -> bool:
    return made.quick()["sites"]["prairie"]["status"] in ("lost", "absent")


def assert_nothing_lost(made: Loopback, folder: Path) -> None:
    """The run ends as if nothing had been, by the processes that began it."""
    assert_as_simulated(made, folder)
    assert made.output("prairie").count("ready site=") == 1, "the service was never started again"


class Way:
    """The way to the SuperLink leads through here. Two ways to cut it: nobody listens, or who listens hangs up."""

    def __init__(self, made: Loopback, kind: str) -> None:
        self.kind, self.mark, self.port = kind, made.folder / "cut", steady_port()
        words = [Path(__file__).with_name("proxy.py"), self.port, made.port, self.mark]
        self.command = [sys.executable, *map(str, words)]
        self.process = subprocess.Popen(self.command)

    def cut(self) -> None:
        self.mark.touch()
        if self.kind == "refused":
            self.process.kill()
            self.process.wait()

    def mend(self) -> None:
        self.mark.unlink()
        if self.kind == "refused":
            self.process = subprocess.Popen(self.command)


@contextmanager
def way(made: Loopback, site: str, kind: str) -> Iterator[Way]:
    found, path = Way(made, kind), made.at(site) / files.FEDERATION
    path.write_text(path.read_text().replace(f"127.0.0.1:{made.port}", f"127.0.0.1:{found.port}"))
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["refused", "hung up"])
def test_a_network_that_is_cut_while_a_reply_is_on_its_way_costs_nothing(kind: str, tmp_path: Path, lost: Lost) -> None:
    """For longer than Flower's heartbeat: the link gives the node up, and takes it back."""
    with loopback(tmp_path / "there", **LONG) as made, way(made, "prairie", kind) as road:
        mark = made.at_work()
        lost.before(made, f"network cut while a reply is on its way ({kind})")
        road.cut()
        mark.unlink()
        made.wait(lambda: given_up(made), "the link to give it up")
        road.mend()
        assert_nothing_lost(made, tmp_path / "here")
        if kind == "hung up":  # an end of file in the TLS handshake is an error that Flower's loop does not survive
            assert "(SSL/TLS handshake error detected.) again_in" in made.output("prairie")
        lost.after()


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are found by /proc")
@pytest.mark.parametrize("part", ["flwr-clientapp", "flower-superexec"])
def test_a_node_that_loses_a_part_asks_for_work_again(part: str, tmp_path: Path, lost: Lost) -> None:
    """The service is at work meanwhile; its reply is remembered and handed over when it is asked again."""
    with loopback(tmp_path / "there", **LONG) as made:
        mark = made.at_work()
        running: Callable[[], dict[str, int]] = lambda: made.parts("prairie")  # noqa: E731
        made.wait(lambda: part in running(), f"{part} of prairie")
        lost.before(made, f"{part} of a node killed")
        os.kill(running()[part], signal.SIGKILL)
        if part == "flower-superexec":  # the client app that it had started would hand over its reply first
            ended = "why=the program that starts its client apps has ended"
            made.wait(lambda: ended in made.output("prairie"), "the node to end")
        mark.unlink()
        assert_nothing_lost(made, tmp_path / "here")
        assert "repeated kind=round round=2" in made.output("prairie")
        lost.after()


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "length"), [("unplugged", "shorter"), ("unplugged", "longer"), ("silent", "longer")])
def test_a_hospital_whose_line_is_dead_is_back_when_it_is_mended(
    kind: str, length: str, tmp_path: Path, lost: Lost
) -> None:
    """Nothing refuses a connection: what is sent is lost without a word, as in a real cut."""
    inside(dead_line, tmp_path, lost, kind, length)


def dead_line(folder: Path, lost: Lost, kind: str, length: str) -> None:
    elsewhere = {'address = "127.0.0.1:': f'address = "{COORDINATOR}:'}
    with loopback(folder / "there", change=elsewhere, **LONG) as made, apart(made, SITES) as cables:
        mark = made.at_work()
        log = made.at("prairie") / "supernode.log"
        before = log.read_text().count("Connection attempt failed")
        lost.before(made, f"line {kind} while a site trains, {length} than Flower's heartbeat")
        cables["prairie"].cut(kind)
        mark.unlink()
        made.wait(lambda: log.read_text().count("Connection attempt failed") > before, "the node to notice")
        if length == "longer":
            made.wait(lambda: given_up(made), "the link to give it up")
        cables["prairie"].mend(kind)
        assert_nothing_lost(made, folder / "here")
        lost.after()
