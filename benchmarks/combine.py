"""The coordinator's sum: 1,000 updates of 300,000 parameters, read one after another.

Speed is the bytes of the updates over the time, against the rate at which one thread sums a tensor larger than any
cache. Memory is what the process grows by while the sum is formed, of 100 and of 1,000 updates that are made as they
are read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import children, limit
from benchmarks.frame import Estimate, Result, Scale, alternate
from benchmarks.job import Job
from consilium import payload
from consilium.experiment import Experiment, assemble
from consilium.protocols import Specs, Update
from consilium.tensors import Tensors

NAME, TITLE = "combine", "The coordinator's sum"
RANK, CLASSES = 32, ("a", "b", "c", "d")
POOL = 100  # distinct updates: far more bytes than a cache holds


def run(scale: Scale) -> Result:
    """Speed in turn with the machine's own sum; then memory."""
    count = scale.pick(1000, 40)
    with limit.threads(1):
        experiment = model()
        updates = pool(experiment, scale.pick(POOL, 10))
        turns = {"combine": lambda: speed(experiment, updates, count), "sum": lambda: _summed(scale)}
        samples = alternate(turns, scale.repeats(5), warm_up=1)
    parameters = sum(value.numel() for value in updates[0].values())
    result = Result()
    result.add(f"{count:,} updates of {parameters:,} parameters", Estimate.of(samples["combine"]), "GB/s")
    result.add("memory bandwidth of one thread, sum of a large tensor", Estimate.of(samples["sum"]), "GB/s")
    share = [100 * one / other for one, other in zip(samples["combine"], samples["sum"], strict=True)]
    result.add("the sum of the updates, share of that bandwidth", Estimate.of(share), "%", (">=", 50))
    grown = {number: children.run("combine", {"count": number})[1]["grown"] for number in (count // 10, count)}
    for number, value in grown.items():
        result.add(f"{number:,} updates: growth of the peak while they are summed", value / 1e6, "MB")
    result.samples = {**samples, "grown": {str(number): value for number, value in grown.items()}}
    return result


def _summed(scale: Scale) -> float:
    return limit.bandwidth(limit.summed, 1, scale).value


def model() -> Experiment:
    """The job's model with a rank that gives 300,000 parameters."""
    return assemble(Job(8, 64, 9, 18).config(tuner=[{"name": "lora", "rank": RANK}]), CLASSES)


def pool(experiment: Experiment, count: int) -> list[Tensors]:
    """So many different updates, as messages bring them."""
    torch.manual_seed(0)
    specs = experiment.up(1)
    return [_sent({name: torch.randn(spec.shape) for name, spec in specs.items()}, specs) for _ in range(count)]


def _sent(update: Tensors, specs: Specs) -> Tensors:
    return payload.loads(b"".join(payload.chunks(update, specs)), specs)


def speed(experiment: Experiment, updates: list[Tensors], count: int) -> float:
    """GB/s of updates that went into one sum."""

    def stream() -> Iterator[Update]:
        for number in range(count):
            yield Update(f"site-{number:05d}", updates[number % len(updates)], 16)

    moved = count * sum(value.nbytes for value in updates[0].values())
    server = _server(experiment)
    started = time.perf_counter()
    experiment.strategy.combine(server, stream(), experiment.model.specs)
    return moved / (time.perf_counter() - started) / 1e9


def _server(experiment: Experiment) -> Any:
    return experiment.strategy.init_server(experiment.initial(0), experiment.model.specs, ("site-00000",))


def grown(options: Mapping[str, Any]) -> dict[str, Any]:
    """In a process of its own: bytes by which memory grew while `count` updates, made as they are read, were summed."""
    experiment = model()
    first = pool(experiment, 1)[0]
    server = _server(experiment)

    def stream() -> Iterator[Update]:
        for number in range(options["count"]):
            yield Update(f"site-{number:05d}", {name: value + number for name, value in first.items()}, 16)

    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew from what is resident now
    before = _memory("VmRSS")
    experiment.strategy.combine(server, stream(), experiment.model.specs)
    return {"grown": _memory("VmHWM") - before}


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
