"""What the benchmark of hospitals runs in processes of its own, and reads from their logs.

`python -m benchmarks.apart coordinate FOLDER`: the coordinator on the in-process double.
`python -m benchmarks.apart hospitals FOLDER`: all hospitals of a federation behind their sockets, until its input ends.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import ENVIRONMENT, ROOT
from consilium import run
from consilium.deployment import conduct, files, hospital
from consilium.deployment.board import Board
from consilium.engines.relay import Listener
from consilium.engines.site import Site
from consilium.experiment import assemble

MEMORY = "memory.txt"  # in the coordinator's folder


def resident_bytes(process: int) -> int:
    """Memory of a process that is in use."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return 0


# ------------------------------------------------------------------------------------------------ the double
@contextmanager
def hospitals(folder: Path) -> Iterator[None]:
    """All hospitals in one process, from when they are ready until the block ends."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.apart", "hospitals", str(folder / "made")]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError("the hospitals did not start")
            yield
        finally:
            process.stdin.close()
            process.wait(60)


def serve_all(folder: Path) -> None:
    """Every site behind its own rules and its own socket; images, backbone and model are shared, states are not."""
    agreement = files.read(folder / files.COORDINATOR)
    owns = {name: files.read_site(folder / name) for name in agreement.deployment.sites}
    first = next(iter(owns.values()))
    config = first.config.model_copy(update={"sites": first.config.sites.model_copy(update={"only": None})})
    prepared = run.prepare(config, lambda _: None)
    pieces = assemble(first.config, agreement.classes)
    with ExitStack() as stack:
        for name, own in owns.items():
            site = Site(pieces, prepared.sites[name], own.folder / files.STATE, files.secret(own.folder))
            stack.enter_context(Listener(own.folder / files.SOCKET, hospital.guarded(own, site, _silent).answer))
        print("ready", flush=True)
        sys.stdin.read()


def coordinate(folder: Path) -> None:
    """All rounds over the double, whose nodes do what Flower's do: hand the bytes to the service."""
    flower = importlib.import_module("consilium.engines.flower")
    double = importlib.import_module("tests.flower_double")
    own = folder / files.COORDINATOR
    agreement = files.read(own)
    public = files.public_keys(own, agreement.deployment)
    nodes = {key: double.Node(_asking(flower, folder / site)) for site, key in public.items()}
    keys = {site: flower.fingerprint(key) for site, key in public.items()}
    telling_memory()
    conduct.hold_no_free_memory()
    board = Board(own)
    transport = flower.Transport(double.LocalGrid(nodes), keys, 120.0, 5.0, board.show, poll=0.01)
    with board.reporting():
        conduct.federate(agreement, transport, own / conduct.RUN, board)


def _asking(flower: Any, site: Path) -> Any:
    def handle(content: Any) -> Any:
        return flower.answered(content, {flower.SOCKET: str(site / files.SOCKET)})

    return handle


# ------------------------------------------------------------------------------------------------ memory
def telling_memory() -> None:
    """From now on this process, a coordinator's, writes what it takes whenever a round is closed."""
    show = Board.show

    def tell(self: Board, event: Mapping[str, object]) -> None:
        show(self, event)
        if event["event"] == "round":
            with (self.folder / MEMORY).open("a") as file:
                file.write(f"{resident_bytes(os.getpid())}\n")

    Board.show = tell  # type: ignore[method-assign]


def server() -> Any:
    """The package's server app, which tells its memory."""
    telling_memory()
    return importlib.import_module("consilium.engines.flower").server(conduct.conduct)


def memory(coordinator: Path) -> list[int]:
    """Bytes of the coordinator's process after every round."""
    return [int(line) for line in (coordinator / MEMORY).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ logs
@dataclass(frozen=True)
class Leg:
    """One message: seconds from asking until a service has it, in it, and from its reply until that is here."""

    out: float
    inside: float
    back: float


def legs(there: Any, sites: Sequence[str]) -> list[Leg]:
    """Of all messages of rounds, from the coordinator's log and the hospitals'."""
    found = []
    for site in sites:
        lines = [json.loads(line) for line in (there.at(site) / files.LOG).read_text().splitlines()]
        asked, left = (
            [_moment(line) for line in lines if line["event"] == event and line.get("kind") == "round"]
            for event in ("asked", "answered")
        )
        for start, end in _pairs(there, site):
            inner = [[at for at in times if start <= at <= end] for times in (asked, left)]
            if all(inner):
                found.append(Leg(inner[0][-1] - start, inner[1][-1] - inner[0][-1], end - inner[1][-1]))
    return found


def waits(there: Any, sites: Sequence[str]) -> list[float]:
    """Seconds from asking a site until its reply is here, of all rounds but the first."""
    return [end - start for site in sites for start, end in _pairs(there, site)[1:]]


def _pairs(there: Any, site: str) -> list[tuple[float, float]]:
    """When a site was first asked in a round, and when its reply was here."""
    found, since = [], float("inf")
    for line in there.log():
        if line.get("site") == site and line["event"] == "link" and line["status"] in ("asked", "back"):
            since = min(since, _moment(line))
        elif line.get("site") == site and line["event"] == "site":
            if line.get("kind") == "round":
                found.append((since, _moment(line)))
            since = float("inf")
    return found


def _moment(line: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(line["time"]).timestamp()


def _silent(event: Mapping[str, object]) -> None:
    """Nobody listens."""


if __name__ == "__main__":
    {"coordinate": coordinate, "hospitals": serve_all}[sys.argv[1]](Path(sys.argv[2]))
