"""Composition: one metric of every run under resampled patients. In: a `Study`. Out: a `Sample` per finished run.

Draws depend on site, groups and labels of the test images only (`consilium.bootstrap`), so that all runs on the same
images see the same resample. Metrics that are sums over images are one matrix product per run; the others are evaluated
replicate by replicate, on fewer replicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consilium.bootstrap import Array, Rows, divide, read, replicates
from consilium.errors import ConsiliumError
from consilium.metrics import LOWER_IS_BETTER
from consilium.study.file import CompareConfig
from consilium.study.loading import Study

FAST, SLOW = 1000, 200  # replicates
LEVELS = ("mean", "worst", "pooled")


@dataclass(frozen=True)
class Sample:
    """A run's metric by level, and by site as "site:<name>", each [T]; entry 0 is the value of results.parquet.

    `images` names the test images with their sites, groups and labels: equal text, same images; None where predictions
    are missing, and then all entries but the first are NaN; `problem` says why.
    """

    values: Mapping[str, Array]
    images: str | None
    problem: str = ""


def num_replicates(metric: str) -> int:
    """How many replicates a metric is given."""
    return FAST if _additive(metric) else SLOW


def _additive(metric: str) -> bool:
    return metric in ("balanced_accuracy", "balanced_accuracy_declared", "accuracy") or metric.startswith(
        "sensitivity."
    )


def samples(study: Study) -> dict[str, Sample]:
    """{run: Sample} of the finished runs. What cannot be read costs a run its replicates, not the study its page."""
    observed, used = _observed(study.results, study.compare), models(study.results, study.compare.model)
    drawn: dict[str, list[Rows]] = {}
    return {
        str(row.run): _sample(
            study.folder / str(row.folder),
            study.compare.model_copy(update={"model": used[str(row.run)]}),
            observed.get(str(row.run), {}),
            drawn,
        )
        for row in study.finished.itertuples()
    }


def models(results: pd.DataFrame, model: str) -> dict[str, str]:
    """{run: model}: the compared one, or the personal one where a run has no model of that name."""
    named = set(results.loc[results["model"] == model, "run"])
    return {str(run): model if run in named else "personal" for run in results["run"].unique()}


def _observed(results: pd.DataFrame, compare: CompareConfig) -> dict[str, dict[str, float]]:
    used = results["run"].astype(str).map(models(results, compare.model))
    kept = results[
        (results["metric"] == compare.metric)
        & (results["split"] == compare.split)
        & (results["model"] == used)
        & (results["level"].isin([*LEVELS, "site"]))
    ]
    names = kept["level"].where(kept["level"] != "site", "site:" + kept["site"].astype(str))
    found: dict[str, dict[str, float]] = {}
    for run, name, value in zip(kept["run"].astype(str), names, kept["value"].astype(float), strict=True):
        found.setdefault(run, {})[name] = value
    return found


def _sample(
    folder: Path, compare: CompareConfig, observed: Mapping[str, float], drawn: dict[str, list[Rows]]
) -> Sample:
    size = 1 + num_replicates(compare.metric)
    empty = {name: np.concatenate([[value], np.full(size - 1, np.nan)]) for name, value in observed.items()}
    try:
        sites, images = _rows(folder / "predictions.parquet", compare, size - 1, drawn)
    except ConsiliumError as error:
        return Sample(empty, None, error.what)
    except FileNotFoundError:
        return Sample(empty, None, "predictions.parquet is missing")
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        return Sample(empty, None, f"predictions.parquet cannot be read ({type(error).__name__})")
    if not sites:
        return Sample(empty, None, f"no predictions of the {compare.model} model on the {compare.split} split")
    resampled = _levels(sites, compare.metric)
    for name, value in observed.items():
        if np.isfinite(value) and name in resampled:
            empty[name][1:] = resampled[name][1:]
    return Sample(empty, images)


def _rows(path: Path, compare: CompareConfig, number: int, drawn: dict[str, list[Rows]]) -> tuple[list[Rows], str]:
    """The run's images by site with the draws that belong to these images."""
    where = [("split", "==", compare.split), ("model", "==", compare.model)]
    table = pd.read_parquet(path, filters=where)
    classes = [name[2:] for name in table.columns if name.startswith("p.")]
    sites = read(table, classes, 0, 0)
    images = hashlib.sha256("\n".join(_identities(table)).encode()).hexdigest()
    if images not in drawn:
        drawn[images] = read(table, classes, number, 0)
    return [replace(one, weights=other.weights) for one, other in zip(sites, drawn[images], strict=True)], images


def _identities(table: pd.DataFrame) -> list[str]:
    columns = [table[name].astype(str) for name in ("site", "id", "group", "label")]
    return sorted("\t".join(row) for row in zip(*columns, strict=True))


def _levels(sites: Sequence[Rows], metric: str) -> dict[str, Array]:
    """As in `consilium.metrics`: mean and worst are over the sites where the metric is defined."""
    measure = _by_counts if _additive(metric) else _by_images
    per_site = [measure([site], metric) for site in sites]
    known = [values for values in per_site if np.isfinite(values[0])]
    found = {f"site:{site.site}": values for site, values in zip(sites, per_site, strict=True)}
    found["pooled"] = measure(sites, metric)
    if known:
        sign = -1 if metric in LOWER_IS_BETTER else 1
        found["mean"] = np.mean(known, axis=0)
        found["worst"] = sign * np.min(sign * np.stack(known), axis=0)
    return found


def _by_images(sites: Sequence[Rows], metric: str) -> Array:
    return replicates(sites)[metric]


def _by_counts(sites: Sequence[Rows], metric: str) -> Array:
    """Recalls from counts per group: images and hits of each class."""
    classes = sites[0].classes
    sums = np.sum([site.weights @ _counts(site) for site in sites], axis=0)
    positives, hits = np.split(sums, 2, axis=1)
    recall = divide(hits, positives)
    if metric == "accuracy":
        return divide(hits.sum(axis=1), positives.sum(axis=1))
    if metric == "balanced_accuracy_declared":
        return np.asarray(recall.mean(axis=1))
    if metric == "balanced_accuracy":
        return divide(np.nansum(recall, axis=1), (~np.isnan(recall)).sum(axis=1))
    return np.asarray(recall[:, classes.index(metric.partition(".")[2])])


def _counts(site: Rows) -> Array:
    """Images and hits of each class by group, [groups, 2 C]; NaN where the model gave no finite numbers."""
    truth = np.eye(len(site.classes))[site.labels]
    hit = np.nan_to_num(site.probabilities).argmax(axis=1) == site.labels
    counts = np.zeros((site.weights.shape[1], 2 * len(site.classes)))
    np.add.at(counts, site.groups, np.concatenate([truth, truth * hit[:, None]], axis=1))
    return counts * np.nan if site.broken else counts


def problems(found: Mapping[str, Sample]) -> list[str]:
    """One sentence per reason for which runs have no replicates."""
    reasons: dict[str, list[str]] = {}
    for run, sample in found.items():
        if sample.problem:
            reasons.setdefault(sample.problem, []).append(run)
    return [f"{len(runs)} runs have no resampled patients: {why} ({_few(runs)})" for why, runs in reasons.items()]


def _few(names: Sequence[Any]) -> str:
    return ", ".join(str(name) for name in names[:3]) + (" ..." if len(names) > 3 else "")
