"""How memory grows with the number of sites, one worker: 8, 128 and 1,024 sites, each in a process of its own.

Every site trains the LoRA of the job on two images and keeps its optimiser's moments from round to round, on its disk.
The target allows every site's adapter and moments to be in memory at once; they need not be.
"""

from __future__ import annotations

from typing import Any

from benchmarks import children
from benchmarks.frame import Result, Scale, check

NAME, TITLE = "memory", "Memory over the number of sites"
FLOAT = 4  # bytes


def run(scale: Scale) -> Result:
    """Peaks, and the growth per site over what a site's state takes."""
    counts = scale.pick((8, 128, 1024), (4, 16))
    result = Result()
    peaks: dict[str, float] = {}
    parameters = 0
    for count in counts:
        cost, facts = children.run("federate", _options(count, scale))
        peaks[str(count)], parameters = float(cost.peak_bytes), facts["parameters"]
        check(facts["images"] == [2 * count], "images")
        result.add(f"{count} sites: peak memory", cost.peak_bytes / 1e6, "MB")
    first, last = counts[0], counts[-1]
    grown = (peaks[str(last)] - peaks[str(first)]) / (last - first)
    state = FLOAT * parameters * 3  # adapter, two moments
    what = f"growth per site from {first} to {last} sites, over adapter and moments of one"
    result.add(what, grown / state, target=("<=", 1.2), note=f"{state / 1e6:.2f} MB")
    result.samples = {"peak_bytes": peaks}
    _many(result, scale)
    return result


def _options(count: int, scale: Scale) -> dict[str, Any]:
    shape = scale.pick([8, 64, 9, 18], [4, 16, 2, 2])
    train = {"rounds": 1, "batch_size": 2, "moments": "keep"}
    return {"job": shape, "sites": count, "train": 2, "tables": {"train": train}}


def _many(result: Result, scale: Scale) -> None:
    """Ten thousand sites of a small model, one image each: what is kept in memory about a site."""
    few, many = scale.pick((1_000, 10_000), (8, 32))
    peaks = {}
    for count in (few, many):
        options = _options(count, scale)
        options["tables"]["backbone"] = {"name": "test_vit", "weights": "random", "image_size": 96}
        options["tables"]["engine"] = {"prefix_cache": False}
        options |= {"train": 1, "tables": {**options["tables"], "tuner": [{"name": "linear"}]}}
        cost, facts = children.run("federate", options)
        check(facts["images"] == [count], "images")
        peaks[count] = float(cost.peak_bytes)
    result.add(f"{many:,} sites (small backbone, head alone): peak memory", peaks[many] / 1e6, "MB")
    grown = (peaks[many] - peaks[few]) / (many - few) / 1e3
    result.add(f"growth per site from {few:,} to {many:,} sites", grown, "kB")
    result.samples["peak_bytes of many"] = {str(count): value for count, value in peaks.items()}
