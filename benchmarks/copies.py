"""Against a loop that deep-copies the model per client, as the common research libraries do: time and memory.

Both train in turn on one core, validate what comes in and goes out, and average. Ours also keeps states, checkpoints
and events on the disk. A round is timed inside; memory is the peak of the whole process.
"""

from __future__ import annotations

from typing import Any

from benchmarks import children
from benchmarks.frame import Estimate, Result, Scale, alternate, check, ratio
from benchmarks.job import Job
from benchmarks.measure import Cost

NAME, TITLE = "deepcopy", "A loop that deep-copies the model per client"


def run(scale: Scale) -> Result:
    """Whole processes in turn."""
    each = scale.pick(Job(8, 64, 9, 18), Job(4, 16, 2, 2))
    sites = scale.pick(64, 4)
    tables = {"train": {"rounds": 2}}
    options = {
        "job": [each.sites, each.train, each.val, each.test],
        "sites": sites,
        "train": 16,
        "val": 2,
        "tables": tables,
    }
    costs: dict[str, list[Cost]] = {"copies": [], "federate": []}
    facts: dict[str, list[dict[str, Any]]] = {"copies": [], "federate": []}

    def contestant(name: str) -> float:
        cost, found = children.run(name, options)
        costs[name].append(cost)
        facts[name].append(found)
        return float(found["rounds"][-1])

    turns = {name: (lambda name=name: contestant(name)) for name in costs}
    seconds = alternate(turns, scale.repeats(3))
    check(facts["copies"][0]["images"] == facts["federate"][0]["images"], "images")
    check(facts["copies"][0]["parameters"] == facts["federate"][0]["parameters"], "parameters")
    check(all(0 < loss < 5 for every in facts.values() for found in every for loss in found["losses"]), "losses")
    memory = {name: [float(cost.peak_bytes) for cost in every] for name, every in costs.items()}
    result = Result()
    result.add(
        f"{sites} sites x 16 images: the loop's time over ours, a round", ratio(seconds["copies"], seconds["federate"])
    )
    result.add(
        f"{sites} sites x 16 images: our peak memory over the loop's", ratio(memory["federate"], memory["copies"])
    )
    for name, words in (("copies", "the loop"), ("federate", "Consilium, one worker")):
        result.add(f"{words}, peak memory", Estimate.of([each / 1e6 for each in memory[name]]), "MB")
    result.samples = {"round": seconds, "peak_bytes": memory}
    result.facts = {"images": facts["copies"][0]["images"], "parameters": facts["copies"][0]["parameters"]}
    return result
