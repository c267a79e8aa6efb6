"""Composition: what a run across hospitals leaves at the coordinator. In: its progress. Out: result.json.

Metrics are those that the hospitals computed on their own images and let out; nothing is pooled over images, as no
image and no prediction left a hospital. The mean is over sites, each weighing the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consilium import checkpoint, metrics, results, run_folder
from consilium.experiment import Experiment
from consilium.rounds import Progress

Tree = dict[str, Any]


def write(out: Path, experiment: Experiment, progress: Progress, late: str) -> None:
    """result.json, then the global adapter and summary.json, which closes the run. `late`: the policy for replies."""
    sites, tested = sorted(progress.server.sites), progress.tested
    counted = results.summary(progress)
    result: Tree = {
        "kind": "deployment",
        "run": experiment.handshake.run,
        **results.head(experiment, sites, checkpoint.read_json(out / run_folder.CONFIG), remote=True),
        **counted,
        "num_examples": progress.num_examples,
        "late": {"policy": late, "counted": late_replies(out)},
        "warnings": [
            *results.about_method(experiment, sites),
            *results.never_drawn(counted["image_passes"]["per_site"]),
        ],
        "untested": [site for site in sites if tested.get(site) is None],
        "metrics": {
            split: {site: tree[split] for site, tree in sorted(tested.items()) if tree} for split in results.SPLITS
        },
        "over_sites": {split: over_sites(tested, split) for split in results.SPLITS},
    }
    checkpoint.write_json(out / "result.json", metrics.without_nan(result))
    results.close(out, experiment, progress)


def late_replies(out: Path) -> dict[str, list[int]]:
    """site -> rounds in which its reply to the round before counted."""
    found: dict[str, list[int]] = {}
    for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        for site in sorted(site for site, each in event["sites"].items() if "late_from" in each):
            found.setdefault(site, []).append(event["round"])
    return found


def over_sites(tested: Mapping[str, Any], split: str, model: str = "personal") -> Tree:
    """Mean and worst of every metric of a model, each site weighing the same, with the number of sites that have it."""
    found: Tree = {}
    trees = {site: tree[split].get(model, {}) for site, tree in sorted(tested.items()) if tree}
    for metric in sorted({name for tree in trees.values() for name in tree}):
        values = {site: float(tree[metric]["value"]) for site, tree in trees.items() if _is_known(tree.get(metric))}
        if values:
            worst = (max if metric in metrics.LOWER_IS_BETTER else min)(values, key=lambda site: values[site])
            mean = math.fsum(values.values()) / len(values)
            found[metric] = {"mean": mean, "worst": {"site": worst, "value": values[worst]}, "sites": len(values)}
    return found


def _is_known(entry: object) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("value"), (int, float))
