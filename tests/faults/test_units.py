"""The units that `consilium deploy init` writes, under systemd itself: installed, killed, restarted, stopped.

On a machine of their own (machine.py): nothing of this one is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files, services
from tests.faults import machine
from tests.faults.conftest import Lost
from tests.faults.loopback import SITES, Loopback, loopback
from tests.faults.machine import Machine
from tests.faults.outcome import assert_same, missed, simulated

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(bool(machine.lacking()), reason=f"a machine with systemd needs {machine.lacking()}"),
]
LEADER = "consilium-coordinator"
HOME, SERVED = Path("/var/lib") / services.LEADER, Path("/var/lib") / services.SERVICE_USER
PARTS = [f"consilium-{part}-{site}" for site in SITES for part in ("site", "node")]
USERS = (services.LEADER, services.SERVICE_USER, services.NODE_USER)
SERVICE, NODE = "consilium-site-prairie", "consilium-node-prairie"
PATIENCE = 600.0  # seconds for a run in which Flower refuses a node for a minute


class Installed(Loopback):
    """A federation whose parties have their folders on a machine with systemd."""

    def __init__(self, made: Loopback, there: Machine) -> None:
        super().__init__(made.folder, made.port)
        self.there = there

    def at(self, name: str) -> Path:
        return self.there.path(HOME if name == files.COORDINATOR else SERVED / name)

    def up(self, *units: str) -> None:
        """As the guide says, and until they have said that they are ready."""
        self.there.well("systemctl", "enable", "--now", *units)
        assert self.there.well("systemctl", "is-active", *units).split() == ["active"] * len(units)
        for unit in units:
            self.wait(lambda unit=unit: self.said(unit, "ready") or unit.startswith("consilium-node"), unit)  # type: ignore[misc]

    def said(self, unit: str, text: str) -> int:
        """How often a unit has said so."""
        path = self.there.path(f"/run/said/{unit}.service")
        return path.read_text(errors="replace").count(text) if path.is_file() else 0

    def shows(self, unit: str, name: str) -> str:
        return self.there.well("systemctl", "show", unit, "--value", f"--property={name}").strip()

    def restarts(self) -> dict[str, int]:
        """Of units that were started again."""
        found = {unit: int(self.shows(unit, "NRestarts")) for unit in (LEADER, *PARTS)}
        return {unit: number for unit, number in found.items() if number}

    def alive(self) -> list[str]:
        """Processes of the three users, with their words."""
        lines = self.there.well("ps", "-e", "-o", "user:32=,args=").splitlines()
        return [line for line in lines if line.split()[0] in USERS]

    def lead(self, *words: object) -> None:
        """A verb of the coordinator, as its user; it ends with 0."""
        done = self.there.user(services.LEADER, services.PROGRAM, "coordinator", *words, HOME, patience=PATIENCE)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.told()}"

    def serve(self, verb: str, site: str) -> None:
        """A verb of a hospital, as its service's user; it ends with 0."""
        cache = f"XDG_CACHE_HOME=/var/cache/consilium/{site}"
        words = ["env", cache, services.PROGRAM, "site", verb, SERVED / site]
        done = self.there.user(services.SERVICE_USER, *words)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.told()}"

    def told(self) -> str:
        return f"{super().told()}\n{self.there.told()}"


@contextmanager
def installed(folder: Path) -> Iterator[Installed]:
    """The scripts of all parties were run, twice over, and their units are known."""
    folder.mkdir()
    with loopback(folder, strategy="fedopal", rounds=4, deadline=500) as made, machine.machine(folder) as there:
        user = services.SERVICE_USER
        for party in (files.COORDINATOR, *SITES):
            for _ in range(2):
                there.well(made.at(party) / "install.sh")
        for site in SITES:  # personal tensors start as in a simulation, to compare with one
            there.well("install", "-m", "600", "-o", user, "-g", user, made.at(site) / files.SECRET, SERVED / site)
        yield Installed(made, there)


def test_units_killed_in_a_run_start_again_and_it_ends_as_if_nothing_had_been(tmp_path: Path, lost: Lost) -> None:
    """Flower refuses the node for a minute: the unit goes on trying. Stopped, nothing is left of any of them."""
    with installed(tmp_path / "there") as made:
        made.up(LEADER)
        made.serve("check", "alpine")
        made.up(*PARTS)
        assert_apart(made.there, *(int(made.shows(unit, "MainPID")) for unit in (SERVICE, NODE)))
        made.lead("submit")
        for number, (unit, whom) in enumerate([(SERVICE, "main"), (NODE, "all")], start=1):
            made.wait(lambda number=number: made.quick().get("closed", 0) >= number, f"round {number}")  # type: ignore[misc]
            lost.before(made, f"unit of a site's {'node' if unit == NODE else 'service'} killed in a run")
            made.there.well("systemctl", "kill", "--signal=KILL", f"--kill-whom={whom}", unit)
            made.wait(lambda unit=unit: made.restarts().get(unit) == 1, f"{unit} to be started again")  # type: ignore[misc]
        made.lead("status", "--follow")
        assert made.restarts() == {SERVICE: 1, NODE: 1}
        assert [missed(made, site) for site in SITES] == [[], [], []]
        assert_same(made, simulated(made, tmp_path / "here"))
        for site in SITES:
            made.serve("audit-log", site)
        lost.after()
        made.there.well("systemctl", "disable", "--now", *PARTS, LEADER)
        assert made.alive() == []
        active = made.there("systemctl", "is-active", *PARTS, LEADER).stdout.split()
        assert active == ["inactive"] * (len(PARTS) + 1)


def assert_apart(there: Machine, service: int, node: int) -> None:
    """Neither part has a right of root's; the service has no network; the node's user cannot look at images."""
    for process in (service, node):
        lines = there.well("cat", f"/proc/{process}/status").splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert [int(status[name], 16) for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")] == [0, 0, 1, 2]
    networks = [there.well("readlink", f"/proc/{process}/ns/net") for process in (1, service, node)]
    assert networks[0] == networks[2] != networks[1]
    assert there.user(services.NODE_USER, "ls", SERVED).returncode != 0
    assert there.user(services.NODE_USER, "ls", "/run/consilium/prairie").returncode == 0
    assert there.user("nobody", "ls", "/run/consilium/prairie").returncode != 0


def test_systemd_finds_no_fault_with_the_units_and_one_whose_file_is_broken_is_not_tried_again(tmp_path: Path) -> None:
    with installed(tmp_path / "there") as made:
        paths = [f"/etc/systemd/system/{unit}.service" for unit in (LEADER, *PARTS)]
        done = made.there("env", machine.UNITS, "systemd-analyze", "verify", "--man=no", *paths)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        own = made.at("prairie") / files.SITE
        whole = own.read_text()
        own.write_text("site = ")
        made.there.well("systemctl", "start", SERVICE)
        made.wait(lambda: made.shows(SERVICE, "ActiveState") == "failed", "its end")
        assert made.shows(SERVICE, "ExecMainStatus") == "2"
        assert made.restarts() == {}
        own.write_text(whole)
        made.up(SERVICE)
