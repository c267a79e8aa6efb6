"""Common: metrics with intervals. In: a table of predictions. Out: metric -> pooled, mean, worst, per site, with n.

What is measured, and what is undefined, stands in docs/decisions/0006-metrics-and-report.md. In short: what the test
images cannot show (the recall of a class without images) is None, never zero; intervals are 95 % percentile intervals
of a bootstrap that resamples whole groups within each site; sites are fixed, not resampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from consilium.bootstrap import (
    NUM_BINS,
    Array,
    IntArray,
    Rows,
    calibration_bin,
    confidence_of,
    divide,
    read,
    replicates,
)
from consilium.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Value: TypeAlias = dict[str, Any]  # {"value", "low", "high", "n"}; a mean has "sites" too, a worst has "site"
MetricTree: TypeAlias = dict[str, dict[str, Any]]

LOWER_IS_BETTER = frozenset({"expected_calibration_error"})


def metric_tree(
    predictions: pd.DataFrame,
    classes: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    sites: Sequence[str] = (),
) -> MetricTree:
    """All metrics of one split and model: {metric: {"pooled", "mean", "worst": V, "per_site": {site: V}}}.

    Columns: site, id, group, label (class index) and `p.<class>` for every class. V is {"value", "low", "high", "n"};
    what is undefined is None. `sites` appear even where they have no rows. Raises DataError for a missing column or a
    label that is no class.
    """
    rows = read(predictions, classes, bootstrap, seed, sites)
    per_site = [centred(replicates([site])) for site in rows]
    pooled = centred(replicates(rows)) if rows else {}
    return {name: _entry(name, rows, [values[name] for values in per_site], pooled[name]) for name in pooled}


def quick_metrics(probabilities: Array, labels: IntArray) -> dict[str, float]:
    """Metrics without intervals of probabilities [n, C] and labels [n]; NaN where undefined. `loss` is mean -log p."""
    given, truth = np.asarray(probabilities, np.float64), np.asarray(labels, np.int64)
    rows = Rows.single(given, truth, [str(index) for index in range(given.shape[1])])
    values = {name: float(value[0]) for name, value in replicates([rows]).items() if "." not in name}
    likelihood = given[np.arange(len(truth)), truth]
    return {**values, "loss": float(-np.log(np.maximum(likelihood, 1e-12)).mean()) if len(truth) else math.nan}


def paired_difference(
    first: pd.DataFrame,
    second: pd.DataFrame,
    metric: str,
    classes: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`first` minus `second` in one metric on the same images: {"pooled", "mean": V, "per_site": {site: V}}.

    Each replicate draws the same groups for both. Raises DataError where they are not about the same images.
    """
    _known(metric, classes)
    ours, theirs = (read(table, classes, bootstrap, seed) for table in (first, second))
    _same_images(ours, theirs)
    per_site = [replicates([one])[metric] - replicates([two])[metric] for one, two in zip(ours, theirs, strict=True)]
    pooled = replicates(ours)[metric] - replicates(theirs)[metric]
    tree = _entry(metric, [one if one.broken else two for one, two in zip(ours, theirs, strict=True)], per_site, pooled)
    return {part: tree[part] for part in ("pooled", "mean", "per_site")}


