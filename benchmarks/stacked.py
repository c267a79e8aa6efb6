"""Several sites trained in one batched forward: engine.stacked_sites against one after another, by batch size."""

from __future__ import annotations

from typing import Any

from benchmarks import inside, job
from benchmarks.frame import Result, Scale, Skipped, alternate, check, ratio
from benchmarks.job import Job
from benchmarks.limit import threads

NAME, TITLE = "stacked", "Sites stacked into one batch"
BATCHES = (1, 2, 4, 8, 16, 32)


def run(scale: Scale) -> Result:
    """One thread, eight sites, all batch sizes; `auto` must never be slower."""
    if not job.known("stacked_sites"):
        raise Skipped("engine.stacked_sites is not there yet")
    result = Result()
    with threads(1):
        for batch in scale.pick(BATCHES, (4,)):
            speeds = contest(batch, scale)
            over = ratio(speeds["8"], speeds["1"])
            words = f"batch {batch}: 8 stacked sites over one after another, throughput"
            result.add(words, over, "x", (">=", 1.4) if batch == 4 else None)
            auto = ratio(speeds["auto"], speeds["1"])
            result.add(f"batch {batch}: auto over one after another, throughput", auto, target=(">=", 0.97))
            result.samples[f"batch {batch}"] = speeds
    return result


def contest(batch: int, scale: Scale) -> dict[str, list[float]]:
    """Images per second of a round of eight sites, without validation."""
    each = scale.pick(Job(8, 64, 9, 18), Job(4, 16, 2, 2))
    count = max(16, 2 * batch) if not scale.quick else 4
    sites, classes = inside.made_sites(each, 8 if not scale.quick else 2, count), each.prepare().classes

    def throughput(stacked: Any) -> float:
        engine = {"stacked_sites": stacked}
        found = inside.federate(each.config(train={"rounds": 2, "batch_size": batch}, engine=engine), sites, classes)
        check(found.images == [count * len(sites)] * 2, "images")
        check(all(0 < loss < 5 for loss in found.losses), "losses")
        return found.images[-1] / found.seconds[-1]

    turns = {name: (lambda value=value: throughput(value)) for name, value in {"1": 1, "8": 8, "auto": "auto"}.items()}
    return alternate(turns, scale.repeats(3))
