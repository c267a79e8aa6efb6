"""Against Flower simulation: the same federation, from the command line to the end, steady rounds, and memory.

Flower: `flwr run` on its local SuperLink, Ray with four actors of one CPU and one thread each, FedAvg, a client that
builds timm + peft for every message. Consilium: `consilium run` with four workers of one thread, as a user runs it:
with personal states, checkpoints, the test split read once, and the report.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import job
from benchmarks.frame import Estimate, Result, Scale, Skipped, alternate, check, ratio
from benchmarks.job import Job
from benchmarks.measure import ROOT, Cost, command
from consilium.experiment import load_backbone

NAME, TITLE = "flower", "Flower simulation on the same job"
WORKERS, ROUNDS = 4, 3


@dataclass
class Contest:
    """Both contestants on one job, and what they cost in each repeat. `each_round`: seconds of every round."""

    job: Job
    rounds: int
    costs: dict[str, list[Cost]] = field(default_factory=lambda: {"flower": [], "consilium": []})
    each_round: dict[str, list[list[float]]] = field(default_factory=lambda: {"flower": [], "consilium": []})
    outcomes: dict[str, Any] = field(default_factory=dict)

    def flower(self) -> float:
        """Seconds of `flwr run`, start to end."""
        with tempfile.TemporaryDirectory() as scratch:
            cost, outcome = run_flower(self.job, self.rounds, Path(scratch))
        return self._note("flower", cost, [end - start for start, end in pairwise(outcome["ends"])], outcome)

    def consilium(self) -> float:
        """Seconds of `consilium run`, start to end."""
        with tempfile.TemporaryDirectory() as scratch:
            cost, events = run_consilium(self.job, self.rounds, Path(scratch))
        return self._note("consilium", cost, [event["seconds"] for event in events], events)

    def _note(self, name: str, cost: Cost, seconds: list[float], outcome: Any) -> float:
        self.costs[name].append(cost)
        self.each_round[name].append(seconds)
        self.outcomes[name] = outcome
        return cost.seconds


def run(scale: Scale) -> Result:
    """Both jobs, in turn."""
    if find_spec("flwr") is None or find_spec("ray") is None:
        raise Skipped("flwr[simulation] is not installed: pip install '.[bench]'")
    result = Result()
    jobs = [(Job(8, 64, 9, 18), 3.0, 3), (Job(100, 16, 2, 5), 2.5, 2)]
    for each, target, repeats in scale.pick(jobs, [(Job(4, 16, 2, 2), 3.0, 1)]):
        contest = Contest(each, scale.pick(ROUNDS, 2))
        each.prepare()
        turns = {"flower": contest.flower, "consilium": contest.consilium}
        seconds = alternate(turns, scale.repeats(repeats))
        result.facts[each.name] = same_job(contest)
        _rows(result, contest, seconds, target)
    return result


def _rows(result: Result, contest: Contest, seconds: dict[str, list[float]], target: float) -> None:
    what = f"{contest.job.sites} sites x {contest.job.train} images"
    steady = {name: [fmean(each[1:]) for each in every] for name, every in contest.each_round.items()}
    memory = {name: [float(cost.peak_bytes) for cost in costs] for name, costs in contest.costs.items()}
    wall = ratio(seconds["flower"], seconds["consilium"])
    result.add(f"{what}: Flower's time over ours, start to end", wall, target=(">=", target))
    result.add(
        f"{what}: the same, steady rounds only", ratio(steady["flower"], steady["consilium"]), target=(">=", 1.3)
    )
    share = ratio(memory["consilium"], memory["flower"])
    result.add(f"{what}: our peak memory over Flower's", share, target=("<=", 1 / 3))
    for name, words in (("flower", "Flower"), ("consilium", "Consilium")):
        rounds = contest.each_round[name]
        first = [each[0] for each in rounds]
        outside = [total - sum(each) for total, each in zip(seconds[name], rounds, strict=True)]
        result.add(f"{what}: {words}, before the first and after the last round", Estimate.of(outside), "s")
        result.add(f"{what}: {words}, first round", Estimate.of(first), "s")
        result.add(f"{what}: {words}, a steady round", Estimate.of(steady[name]), "s")
        result.add(f"{what}: {words}, peak memory", Estimate.of([each / 1e6 for each in memory[name]]), "MB")
        processes = [cost.processes for cost in contest.costs[name]]
        kept = {"seconds": seconds[name], "rounds": rounds, "peak_bytes": memory[name], "processes": processes}
        result.samples[f"{contest.job.name}/{name}"] = kept


def same_job(contest: Contest) -> dict[str, Any]:
    """What both did, after checking that it is the same: steps, images, tensors, finite losses."""
    flower, ours = contest.outcomes["flower"], contest.outcomes["consilium"]
    images = contest.job.sites * contest.job.train
    steps = contest.job.sites * -(-contest.job.train // job.BATCH)
    for number, event in enumerate(ours, 1):
        theirs, sites = flower["train"][str(number)], event["sites"].values()
        check(sum(site["num_steps"] for site in sites) == theirs["num-steps"] == steps, "steps")
        check(sum(site["image_passes"] for site in sites) == theirs["num-images"] == images, "images")
        check(all(0 < loss < 5 for loss in [theirs["loss"], *(site["loss"] for site in sites)]), "loss")
    check(len(flower["validation"]) == len(ours) == contest.rounds, "a validation per round")
    theirs_count = sum(math.prod(shape) for shape in flower["tensors"].values())
    up = sum(ours[0]["bytes"]["up"].values()) / contest.job.sites / 4
    check(abs(theirs_count - up) / up < 0.05, f"parameters: {theirs_count} and about {up:.0f}")
    last = [site["loss"] for site in ours[-1]["sites"].values()]
    losses = {"flower": flower["train"][str(contest.rounds)]["loss"], "consilium": sum(last) / len(last)}
    return {"steps": steps, "images": images, "parameters": theirs_count, "last loss": losses}


# ------------------------------------------------------------------------------------------------ contestants
def run_consilium(each: Job, rounds: int, scratch: Path) -> tuple[Cost, list[dict[str, Any]]]:
    """`consilium run`, and the lines of its events."""
    table = {**each.table(), "engine": {**each.table()["engine"], "workers": WORKERS}}
    table["train"] = {**table["train"], "rounds": rounds}
    (scratch / "federation.toml").write_text(job.toml(table))
    out = scratch / "run"
    cost = command(["consilium", "run", str(scratch / "federation.toml"), "--out", str(out)])
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return cost, events


def run_flower(each: Job, rounds: int, scratch: Path) -> tuple[Cost, dict[str, Any]]:
    """`flwr run` with a SuperLink of its own, which is ended afterwards."""
    app, out, home = scratch / "app", scratch / "outcome.json", scratch / "home"
    shutil.copytree(ROOT / "benchmarks" / "flower_app", app, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", app / "LICENSE")
    (scratch / "job.json").write_text(json.dumps(describe(each)))
    home.mkdir()
    (home / "config.toml").write_text(_home(each.sites))
    settings = f"job='{scratch / 'job.json'}' out='{out}' rounds={rounds}"
    extra = {"FLWR_HOME": str(home), "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port())}
    cost = command(["flwr", "run", str(app), "local", "--stream", "--run-config", settings], extra)
    check(out.is_file(), f"Flower wrote no outcome:\n{cost.output[-3000:]}")
    return cost, json.loads(out.read_text())


def _home(sites: int) -> str:
    options = [
        f"num-supernodes = {sites}",
        "backend.client-resources.num-cpus = 1",
        "backend.client-resources.num-gpus = 0.0",
        f"backend.init-args.num-cpus = {WORKERS}",
    ]
    lines = "\n".join(f"options.{line}" for line in options)
    return f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local:"\n{lines}\n'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe(each: Job) -> dict[str, Any]:
    """The job for a contestant that does not use our engine: where the decoded images lie and who owns which rows."""
    prepared = each.prepare()
    settings = each.config()
    preprocessing = load_backbone(settings.backbone).preprocessing
    sites = [
        {
            split: {"rows": part.rows.tolist(), "labels": part.labels.tolist()}
            for split, part in (("train", data.train), ("val", data.val))
        }
        for data in prepared.sites.values()
    ]
    images: Any = next(iter(prepared.sites.values())).train.images
    fixed = {"backbone": job.BACKBONE, "image_size": job.SIZE, "rank": job.RANK, "batch_size": job.BATCH}
    return {
        **fixed,
        "learning_rate": job.RATE,
        "augmentation": settings.train.augmentation,
        "num_classes": len(prepared.classes),
        "store": str(images.filename),
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "sites": sites,
    }
