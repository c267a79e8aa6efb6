"""Hospitals in processes of their own: what a round costs beside the work, and whether the coordinator's memory stays.

Three parts, each with adapters of 1.2 MB (ViT-Tiny at 32 pixels with random weights, LoRA of rank 32) that travel both
ways, and a step of training per site and round, so that what is timed is the way and not the work:

1. 64 sites on Flower's in-process double: the coordinator in one process, all hospitals in another, behind sockets.
2. SuperNodes over TLS on this machine, each with a service of its own, all started by `consilium site join`.
3. SuperNodes of which half ask their service, and half build everything anew in the process of every message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import anew, apart, job
from benchmarks.frame import Estimate, Result, Scale, Skipped, check
from benchmarks.job import Job
from benchmarks.measure import ENVIRONMENT, ROOT
from consilium.deployment import files, processes, shim
from tests.faults.loopback import Loopback

NAME, TITLE = "deployment", "Hospitals in processes of their own"
WARM = 3  # first rounds, in which memory still grows to its size
PAYLOAD = (1.1e6, 1.3e6)  # bytes of a reply


@dataclass
class Watched:
    """A run: memory of the coordinator's process after every round in bytes, and the lines of its events."""

    memory: list[int] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Bytes per round, by least squares over the rounds that are warm."""
        return slope(self.memory[WARM:]) if len(self.memory) > WARM + 1 else slope(self.memory)

    @property
    def received(self) -> float:
        """Payload bytes that come to the coordinator in a round."""
        return median(sum(event["bytes"]["up"].values()) for event in self.events)

    def own_work(self) -> list[float]:
        """Seconds of the slowest site of every round, as it said."""
        return [max(site["seconds"] for site in event["sites"].values() if "seconds" in site) for event in self.events]


def run(scale: Scale) -> Result:
    """All three parts."""
    if find_spec("flwr") is None:
        raise Skipped("flwr is not installed: pip install '.[bench]'")
    result = Result()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        _double(result, scale, Path(scratch) / "double")
        _nodes(result, scale, Path(scratch) / "nodes")
        _anew(result, scale, Path(scratch) / "anew")
    return result


def _double(result: Result, scale: Scale, folder: Path) -> None:
    sites, rounds = scale.pick((64, 20), (4, 3))
    made(folder, sites, rounds, processes.free_port())
    with apart.hospitals(folder):
        found = _coordinated(folder)
    check(len(found.events) == len(found.memory) == rounds, "rounds")
    what = f"{sites} sites on the in-process double, {rounds} rounds"
    _memory(result, what, found)
    result.add(f"{what}: a round", Estimate.of([event["seconds"] for event in found.events]), "s")
    result.samples["double"] = _kept(found)


def _nodes(result: Result, scale: Scale, folder: Path) -> None:
    sites, rounds = scale.pick((8, 20), (2, 2))
    with federation(folder, sites, rounds) as there:
        found = _followed(there)
        legs = apart.legs(there, there_sites(there))
    check(len(found.events) == len(found.memory) == rounds, "rounds")
    what = f"{sites} SuperNodes, {rounds} rounds"
    _memory(result, what, found)
    seconds, work = [event["seconds"] for event in found.events][1:], found.own_work()[1:]  # nodes came in the first
    fixed = [whole - own for whole, own in zip(seconds, work, strict=True)]
    result.add(f"{what}: a round", Estimate.of(seconds), "s")
    result.add(f"{what}: of it the slowest hospital's own work", Estimate.of(work), "s")
    note = "Flower's floor: a node looks every 3 s, and starts a process for every message"
    result.add(f"{what}: fixed cost of a round", Estimate.of(fixed), "s", note=note)
    for name, words in (
        ("out", "from asking until the service has the request"),
        ("back", "from its reply until here"),
    ):
        result.add(f"{what}: {words}", Estimate.of([getattr(leg, name) for leg in legs]), "s")
    result.samples["nodes"] = {**_kept(found), "legs": [vars(leg) for leg in legs]}


def _anew(result: Result, scale: Scale, folder: Path) -> None:
    """In one run, so that both meet the same machine; the first round is warm-up."""
    sites, rounds = scale.pick((4, 6), (2, 2))
    with federation(folder, sites, rounds, unserved=sites // 2) as there:
        names = there_sites(there)
        found = _followed(there)
        seconds = {
            "by its service": apart.waits(there, names[sites // 2 :]),
            "built anew": apart.waits(there, names[: sites // 2]),
        }
        built = [each for name in names[: sites // 2] for each in anew.built(there.at(name))]
    check(len(found.events) == rounds and len(built) >= rounds, "messages that were answered anew")
    what = f"{sites} SuperNodes, {rounds} rounds, from asking a hospital to its reply"
    for words, every in seconds.items():
        result.add(f"{what}: {words}", Estimate.of(every), "s")
    more = [a - b for a, b in zip(seconds["built anew"], seconds["by its service"], strict=True)]
    result.add("what the resident service saves of every message", Estimate.of(more), "s")
    result.add("a process that builds anew: from its start until it can answer", Estimate.of(built), "s")
    result.samples["anew"] = {"seconds": seconds, "built": built, "rounds": [e["seconds"] for e in found.events]}


def _memory(result: Result, what: str, found: Watched) -> None:
    sizes = [total for event in found.events for total in event["bytes"]["up"].values()]
    check(all(PAYLOAD[0] <= size <= PAYLOAD[1] for size in sizes), f"payloads of 1.2 MB, not {sizes[:2]}")
    check(all(site["status"] == "ok" for event in found.events for site in event["sites"].values()), "replies")
    result.add(f"{what}: coordinator's memory after the last round", found.memory[-1] / 1e6, "MB")
    share = abs(found.growth) / found.received
    note = f"{found.growth / 1e3:.3g} kB per round; {found.received / 1e6:.3g} MB come in"
    result.add(f"{what}: its growth per round over the bytes that come in", share, target=("<=", 0.02), note=note)


def _kept(found: Watched) -> dict[str, Any]:
    return {"memory": found.memory, "rounds": [event["seconds"] for event in found.events], "work": found.own_work()}


def slope(values: Sequence[float]) -> float:
    """Of a line through values at 0, 1, 2, ..."""
    middle, height = (len(values) - 1) / 2, sum(values) / len(values)
    above = sum((at - middle) * (value - height) for at, value in enumerate(values))
    return above / sum((at - middle) ** 2 for at in range(len(values)))


# ------------------------------------------------------------------------------------------------ federations
def made(folder: Path, sites: int, rounds: int, port: int) -> list[str]:
    """Folders of a federation with so many sites, by `consilium deploy init`; names of its sites."""
    each = Job(sites, 8, 2, 2)
    each.prepare()
    table = each.table()
    own = {"sites": table.pop("sites"), "engine": {**table.pop("engine"), "threads": 1}}
    names = sorted(each.prepare().sites)
    table["backbone"] = {**table["backbone"], "image_size": 32}
    table["tuner"] = [{"name": "lora", "rank": 32}]
    table["train"] = {**table["train"], "rounds": rounds, "batch_size": 8}
    table["evaluation"] = {"bootstrap": 0, "every": rounds}
    table["deployment"] = {"sites": names, "address": f"127.0.0.1:{port}", "deadline": 120, "grace": 5}
    folder.mkdir(parents=True)
    (folder / "federation.toml").write_text(job.toml(table))
    (folder / "own.toml").write_text(job.toml({**own, "gate": {"min_patients": 1, "min_images": 1}}))
    words = ["deploy", "init", str(folder / "federation.toml"), "--out", str(folder / "made")]
    command = [sys.executable, "-m", "consilium", *words, "--site-file", str(folder / "own.toml")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return names


@contextmanager
def federation(folder: Path, sites: int, rounds: int, unserved: int = 0) -> Iterator[Loopback]:
    """SuperLink, services and SuperNodes, all ready; the first `unserved` sites build everything for every message."""
    port = processes.free_port()
    names = made(folder, sites, rounds, port)
    there = Loopback(folder / "made", port)
    _replace(there, "coordinator", "apart.server")
    if unserved:
        _replace(there, "site", "anew.client")
    for name in names[:unserved]:
        (there.at(name) / anew.ANEW).touch()
    try:
        there.link()
        for name in names:
            there.start(name, "site", "join", there.at(name))
        for name in names:
            there.wait(lambda name=name: "ready site=" in there.output(name), name)  # type: ignore[misc]
        yield there
    finally:
        for name in list(there.running):
            there.running[name].terminate()
        for name in list(there.running):
            there.running.pop(name).wait(60)


def _replace(there: Loopback, part: str, by: str) -> None:
    """One of the two apps that Flower carries by one that does the same and tells more."""
    app = there.at(files.COORDINATOR) / processes.APP / "consilium_federation" / f"{part}.py"
    check(app.read_text() == shim.FILES[f"consilium_federation/{part}.py"], "the app of the package")
    app.write_text(f"from benchmarks import {by.partition('.')[0]}\n\napp = {by}()\n")


def there_sites(there: Loopback) -> list[str]:
    """Names of the sites of a federation."""
    return sorted(files.read(there.at(files.COORDINATOR)).deployment.sites)


def _followed(there: Loopback) -> Watched:
    """Submit, and wait until the run has ended."""
    there.submit()
    while (state := there.quick())["state"] in ("starting", "running"):
        time.sleep(0.5)
    check(state["state"] == "finished", there.told())
    return Watched(apart.memory(there.at(files.COORDINATOR)), there.rounds())


def _coordinated(folder: Path) -> Watched:
    """The coordinator of the double in a process of its own."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.apart", "coordinate", str(folder / "made")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    check(done.returncode == 0, done.stderr[-3000:])
    own = folder / "made" / files.COORDINATOR
    events = (own / files.RUN / "events.jsonl").read_text().splitlines()
    return Watched(apart.memory(own), [json.loads(line) for line in events])