def sites_harmed(
    used: pd.DataFrame,
    local: pd.DataFrame,
    classes: Sequence[str],
    *,
    metric: str = "balanced_accuracy",
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Sites that the federation made worse than training alone, by the paired difference of `used` and `local`.

    `sites`: the difference is to the site's harm and its interval excludes zero. `negative`: the point difference is to
    its harm, whatever the interval. `undetermined`: the difference has no interval, so harm is unknown. `count` and
    `count_negative` are lengths, `count` None where no site is determined; `difference` is {site: V}.
    """
    per_site = paired_difference(used, local, metric, classes, bootstrap=bootstrap, seed=seed)["per_site"]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    negative = [site for site, v in per_site.items() if v["value"] is not None and sign * v["value"] < 0]
    bound = "low" if metric in LOWER_IS_BETTER else "high"
    harmed = [site for site in negative if per_site[site][bound] is not None and sign * per_site[site][bound] < 0]
    undetermined = [site for site, v in per_site.items() if v[bound] is None]
    return {
        "metric": metric,
        "count": len(harmed) if len(undetermined) < len(per_site) else None,
        "sites": harmed,
        "undetermined": undetermined,
        "count_negative": len(negative),
        "negative": negative,
        "difference": per_site,
    }


def majority_baseline(
    train_counts: Mapping[str, Sequence[int]],
    predictions: pd.DataFrame,
    classes: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> MetricTree:
    """Metrics of always answering with the most frequent training class of the site; `train_counts` {site: [C]}.

    A site without training images answers with the federation's most frequent class; ties go to the first class.
    """
    total = np.sum([np.asarray(counts) for counts in train_counts.values()], axis=0)
    votes = {site: int(np.argmax(counts if np.sum(counts) else total)) for site, counts in train_counts.items()}
    answers = np.array([votes.get(str(site), int(np.argmax(total))) for site in predictions["site"]], dtype=np.int64)
    certain = {f"p.{name}": (answers == index).astype(np.float64) for index, name in enumerate(classes)}
    return metric_tree(predictions.assign(**certain), classes, bootstrap=bootstrap, seed=seed)


def confusion_matrix(predictions: pd.DataFrame, classes: Sequence[str]) -> IntArray:
    """Counts [C, C]: rows the true class, columns the class of largest probability; non-finite rows are left out."""
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for rows in read(predictions, classes, 0, 0):
        finite = np.isfinite(rows.probabilities).all(axis=1)
        np.add.at(matrix, (rows.labels[finite], rows.probabilities[finite].argmax(axis=1)), 1)
    return matrix


def reliability(predictions: pd.DataFrame, classes: Sequence[str]) -> dict[str, Array]:
    """Bins of the calibration error: `n`, mean `confidence` and `accuracy`, each [NUM_BINS]; NaN in an empty bin."""
    table = np.zeros((NUM_BINS, 3))
    for rows in read(predictions, classes, 0, 0):
        finite = np.isfinite(rows.probabilities).all(axis=1)
        confidence, correct = confidence_of(rows.probabilities[finite], rows.labels[finite])
        np.add.at(table, calibration_bin(confidence), np.stack([np.ones_like(confidence), confidence, correct], axis=1))
    n = table[:, 0]
    return {"n": n, "confidence": divide(table[:, 1], n), "accuracy": divide(table[:, 2], n)}


def without_nan(value: Any) -> Any:
    """The same tree with None for every number that is not finite, as JSON wants it."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _entry(metric: str, sites: Sequence[Rows], per_site: Sequence[Array], pooled: Array) -> dict[str, Any]:
    support = [_support(metric, site) for site in sites]
    values = {site.site: interval(draws, *of) for site, draws, of in zip(sites, per_site, support, strict=True)}
    total = interval(pooled, sum(n for n, _ in support), sum(groups for _, groups in support))
    defined = [index for index, draws in enumerate(per_site) if not np.isnan(draws[0])]
    if any(site.broken for site in sites):
        defined = []  # a mean without the site where the model broke would hide that it broke
    return {"pooled": total, **_over_sites(metric, sites, per_site, support, defined), "per_site": values}


def centred(drawn: dict[str, Array]) -> dict[str, Array]:
    """Resampling adds to the gaps of a calibration error; its replicates are shifted back, to have it as median."""
    error = drawn["expected_calibration_error"]
    known = error[1:][np.isfinite(error[1:])]
    shift = np.median(known) - error[0] if len(known) else 0.0
    return {**drawn, "expected_calibration_error": np.append(error[:1], np.clip(error[1:] - shift, 0, 1))}


def _over_sites(
    metric: str,
    sites: Sequence[Rows],
    per_site: Sequence[Array],
    support: Sequence[tuple[int, int]],
    defined: Sequence[int],
) -> dict[str, Value]:
    """Unweighted mean and worst over the sites where the metric is defined; no interval unless each of them has one."""
    if not defined:
        nothing = interval(np.full(1, np.nan), 0, 0)
        return {"mean": {**nothing, "sites": 0}, "worst": {**nothing, "site": None}}
    joint = np.stack([per_site[index] for index in defined])
    n, groups = sum(support[i][0] for i in defined), min(support[i][1] for i in defined)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    worst = defined[int(np.argmin(sign * joint[:, 0]))]
    return {
        "mean": {**interval(joint.mean(axis=0), n, groups), "sites": len(defined)},
        "worst": {**interval(sign * (sign * joint).min(axis=0), support[worst][0], groups), "site": sites[worst].site},
    }


def _support(metric: str, site: Rows) -> tuple[int, int]:
    """How many images, and how many groups, a metric is computed from."""
    kind, _, name = metric.partition(".")
    used = np.ones(len(site.labels), dtype=bool)
    if kind in ("sensitivity", "specificity"):
        used = (site.labels == site.classes.index(name)) == (kind == "sensitivity")
    return int(used.sum()), len(np.unique(site.groups[used]))


def interval(draws: Array, n: int, num_groups: int) -> Value:
    """Observed value with its interval: none from fewer than two groups, nor where most replicates lack the value."""
    finite = draws[1:][np.isfinite(draws[1:])]
    known = np.isfinite(draws[0]) and num_groups > 1 and len(finite) and 2 * len(finite) >= len(draws) - 1
    low, high = np.percentile(finite, [2.5, 97.5]).tolist() if known else (None, None)
    value = float(draws[0])
    return {"value": value if math.isfinite(value) else None, "low": low, "high": high, "n": n}


def _known(metric: str, classes: Sequence[str]) -> None:
    names = list(replicates([Rows.single(np.ones((1, len(classes))), np.zeros(1, np.int64), classes)]))
    if metric not in names:
        raise DataError("no metric of this name", allowed=", ".join(names), received=metric)


def _same_images(first: Sequence[Rows], second: Sequence[Rows]) -> None:
    if [site.site for site in first] != [site.site for site in second]:
        raise DataError("a paired difference needs the same sites on both sides")
    for one, other in zip(first, second, strict=True):
        same = one.ids == other.ids and np.array_equal(one.groups, other.groups)
        if not same or not np.array_equal(one.labels, other.labels):
            raise DataError("a paired difference needs the same images on both sides", where=f"site {one.site}")
