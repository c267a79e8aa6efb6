"""Common: metrics with intervals. In: a table of predictions. Out: metric -> pooled, mean, worst, per site, with n.

What is measured, and what is undefined, stands in docs/decisions/0006-metrics-and-report.md. In short: what the test
images cannot show (the recall of a class without images) is None, never zero; intervals are 95 % percentile intervals
of a bootstrap that resamples whole groups within each site; sites are fixed, not resampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from consilium import seeds
from consilium.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Array: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
Value: TypeAlias = dict[str, Any]  # {"value", "low", "high", "n"}; a mean has "sites" too, a worst has "site"
MetricTree: TypeAlias = dict[str, dict[str, Any]]

NUM_BINS = 15  # of the calibration error: equal width over [0, 1], Guo et al., ICML 2017, equation 3
LOWER_IS_BETTER = frozenset({"expected_calibration_error"})
_CHUNK = 4_000_000  # numbers per block of a replicate matrix, so that memory stays bounded


# ------------------------------------------------------------------------------------------------ public
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
    rows = _read(predictions, classes, bootstrap, seed, sites)
    per_site = [_replicates([site]) for site in rows]
    pooled = _replicates(rows) if rows else {}
    return {name: _entry(name, rows, [values[name] for values in per_site], pooled[name]) for name in pooled}


def quick_metrics(probabilities: Array, labels: IntArray) -> dict[str, float]:
    """Metrics without intervals of probabilities [n, C] and labels [n]; NaN where undefined. `loss` is mean -log p."""
    given, truth = np.asarray(probabilities, np.float64), np.asarray(labels, np.int64)
    one_group = np.zeros(len(truth), dtype=np.int64)
    rows = _Rows("", tuple(map(str, range(given.shape[1]))), given, truth, [], one_group, np.ones((1, 1)))
    values = {name: float(value[0]) for name, value in _replicates([rows]).items() if "." not in name}
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
    ours, theirs = (_read(table, classes, bootstrap, seed) for table in (first, second))
    _same_images(ours, theirs)
    per_site = [_replicates([one])[metric] - _replicates([two])[metric] for one, two in zip(ours, theirs, strict=True)]
    tree = _entry(metric, ours, per_site, _replicates(ours)[metric] - _replicates(theirs)[metric])
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
    its harm, whatever the interval. `count` and `count_negative` are their lengths; `difference` is {site: V}.
    """
    per_site = paired_difference(used, local, metric, classes, bootstrap=bootstrap, seed=seed)["per_site"]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    negative = [site for site, v in per_site.items() if v["value"] is not None and sign * v["value"] < 0]
    bound = "low" if metric in LOWER_IS_BETTER else "high"
    harmed = [site for site in negative if per_site[site][bound] is not None and sign * per_site[site][bound] < 0]
    return {
        "metric": metric,
        "count": len(harmed),
        "sites": harmed,
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
    for rows in _read(predictions, classes, 0, 0):
        finite = np.isfinite(rows.probabilities).all(axis=1)
        np.add.at(matrix, (rows.labels[finite], rows.probabilities[finite].argmax(axis=1)), 1)
    return matrix


def reliability(predictions: pd.DataFrame, classes: Sequence[str]) -> dict[str, Array]:
    """Bins of the calibration error: `n`, mean `confidence` and `accuracy`, each [NUM_BINS]; NaN in an empty bin."""
    table = np.zeros((NUM_BINS, 3))
    for rows in _read(predictions, classes, 0, 0):
        finite = np.isfinite(rows.probabilities).all(axis=1)
        confidence, correct = _confidence(rows.probabilities[finite], rows.labels[finite])
        np.add.at(table, _bin(confidence), np.stack([np.ones_like(confidence), confidence, correct], axis=1))
    n = table[:, 0]
    return {"n": n, "confidence": _divide(table[:, 1], n), "accuracy": _divide(table[:, 2], n)}


def without_nan(value: Any) -> Any:
    """The same tree with None for every number that is not finite, as JSON wants it."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------ rows of a site
@dataclass(frozen=True)
class _Rows:
    """One site's images, sorted by id, and how often each replicate drew their groups; row 0 is the observed sample."""

    site: str
    classes: tuple[str, ...]
    probabilities: Array  # [n, C]
    labels: IntArray  # [n]
    ids: Sequence[str]
    groups: IntArray  # [n], index of the image's group
    weights: Array  # [1 + replicates, num_groups]

    @property
    def broken(self) -> bool:
        """Whether the model gave a number that is not finite: then every metric that reads it is undefined."""
        return not bool(np.isfinite(self.probabilities).all())


def _read(
    predictions: pd.DataFrame, classes: Sequence[str], bootstrap: int, seed: int, sites: Sequence[str] = ()
) -> list[_Rows]:
    columns = [f"p.{name}" for name in classes]
    missing = [name for name in ("site", "id", "group", "label", *columns) if name not in predictions.columns]
    if missing:
        raise DataError(
            "the table of predictions lacks columns", allowed=f"site, id, group, label, {columns}", received=missing
        )
    labels = predictions["label"].to_numpy(np.int64)
    if len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
        raise DataError(
            "a label is no class", allowed=f"0 to {len(classes) - 1}", received=sorted(set(labels.tolist()))
        )
    names = predictions["site"].astype(str).to_numpy()
    return [_site_rows(predictions[names == site], site, classes, bootstrap, seed) for site in sorted({*names, *sites})]


def _site_rows(table: pd.DataFrame, site: str, classes: Sequence[str], bootstrap: int, seed: int) -> _Rows:
    table = table.sort_values("id", kind="stable")
    names, groups = np.unique(table["group"].astype(str).to_numpy(), return_inverse=True)
    return _Rows(
        site,
        tuple(classes),
        table[[f"p.{name}" for name in classes]].to_numpy(np.float64),
        table["label"].to_numpy(np.int64),
        table["id"].astype(str).tolist(),
        groups.astype(np.int64),
        _weights(len(names), bootstrap, seed, site),
    )


def _weights(num_groups: int, bootstrap: int, seed: int, site: str) -> Array:
    """How often each group is drawn, [1 + bootstrap, num_groups]: ones, then draws with replacement."""
    generator = seeds.numpy_generator(seed, site=site, purpose="bootstrap")
    drawn = generator.integers(0, max(1, num_groups), size=(bootstrap, num_groups))
    flat = (drawn + num_groups * np.arange(bootstrap)[:, None]).ravel()
    counts = np.bincount(flat, minlength=bootstrap * num_groups).reshape(bootstrap, num_groups)
    return np.concatenate([np.ones((1, num_groups)), counts.astype(np.float64)])


def _same_images(first: Sequence[_Rows], second: Sequence[_Rows]) -> None:
    for one, other in zip(first, second, strict=False):
        same = one.site == other.site and one.ids == other.ids
        if not same or not np.array_equal(one.groups, other.groups) or not np.array_equal(one.labels, other.labels):
            raise DataError("a paired difference needs the same images on both sides", where=f"site {one.site}")
    if len(first) != len(second):
        raise DataError("a paired difference needs the same sites on both sides", received=(len(first), len(second)))


# ------------------------------------------------------------------------------------------------ metrics of replicates
def _replicates(sites: Sequence[_Rows]) -> dict[str, Array]:
    """Every metric of these sites' images together, [1 + replicates] each; entry 0 is the observed value."""
    classes = sites[0].classes
    sums = np.sum([_sums(site) for site in sites], axis=0)
    n, correct, rest = sums[:, :1], sums[:, 1], sums[:, 2:]
    positives, hits, false_alarms, gaps = np.split(rest, np.cumsum([len(classes)] * 3), axis=1)
    sensitivity = _divide(hits, positives)
    specificity = 1 - _divide(false_alarms, n - positives)
    return {
        "balanced_accuracy": _mean_of_defined(sensitivity),
        "balanced_accuracy_declared": sensitivity.mean(axis=1),
        "macro_auroc": _macro_auroc(sites),
        "accuracy": _divide(correct, n[:, 0]),
        "expected_calibration_error": _divide(np.abs(gaps).sum(axis=1), n[:, 0]),
        **{f"sensitivity.{name}": sensitivity[:, index] for index, name in enumerate(classes)},
        **{f"specificity.{name}": specificity[:, index] for index, name in enumerate(classes)},
    }


def _sums(site: _Rows) -> Array:
    """Additive statistics [1 + replicates, 2 + 3 C + NUM_BINS]: n; correct; per class positives, hits and false alarms;
    per calibration bin the sum of confidence minus correctness."""
    n, num_classes = site.probabilities.shape
    safe = np.nan_to_num(site.probabilities)
    predicted = np.eye(num_classes)[safe.argmax(axis=1)]
    truth = np.eye(num_classes)[site.labels]
    confidence, correct = _confidence(safe, site.labels)
    gaps = np.zeros((n, NUM_BINS))
    gaps[np.arange(n), _bin(confidence)] = confidence - correct
    answers = [correct[:, None], truth, truth * predicted, predicted * (1 - truth), gaps]
    per_image = np.concatenate([np.ones((n, 1)), *answers], axis=1)
    per_group = np.zeros((site.weights.shape[1], per_image.shape[1]))
    np.add.at(per_group, site.groups, per_image)
    sums = site.weights @ per_group
    return sums * np.nan if site.broken else sums


def _confidence(probabilities: Array, labels: IntArray) -> tuple[Array, Array]:
    """Largest probability [n], and 1.0 where its class is the true one [n]."""
    return probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(np.float64)


def _bin(confidence: Array) -> IntArray:
    """Index of the calibration bin: equal width, closed on the right."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)


def _macro_auroc(sites: Sequence[_Rows]) -> Array:
    """Mean one-versus-rest AUROC over the classes that have images inside and outside; [1 + replicates]."""
    num_replicates = len(sites[0].weights)
    if any(site.broken for site in sites):
        return np.full(num_replicates, np.nan)
    probabilities = np.concatenate([site.probabilities for site in sites])
    labels = np.concatenate([site.labels for site in sites])
    step = max(1, _CHUNK // max(1, len(labels)))
    blocks = []
    for start in range(0, num_replicates, step):
        weights = np.concatenate([site.weights[start : start + step][:, site.groups] for site in sites], axis=1)
        per_class = [auroc(probabilities[:, c], labels == c, weights) for c in range(probabilities.shape[1])]
        blocks.append(_mean_of_defined(np.stack(per_class, axis=1)))
    return np.concatenate(blocks)


def auroc(scores: Array, positive: npt.NDArray[np.bool_], weights: Array) -> Array:
    """P(a positive scores higher than a negative) + half the ties, [R], per row of weights [R, n]; NaN if no pair."""
    if positive.all() or not positive.any():
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0]))
    drawn = weights[:, order]
    inside = np.add.reduceat(drawn * positive[order], starts, axis=1)
    outside = np.add.reduceat(drawn, starts, axis=1) - inside
    wins = (inside * (np.cumsum(outside, axis=1) - outside / 2)).sum(axis=1)
    return _divide(wins, inside.sum(axis=1) * outside.sum(axis=1))


def _divide(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, NaN where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def _mean_of_defined(values: Array) -> Array:
    """Mean over the columns that are not NaN; NaN where all are."""
    return _divide(np.nansum(values, axis=1), (~np.isnan(values)).sum(axis=1))


# ------------------------------------------------------------------------------------------------ values with intervals
def _entry(metric: str, sites: Sequence[_Rows], per_site: Sequence[Array], pooled: Array) -> dict[str, Any]:
    counts = [_support(metric, site) for site in sites]
    values = {site.site: _value(r, n, groups) for site, r, (n, groups) in zip(sites, per_site, counts, strict=True)}
    total = _value(pooled, sum(n for n, _ in counts), sum(groups for _, groups in counts))
    defined = [index for index, replicates in enumerate(per_site) if not np.isnan(replicates[0])]
    if not defined or any(site.broken for site in sites):
        nothing = _value(np.full(1, np.nan), 0, 0)
        return {
            "pooled": total,
            "mean": {**nothing, "sites": 0},
            "worst": {**nothing, "site": None},
            "per_site": values,
        }
    joint = np.stack([per_site[index] for index in defined])
    n, groups = sum(counts[i][0] for i in defined), min(counts[i][1] for i in defined)
    extreme = np.argmax if metric in LOWER_IS_BETTER else np.argmin
    where = defined[int(extreme(joint[:, 0]))]
    worst = _value(joint.max(axis=0) if metric in LOWER_IS_BETTER else joint.min(axis=0), counts[where][0], groups)
    mean = {**_value(joint.mean(axis=0), n, groups), "sites": len(defined)}
    return {"pooled": total, "mean": mean, "worst": {**worst, "site": sites[where].site}, "per_site": values}


def _support(metric: str, site: _Rows) -> tuple[int, int]:
    """How many images, and how many groups, a metric is computed from."""
    kind, _, name = metric.partition(".")
    used = np.ones(len(site.labels), dtype=bool)
    if kind in ("sensitivity", "specificity"):
        used = (site.labels == site.classes.index(name)) == (kind == "sensitivity")
    return int(used.sum()), len(np.unique(site.groups[used]))


def _value(replicates: Array, n: int, num_groups: int) -> Value:
    """Observed value with its interval: none from fewer than two groups, nor where most replicates lack the value."""
    drawn = replicates[1:][np.isfinite(replicates[1:])]
    known = np.isfinite(replicates[0]) and num_groups > 1 and len(drawn) and 2 * len(drawn) >= len(replicates) - 1
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if known else (None, None)
    value = float(replicates[0])
    return {"value": value if math.isfinite(value) else None, "low": low, "high": high, "n": n}
