"""Composition: a study's runs as arrays. In: a `Study` and its samples. Out: a `Group` per comparable set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consilium.bootstrap import Array
from consilium.study.loading import Study
from consilium.study.samples import LEVELS, Sample, num_replicates
from consilium.study.statistics import Draws, over_seeds, seed_weights

COSTS = {
    "bytes": "bytes per site and round, both ways",
    "bytes_up": "bytes per site and round, left the site",
    "bytes_down": "bytes per site and round, came in",
    "trainable": "trainable parameters",
}


@dataclass(frozen=True)
class Group:
    """Runs that are compared with one another: methods by seeds.

    `values` {level: [M, S, T]}, NaN where a run is missing; `images` [M][S] as in `Sample`; `facts` has a row per run
    with its place, its costs and what it trains.
    """

    name: str
    methods: Sequence[str]
    seeds: Sequence[int]
    values: Mapping[str, Array]
    images: Sequence[Sequence[str | None]]
    facts: pd.DataFrame
    level: str

    @cached_property
    def weights(self) -> Array:
        """Share of each seed in each replicate; the same for every method."""
        return seed_weights(len(self.seeds), self.values[self.level].shape[-1] - 1)

    @cached_property
    def main(self) -> Draws:
        """The compared level, mean over seeds, [M, T]."""
        return over_seeds(self.values[self.level], self.weights)

    @property
    def num_seeds(self) -> list[int]:
        """Seeds with a value, by method."""
        return [int(n) for n in np.isfinite(self.values[self.level][:, :, 0]).sum(axis=1)]

    def mean(self, fact: str) -> Array:
        """Mean of a fact over the seeds, [M]; NaN where no run of the method has it."""
        by_method = self.facts.groupby("method")[fact].mean()
        return np.array([float(by_method.get(name, np.nan)) for name in self.methods])

    def log_cost(self, cost: str) -> Array:
        """Mean over the seeds of log10 of a cost, [M]; NaN where it is zero or unknown."""
        values = self.facts[cost].astype(float)
        logs = np.log10(values.where(values > 0))
        by_method = pd.Series(logs, index=self.facts.index).groupby(self.facts["method"]).mean()
        return np.array([float(by_method.get(name, np.nan)) for name in self.methods])

    def marked(self, mark: str) -> list[str]:
        """Methods with a mark: head_only or full."""
        return [name for name in self.methods if bool(self.facts.loc[self.facts["method"] == name, mark].any())]

    @property
    def sites(self) -> list[str]:
        """Names of the sites that have values."""
        return [name.removeprefix("site:") for name in self.values if name.startswith("site:")]

    def both(self, first: int, second: int, level: str) -> list[int]:
        """Places of the seeds for which both methods have a value."""
        values = self.values[level][[first, second], :, 0]
        return [int(at) for at in np.flatnonzero(np.isfinite(values).all(axis=0))]

    def refusal(self, first: int, second: int) -> str:
        """Why two methods cannot be compared; nothing where they can."""
        seen = [(self.images[first][at], self.images[second][at]) for at in self.both(first, second, self.level)]
        if not seen:
            return "no seed with a value of both"
        if any(a is None or b is None for a, b in seen):
            return "predictions are missing"
        return "not tested on the same images" if any(a != b for a, b in seen) else ""

    def difference(self, first: int, second: int, level: str) -> tuple[Draws, int]:
        """`first` minus `second`, mean over the seeds that both have, and how many these are."""
        values, both = self.values[level], self.both(first, second, level)
        paired = np.full(values.shape[1:], np.nan)
        paired[both] = values[first, both] - values[second, both]
        return over_seeds(paired, self.weights), len(both)


def groups(study: Study, samples: Mapping[str, Sample]) -> list[Group]:
    """The groups that have a finished run, in the order of the plan."""
    facts = _facts(study)
    return [_group(study, name, samples, facts[facts["group"] == name]) for name in study.groups if
            (facts["group"] == name).any()]  # fmt: skip


def _group(study: Study, name: str, samples: Mapping[str, Sample], facts: pd.DataFrame) -> Group:
    methods = [method for method in study.methods if method in set(facts["method"])]
    numbers = sorted({int(seed) for seed in facts["seed"]})
    held = {run: samples[run] for run in facts["run"].astype(str)}
    sites = sorted({level for sample in held.values() for level in sample.values if level.startswith("site:")})
    shape = (len(methods), len(numbers), 1 + num_replicates(study.compare.metric))
    values = {level: np.full(shape, np.nan) for level in (*LEVELS, *sites)}
    images: list[list[str | None]] = [[None] * len(numbers) for _ in methods]
    for row in facts.itertuples():
        sample, m, s = held[str(row.run)], methods.index(str(row.method)), numbers.index(int(str(row.seed)))
        images[m][s] = sample.images
        for level, drawn in sample.values.items():
            values[level][m, s] = drawn
    return Group(name, methods, numbers, values, images, facts, study.compare.level)


def _facts(study: Study) -> pd.DataFrame:
    """Costs of every finished run; what the table or result.json does not say is NaN."""
    runs = study.finished
    read = [_from_result(study.folder / str(folder)) for folder in runs["folder"]]
    table = pd.DataFrame(read, index=runs.index, columns=["num_sites", "rounds", "head_only"])
    visits = (table["num_sites"] * table["rounds"]).astype(float)
    known = {name: _numbers(runs, name) for name in (
        "parameters.backbone", "parameters.trainable", "parameters.exchanged", "bytes.up", "bytes.down", "bytes.total",
        "seconds", "image_passes", "majority")}  # fmt: skip
    return runs[["run", "method", "group", "seed"]].assign(
        trainable=known["parameters.trainable"],
        exchanged=known["parameters.exchanged"],
        total=known["bytes.total"],
        bytes=known["bytes.total"] / visits,
        bytes_up=known["bytes.up"] / visits,
        bytes_down=known["bytes.down"] / visits,
        seconds=known["seconds"],
        image_passes=known["image_passes"],
        majority=known["majority"],
        head_only=table["head_only"],
        full=known["parameters.trainable"] >= known["parameters.backbone"],
    )


def _numbers(runs: pd.DataFrame, name: str) -> pd.Series[float]:
    if name not in runs.columns:
        return pd.Series(np.nan, index=runs.index)
    return pd.to_numeric(runs[name], errors="coerce").astype(float)


def _from_result(folder: Path) -> tuple[float, float, bool]:
    """Number of sites, number of rounds, and whether nothing but the head is trained."""
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return np.nan, np.nan, False
    trained = [*(result.get("wire") or {}).get("up", []), *result.get("kept_at_site", [])]
    roles = {tensor.get("role") for tensor in trained if "/" not in str(tensor.get("name"))}  # of the model alone
    return len(result.get("sites") or {}) or np.nan, result.get("rounds") or np.nan, roles == {"head"}
