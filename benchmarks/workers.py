"""Sites in parallel: throughput of k workers over k times that of one, beside what the machine itself allows.

`consilium run` with 1, 2 and 4 workers of one thread, as threads of one process and as processes; steady rounds only.
The machine's own scaling: k independent processes that each train the plain loop. All must give the same bits.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import children, job
from benchmarks.frame import Estimate, Result, Scale, alternate, check
from benchmarks.job import Job
from benchmarks.limit import cores
from benchmarks.measure import command
from consilium import checkpoint

NAME, TITLE = "workers", "Sites in parallel"
START_SECONDS = 12.0  # by then four processes have imported torch and warmed up


def run(scale: Scale) -> Result:
    """All numbers of workers in turn."""
    each = scale.pick(Job(8, 64, 9, 18), Job(4, 16, 2, 2))
    each.prepare()
    result, digests = Result(), dict[str, set[str]]()
    counts = [count for count in scale.pick((2, 4), (2,)) if count <= cores()]
    pools = ("threads", "processes") if job.known("pool") else ("processes",)
    contestants = {"1": (1, "auto")} | {f"{count} {pool}": (count, pool) for count in counts for pool in pools}

    def throughput(name: str) -> float:
        count, pool = contestants[name]
        speed, digest = steady(each, count, pool, scale.pick(3, 2))
        digests.setdefault(digest, set()).add(name)
        return speed

    turns: dict[str, Any] = {name: (lambda name=name: throughput(name)) for name in contestants}
    turns |= {f"plain {count}": (lambda count=count: plain(each, count, scale)) for count in (1, *counts)}
    speeds = alternate(turns, scale.repeats(2))
    check(len(digests) == 1, f"these gave other bits: {sorted(map(sorted, digests.values()))}")
    for name, (count, pool) in contestants.items():
        if count > 1:
            share = efficiency(speeds[name], speeds["1"], count)
            words = f"{count} workers ({pool}): throughput over {count} times that of one worker"
            result.add(words, share, target=(">=", 0.8), note="same bits")
    for count in counts:
        share = efficiency(speeds[f"plain {count}"], speeds["plain 1"], count)
        result.add(f"{count} independent plain loops over {count} times one: the machine's own scaling", share)
    result.samples = {"images per second": speeds}
    result.facts = {"digest of the shared adapter": next(iter(digests))}
    return result


def efficiency(speeds: list[float], single: list[float], count: int) -> Estimate:
    """Of neighbours in time."""
    return Estimate.of([speed / (count * one) for speed, one in zip(speeds, single, strict=True)])


def steady(each: Job, count: int, pool: str, rounds: int) -> tuple[float, str]:
    """Images per second of the rounds after the first, and a digest of the shared adapter."""
    table: dict[str, Any] = each.table()
    wanted = job.engine(workers=count, **({"pool": pool} if count > 1 and job.known("pool") else {}))
    table["engine"] = {**table["engine"], **wanted, **job.engine(stacked_sites=1)}
    table["train"] = {**table["train"], "rounds": rounds}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        (Path(scratch) / "federation.toml").write_text(job.toml(table))
        command(["consilium", "run", f"{scratch}/federation.toml", "--out", str(out)])
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        newest = max((out / "checkpoints").glob("round-*.safetensors"))
        tensors, _ = checkpoint.load(newest)
    images = sum(site["image_passes"] for site in events[-1]["sites"].values())
    return images / fmean(event["seconds"] for event in events[1:]), _digest(tensors)


def _digest(tensors: Mapping[str, Any]) -> str:
    from consilium.tensors import digest_all

    return digest_all(tensors)


def plain(each: Job, count: int, scale: Scale) -> float:
    """Images per second of so many plain loops at the same time, each in a process of its own."""
    start = time.time() + START_SECONDS
    window = scale.pick(6.0, 1.0)
    shape = [each.sites, each.train, each.val, each.test]
    options = {"job": shape, "images": scale.pick(64, 32), "start": start, "stop": start + window}
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda _: children.run("epochs", options)[1], range(count)))
    check(max(one["late"] for one in found) < 1, "a loop was not ready in time")
    return sum(one["images"] / one["seconds"] for one in found)
