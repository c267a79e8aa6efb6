"""What runs in a process of its own, so that its memory can be told: `python -m benchmarks.children NAME JSON`.

The last line of the output is a JSON object: seconds, and what was done.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import inside, plain
from benchmarks.job import Job
from benchmarks.limit import pooled
from benchmarks.measure import Cost, command

Facts = dict[str, Any]


def run(name: str, options: Mapping[str, Any]) -> tuple[Cost, Facts]:
    """One of `CHILDREN` in a new process."""
    cost = command([sys.executable, "-m", "benchmarks.children", name, json.dumps(options)])
    return cost, json.loads(cost.output.strip().splitlines()[-1])


def federate(options: Mapping[str, Any]) -> Facts:
    """Our engine in one process; options: job, sites, train, val, tables."""
    each = Job(*options["job"])
    sites = inside.made_sites(each, options["sites"], options["train"], options.get("val", 0))
    settings = each.config(**options.get("tables", {}))
    found = inside.federate(settings, sites, each.prepare().classes)
    specs = found.experiment.model.specs.values()
    parameters = sum(torch.Size(spec.shape).numel() for spec in specs)
    return {"rounds": found.seconds, "images": found.images, "losses": found.losses, "parameters": parameters}


def copies(options: Mapping[str, Any]) -> Facts:
    """A loop that deep-copies the model per client; options as for `federate`."""
    each, rounds = Job(*options["job"]), options["tables"]["train"]["rounds"]
    sites = inside.made_sites(each, options["sites"], options["train"], options.get("val", 0))
    prepared = each.prepare()
    preprocessing = plain.ours(each.config(), prepared.classes).preprocessing
    loop = plain.Copies(sites, len(prepared.classes), preprocessing)
    seconds = [loop.round() for _ in range(rounds)]
    return {"rounds": seconds, "images": loop.images, "losses": loop.losses, "parameters": loop.parameters}


def epochs(options: Mapping[str, Any]) -> Facts:
    """Epochs of the plain loop until a deadline has passed; options: job, images, start and stop in epoch seconds."""
    each = Job(*options["job"])
    loop, examples = plain.ours(each.config(), each.prepare().classes), pooled(each, options["images"])
    loop.epoch(examples)
    while time.time() < options["start"]:
        time.sleep(0.001)
    images, begun = 0, time.time()
    while time.time() < options["stop"]:
        images += loop.epoch(examples)[2]
    return {"images": images, "seconds": time.time() - begun, "late": begun - options["start"]}


def combine(options: Mapping[str, Any]) -> Facts:
    """The growth of memory while updates are summed; options: count."""
    return importlib.import_module("benchmarks.combine").grown(options)  # type: ignore[no-any-return]


CHILDREN: dict[str, Callable[[Mapping[str, Any]], Facts]] = {
    "federate": federate,
    "copies": copies,
    "epochs": epochs,
    "combine": combine,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))))
