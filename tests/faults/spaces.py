"""What a test may do to its own machine: hospitals on networks of their own, a disk that is small. In namespaces.

The body of a test runs in a process that is alone in them (`inside`); an ordinary user may make them on most systems,
and nothing outside is touched.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from tests.faults.loopback import PATIENCE, ROOT, Loopback
from tests.faults.loss import Lost

COORDINATOR = "10.77.0.1"  # its address; every hospital has a cable of its own to it
NOTES = "lost.json"
ALONE = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
PROBE = "mount -t tmpfs none /mnt && ip link set lo up && ip link add name near type veth peer name far"


def inside(body: Callable[..., None], folder: Path, lost: Lost, *words: str) -> None:
    """Run a function of a test module, with a folder, what notes the faults, and words, alone there; skips where the
    system refuses."""
    try:
        probe = subprocess.run([*ALONE, "sh", "-c", PROBE], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"namespaces need util-linux: {error}")
    if probe.returncode:
        pytest.skip(f"this system refuses namespaces: {probe.stderr.strip()}")
    command = [*ALONE, sys.executable, "-m", __name__, body.__module__, body.__name__, str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE, cwd=ROOT, check=False)
    if (folder / NOTES).is_file():
        for fault, row in json.loads((folder / NOTES).read_text()).items():
            lost.note(fault, row)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def main(module: str, body: str, folder: Path, *words: str) -> None:
    """In there."""
    notes: dict[str, object] = {}
    try:
        getattr(import_module(module), body)(folder, Lost(notes.__setitem__), *words)
    finally:
        (folder / NOTES).write_text(json.dumps(notes))


def ip(*words: object, at: Sequence[str] = ()) -> None:
    subprocess.run([*at, "ip", *map(str, words)], check=True, timeout=60)


def _space(made: ExitStack) -> list[str]:
    """A network without anything, as long as the stack is open: what goes before a command that is to run in it."""
    command = ["unshare", "--net", "sh", "-c", "echo made; exec sleep infinity"]
    holder = made.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
    made.callback(holder.kill)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"made\n"
    return ["nsenter", "--target", str(holder.pid), "--net", "--"]


@contextmanager
def apart(made: Loopback, sites: Sequence[str]) -> Iterator[dict[str, Cable]]:
    """Every site's processes run where one cable leads out, to the coordinator; inside a process that is `inside`."""
    with ExitStack() as stack:
        ip("link", "set", "lo", "up")
        ip("address", "add", f"{COORDINATOR}/32", "dev", "lo")
        found = {}
        for number, site in enumerate(sites, start=1):
            made.before[site] = _space(stack)
            found[site] = Cable(number, made.before[site])
        yield found


class Cable:
    """Between the coordinator and one hospital."""

    def __init__(self, number: int, there: Sequence[str]) -> None:
        self.name, self.there = f"site{number}", f"10.77.{number}.2"
        here = f"10.77.{number}.1"
        ip("link", "add", "name", self.name, "type", "veth", "peer", "name", "out", "netns", there[2])
        ip("address", "add", f"{here}/30", "dev", self.name)
        ip("link", "set", self.name, "up")
        ip("link", "set", "lo", "up", at=there)
        ip("address", "add", f"{self.there}/30", "dev", "out", at=there)
        ip("link", "set", "out", "up", at=there)
        ip("route", "add", COORDINATOR, "via", here, at=there)

    def cut(self, kind: str) -> None:
        """`unplugged`: no end hears the other. `silent`: what the coordinator answers is dropped, without a word."""
        if kind == "unplugged":
            ip("link", "set", self.name, "down")
        else:
            ip("route", "add", "blackhole", f"{self.there}/32")

    def mend(self, kind: str) -> None:
        if kind == "unplugged":
            ip("link", "set", self.name, "up")
        else:
            ip("route", "delete", "blackhole", f"{self.there}/32")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
