"""Common: replicates of the metrics. In: a table of predictions. Out: every metric, observed and under each resampling.

A replicate draws whole groups with replacement within each site. Nearly all metrics are functions of sums over images,
so that all replicates are one matrix product; only the AUROC needs the images in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from consilium import seeds
from consilium.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Array: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

NUM_BINS = 15  # of the calibration error: equal width over [0, 1], Guo et al., ICML 2017, equation 3
_CHUNK = 4_000_000  # numbers per block of a replicate matrix, so that memory stays bounded


@dataclass(frozen=True)
class Rows:
    """One site's images, sorted by id, and how often each replicate drew their groups; row 0 is the observed sample."""

    site: str
    classes: tuple[str, ...]
    probabilities: Array  # [n, C]
    labels: IntArray  # [n]
    ids: Sequence[str]
    groups: IntArray  # [n], index of the image's group
    weights: Array  # [1 + replicates, num_groups]

    @staticmethod
    def single(probabilities: Array, labels: IntArray, classes: Sequence[str]) -> Rows:
        """Images without site, ids and groups, and no bootstrap."""
        return Rows("", tuple(classes), probabilities, labels, [], np.zeros_like(labels), np.ones((1, 1)))

    @property
    def broken(self) -> bool:
        """Whether the model gave a number that is not finite: then every metric that reads it is undefined."""
        return not bool(np.isfinite(self.probabilities).all())


@dataclass(frozen=True)
class Table:
    """All images of a table, sorted by id; taken apart once, as a frame is slow to cut into many small ones."""

    probabilities: Array  # [n, C]
    labels: IntArray  # [n]
    groups: npt.NDArray[np.object_]  # [n] text
    ids: npt.NDArray[np.object_]  # [n] text


def read(
    predictions: pd.DataFrame, classes: Sequence[str], bootstrap: int, seed: int, sites: Sequence[str] = ()
) -> list[Rows]:
    """The table by site, sorted by name; `sites` are there even without rows. DataError for what cannot be read."""
    columns = [f"p.{name}" for name in classes]
    missing = [name for name in ("site", "id", "group", "label", *columns) if name not in predictions.columns]
    if missing:
        raise DataError("the table of predictions lacks columns", received=missing)
    labels = predictions["label"].to_numpy(np.int64)
    if len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
        found = sorted(set(labels.tolist()))
        raise DataError("a label is no class", allowed=f"0 to {len(classes) - 1}", received=found)
    table = predictions.sort_values("id", kind="stable")
    names, groups, ids = (table[name].astype(str).to_numpy(object) for name in ("site", "group", "id"))
    whole = Table(table[columns].to_numpy(np.float64), table["label"].to_numpy(np.int64), groups, ids)
    places = {site: np.flatnonzero(names == site) for site in sorted({*names, *sites})}
    return [_site_rows(whole, at, site, classes, bootstrap, seed) for site, at in places.items()]


def _site_rows(whole: Table, at: IntArray, site: str, classes: Sequence[str], bootstrap: int, seed: int) -> Rows:
    names, groups = np.unique(whole.groups[at], return_inverse=True)
    labels = whole.labels[at]
    return Rows(
        site,
        tuple(classes),
        whole.probabilities[at],
        labels,
        whole.ids[at].tolist(),
        groups.astype(np.int64),
        _weights(_strata(groups, labels, len(names), len(classes)), bootstrap, seed, site),
    )


def _strata(groups: IntArray, labels: IntArray, num_groups: int, num_classes: int) -> IntArray:
    """Number of each group's stratum: groups with the same set of classes are alike."""
    held = np.zeros((num_groups, num_classes), dtype=bool)
    held[groups, labels] = True
    return np.unique(held, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _weights(strata: IntArray, bootstrap: int, seed: int, site: str) -> Array:
    """How often each group is drawn, [1 + bootstrap, num_groups]: ones, then draws with replacement in each stratum.

    A replicate thus holds every class of the sample. Drawn over all groups, one that misses a rare class would average
    over fewer recalls: the interval of a classifier that always answers the same would reach far above its 1 / C.
    """
    generator = seeds.numpy_generator(seed, site=site, purpose="bootstrap")
    weights = np.ones((1 + bootstrap, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[1:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), bootstrap)
    return weights


def replicates(sites: Sequence[Rows]) -> dict[str, Array]:
    """Every metric of these sites' images together, [1 + replicates] each; entry 0 is the observed value."""
    classes = sites[0].classes
    sums = np.sum([_sums(site) for site in sites], axis=0)
    n, correct, rest = sums[:, :1], sums[:, 1], sums[:, 2:]
    positives, hits, false_alarms, gaps = np.split(rest, np.cumsum([len(classes)] * 3), axis=1)
    sensitivity = divide(hits, positives)
    specificity = 1 - divide(false_alarms, n - positives)
    return {
        "balanced_accuracy": _mean_of_defined(sensitivity),
        "balanced_accuracy_declared": sensitivity.mean(axis=1),
        "macro_auroc": _macro_auroc(sites),
        "accuracy": divide(correct, n[:, 0]),
        "expected_calibration_error": divide(np.abs(gaps).sum(axis=1), n[:, 0]),
        **{f"sensitivity.{name}": sensitivity[:, index] for index, name in enumerate(classes)},
        **{f"specificity.{name}": specificity[:, index] for index, name in enumerate(classes)},
    }


def _sums(site: Rows) -> Array:
    """Additive statistics [1 + replicates, 2 + 3 C + NUM_BINS]: n; correct; per class positives, hits and false alarms;
    per calibration bin the sum of confidence minus correctness."""
    n, num_classes = site.probabilities.shape
    safe = np.nan_to_num(site.probabilities, posinf=0, neginf=0)
    predicted = np.eye(num_classes)[safe.argmax(axis=1)]
    truth = np.eye(num_classes)[site.labels]
    confidence, correct = confidence_of(safe, site.labels)
    gaps = np.zeros((n, NUM_BINS))
    gaps[np.arange(n), calibration_bin(confidence)] = confidence - correct
    answers = [correct[:, None], truth, truth * predicted, predicted * (1 - truth), gaps]
    per_image = np.concatenate([np.ones((n, 1)), *answers], axis=1)
    per_group = np.zeros((site.weights.shape[1], per_image.shape[1]))
    np.add.at(per_group, site.groups, per_image)
    sums = site.weights @ per_group
    return sums * np.nan if site.broken else sums


def confidence_of(probabilities: Array, labels: IntArray) -> tuple[Array, Array]:
    """Largest probability [n], and 1.0 where its class is the true one [n]."""
    return probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(np.float64)


def calibration_bin(confidence: Array) -> IntArray:
    """Index of the calibration bin: equal width, closed on the right."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)


def _macro_auroc(sites: Sequence[Rows]) -> Array:
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
    return divide(wins, inside.sum(axis=1) * outside.sum(axis=1))


def divide(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, NaN where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def _mean_of_defined(values: Array) -> Array:
    """Mean over the columns that are not NaN; NaN where all are."""
    return divide(np.nansum(values, axis=1), (~np.isnan(values)).sum(axis=1))
