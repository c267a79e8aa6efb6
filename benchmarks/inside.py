"""Federations inside this process: the real coordinator and engine, one worker, without a command line around them.

In: a configuration and sites. Out: what each round took, and what was trained. Sites can be made of any number of
images out of one store, so that ten thousand of them need no ten thousand files.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.job import Job
from consilium.config import Config
from consilium.coordinator import Coordinator
from consilium.data import Examples, SiteData
from consilium.engines import stacked
from consilium.engines.simulate import Federation, Simulation, secrets_of
from consilium.experiment import Experiment, assemble
from consilium.rounds import Progress
from consilium.tensors import Tensors

Listener = Callable[[Mapping[str, Any]], None]


@dataclass
class Outcome:
    """A finished federation; `seconds` of every round as the coordinator counts them, `total` with the finish."""

    experiment: Experiment
    progress: Progress
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    total: float = 0.0

    @property
    def shared(self) -> Tensors:
        """The shared tensors after the last round."""
        return self.progress.server.shared


def federate(
    settings: Config,
    sites: Mapping[str, SiteData],
    classes: tuple[str, ...],
    *,
    listen: Listener = lambda _: None,
    folder: Path | None = None,
) -> Outcome:
    """Assemble (not timed), run all rounds and the finish (timed); `listen` hears every event of the coordinator."""
    events: list[Mapping[str, Any]] = []

    def show(event: Mapping[str, Any]) -> None:
        if event["event"] == "round":
            events.append(event)
        listen(event)

    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as scratch:
        pieces = stacked.resolved(assemble(settings, classes), len(sites))
        here = Federation(pieces.config, classes, sites, Path(scratch), secrets_of(settings.seed, sites))
        with Simulation({"run": here}, 1) as simulation:
            simulation.answering.experiments["run"] = pieces
            coordinator = Coordinator(pieces, simulation.transport("run"), Path(scratch), show)
            started = time.perf_counter()
            progress = coordinator.run()
            total = time.perf_counter() - started
    found = Outcome(pieces, progress, total=total)
    for event in events:
        replies = event["sites"].values()
        found.seconds.append(event["seconds"])
        found.steps.append(sum(reply.get("num_steps", 0) for reply in replies))
        found.images.append(sum(reply.get("image_passes", 0) for reply in replies))
        losses = [reply["loss"] for reply in replies if reply.get("loss") is not None]
        found.losses.append(sum(losses) / len(losses))
    return found


def made_sites(each: Job, sites: int, train: int, val: int = 0, test: int = 0) -> dict[str, SiteData]:
    """Sites out of the decoded training images of a job, taken in turn and over again where there are not enough."""
    pool = [site.train for site in each.prepare().sites.values()]
    rows, labels = (np.concatenate([getattr(part, key) for part in pool]) for key in ("rows", "labels"))
    taken = 0

    def split(name: str, kind: str, count: int) -> Examples:
        nonlocal taken
        chosen = np.arange(taken, taken + count) % len(rows)
        taken += count
        ids = np.array([f"{name}-{kind}-{number}" for number in range(count)], dtype=np.str_)
        return Examples(pool[0].images, rows[chosen], labels[chosen], ids, ids, np.full(count, name, dtype=np.str_))

    names = [f"site-{number:05d}" for number in range(sites)]
    return {
        name: SiteData(name, split(name, "t", train), split(name, "v", val), split(name, "x", test)) for name in names
    }


def same_bits(first: Tensors, second: Tensors) -> bool:
    """Whether two models are the same in every bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
