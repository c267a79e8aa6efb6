"""How the time of a round grows: with sites at a fixed number of images, with images, and with parameters.

Two decades each, and fitted exponents: time ~ size ** e by least squares on logarithms. The job's model, one worker of
one thread, no validation. Sites are swept at batches of one, so that a site's share of the work is the same whatever
their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import inside, job
from benchmarks.frame import Estimate, Result, Scale, check
from benchmarks.job import Job
from benchmarks.limit import threads

NAME, TITLE = "growth", "How the time of a round grows"


def run(scale: Scale) -> Result:
    """Three sweeps, each in turn over its sizes."""
    total = scale.pick(800, 16)
    sweeps: dict[str, dict[int, tuple[int, int, dict[str, Any]]]] = {
        "sites": {n: (n, total // n, {"batch_size": 1}) for n in scale.pick((8, 40, 160, 800), (4, 16))},
        "images": {8 * n: (8, n, {}) for n in scale.pick((4, 16, 80, 400), (2, 4))},
        "parameters": {},
    }
    result = Result()
    with threads(1):
        for name, points in sweeps.items():
            seconds = _ranks(scale) if name == "parameters" else {n: _round(*point) for n, point in points.items()}
            result.samples[name] = {str(size): value for size, value in seconds.items()}
            result.add(*_row(name, seconds, total))
    return result


def _row(name: str, seconds: Mapping[int, float], total: int) -> tuple[Any, ...]:
    words = {
        "sites": f"exponent over sites, {_span(seconds)}, {total} images in all (expected 0)",
        "images": f"exponent over images, {_span(seconds)}, 8 sites (expected 1)",
        "parameters": f"exponent over trained parameters, {_span(seconds)}, 8 sites x 16 images",
    }
    slope = exponent(list(seconds), list(seconds.values()))
    return words[name], Estimate(slope, slope, slope), ""


def _span(seconds: Mapping[int, float]) -> str:
    return f"{min(seconds):,} to {max(seconds):,}"


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of a line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle) ** 2 for a in x)


def _round(sites: int, images: int, train: Mapping[str, Any], rank: int = job.RANK) -> float:
    """Seconds of the last of two rounds; where a round is long its own first steps are warm-up enough."""
    each = Job(8, 64, 9, 18)
    made = inside.made_sites(each, sites, images)
    rounds = 2 if sites * images <= 256 else 1
    settings = each.config(tuner=[{"name": "lora", "rank": rank}], train={"rounds": rounds, **train})
    found = inside.federate(settings, made, each.prepare().classes)
    check(found.images[-1] == sites * images, "images")
    return found.seconds[-1]


def _ranks(scale: Scale) -> dict[int, float]:
    per_rank = 12 * (192 + 3 * 192)
    return {per_rank * rank: _round(8, 16, {}, rank) for rank in scale.pick((1, 5, 22, 100), (1, 8))}
