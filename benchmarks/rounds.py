"""A round over the limit: a fedavg + LoRA round of 8 sites against the plain loop on as many batches, one thread.

Both alternate in one process: after every closed round the plain loop trains one epoch over the same images. Where the
time of a round goes is measured by wrapping functions from outside.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import job, plain
from benchmarks.clock import Clock, watching
from benchmarks.frame import Estimate, Result, Scale, check, ratio
from benchmarks.job import Job
from benchmarks.limit import pooled, threads
from consilium import run as whole_run
from consilium.config import Config
from consilium.coordinator import Coordinator
from consilium.data import Examples
from consilium.engines.simulate import Simulation

NAME, TITLE = "round", "A round over the plain loop"


@dataclass
class Turns:
    """Called after every round: notes its time and its parts, then lets the plain loop have its turn."""

    clock: Clock
    loop: plain.Plain
    examples: Examples
    rounds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    started: float = 0.0

    def __call__(self, event: Mapping[str, object]) -> None:
        """An event of the coordinator."""
        if event["event"] != "round":
            return
        self.rounds.append(time.perf_counter() - self.started)
        self.parts.append(self.clock.take())
        sites: Mapping[str, Mapping[str, float]] = event["sites"]  # type: ignore[assignment]
        self.steps.append(int(sum(site["num_steps"] for site in sites.values())))
        self.losses.append(sum(site["loss"] for site in sites.values()) / len(sites))
        self.plain_seconds.append(self.loop.epoch(self.examples, len(self.rounds))[0])
        self.clock.take()
        self.started = time.perf_counter()


def run(scale: Scale) -> Result:
    """Rounds and epochs in turn; the first of each warms up."""
    each = scale.pick(Job(8, 64, 9, 18), Job(4, 16, 2, 2))
    repeats = scale.repeats(6)
    settings = each.config(train={"rounds": repeats + 1}, engine=job.engine(stacked_sites=1))
    with threads(1):
        turns = federate(each, settings)
    result = Result()
    keep = slice(1, None)
    fit = [parts["fit"] for parts in turns.parts[keep]]
    over = ratio(fit, turns.plain_seconds[keep])
    result.add("training phase of a round of 8 sites over the plain loop, time", over, target=("<=", 1.05))
    shares = {name: _share(turns, name) for name in turns.parts[-1]}
    known = [sum(parts.values()) / total for parts, total in zip(turns.parts[keep], turns.rounds[keep], strict=True)]
    result.add("share of a round: fit", shares["fit"], "%")
    result.add("share of a round: validation of what comes in and goes out", shares["validation"], "%", ("<=", 15))
    written = "states, checkpoint, events"
    result.add("share of a round: states, checkpoint, ledger, events", shares[written], "%", ("<=", 2))
    result.add("share of a round: messages", shares["messages"], "%")
    result.add("share of a round: combine", shares["combine"], "%")
    result.add("share of a round: everything else", Estimate.of([100 * (1 - share) for share in known]), "%")
    speed = Estimate.of([each.sites * each.train / seconds for seconds in turns.rounds[keep]])
    result.add("images trained in a whole round, 1 worker of 1 thread", speed, "images/s")
    result.samples = {"round": turns.rounds, "plain": turns.plain_seconds, "parts": turns.parts}
    result.facts = {"steps per round": turns.steps[0], "losses": turns.losses, "not found": turns.clock.missing}
    check(not turns.clock.missing, f"these functions are gone: {turns.clock.missing}")
    check(set(turns.steps) == {each.sites * -(-each.train // job.BATCH)}, f"steps {turns.steps}")
    check(all(0 < loss < 5 for loss in turns.losses), f"losses {turns.losses}")
    return result


def _share(turns: Turns, name: str) -> Estimate:
    pairs = zip(turns.parts[1:], turns.rounds[1:], strict=True)
    return Estimate.of([100 * parts.get(name, 0.0) / seconds for parts, seconds in pairs])


def federate(each: Job, settings: Config) -> Turns:
    """All rounds of the real coordinator over the real engine, in this process."""
    prepared = each.prepare()
    images = pooled(each, each.sites * each.train)
    with tempfile.TemporaryDirectory() as scratch, watching() as clock:
        turns = Turns(clock, plain.ours(settings, prepared.classes), images)
        plan = whole_run.make_plans(settings, prepared, Path(scratch))[whole_run.MAIN]
        with Simulation({"run": plan.data}, 1) as simulation:
            simulation.answering.experiments["run"] = plan.experiment
            turns.started = time.perf_counter()
            Coordinator(plan.experiment, simulation.transport("run"), Path(scratch), turns).run()
    return turns
