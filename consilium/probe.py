"""Common: what a linear probe can tell. In: features, a class and a group per row. Out: its balanced accuracy, tested.

The probe is multinomial logistic regression on standardised features, every class counting alike, with a squared
penalty of fixed strength: nothing is tuned. It is fitted on all folds but one and asked on that one; a group (patient)
is never on both sides. Intervals resample whole groups within each class and leave the fitted probes as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from consilium import seeds

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
FOLDS = 5
PENALTY = 0.01  # lambda of (lambda / 2) ||W||^2 beside the mean loss; scikit-learn's C is 1 / (lambda n)
_STEPS = 200


@dataclass(frozen=True)
class Question:
    """Which of `num` classes each of n rows belongs to. `folds` [n]; `weights` [1 + replicates, n]: how often each
    replicate drew the row's group, row 0 the observed sample."""

    labels: IntArray
    num: int
    folds: IntArray
    weights: Array

    @staticmethod
    def of(labels: IntArray, groups: Sequence[str], num: int, bootstrap: int, seed: int) -> Question:
        """Draws come from the seed alone. Every class must have at least two groups."""
        return Question(labels, num, folds(labels, groups, seed), replicates(labels, groups, bootstrap, seed))

    def balanced_accuracy(self, features: Tensor) -> Array:
        """[1 + replicates]: the mean over classes of the share of rows that a probe of features [n, D] gets right."""
        right, shares = self._right(features, self.labels), []
        for c in range(self.num):
            weights = self.weights[:, self.labels == c]
            shares.append(weights @ right[self.labels == c] / weights.sum(axis=1))
        return np.asarray(np.mean(shares, axis=0))

    def control(self, features: Tensor, exchanged: IntArray) -> float:
        """The same for other classes of the same rows, see `shuffled`; without replicates."""
        right = self._right(features, exchanged)
        return float(np.mean([right[exchanged == c].mean() for c in np.unique(exchanged)]))

    def _right(self, features: Tensor, labels: IntArray) -> Array:
        """1 where a probe that has not seen the row's fold says its class, else 0."""
        found = np.zeros_like(labels)
        for fold in np.unique(self.folds):
            there = self.folds == fold
            mean, spread = standard(features[~there])
            probe = fitted((features[~there] - mean) / spread, torch.from_numpy(labels[~there]), self.num)
            scores = torch.nn.functional.pad((features[there] - mean) / spread, (0, 1), value=1.0) @ probe
            found[there] = scores.argmax(dim=1).numpy()
        return np.where(found == labels, 1.0, 0.0)


def folds(labels: IntArray, groups: Sequence[str], seed: int) -> IntArray:
    """The fold of every row: the groups of a class are dealt out in turn, in a drawn order, so that each fold has all
    classes; a group that stands in two classes goes with the first."""
    draw = seeds.numpy_generator(seed, purpose="probe/folds")
    number = max(2, min(FOLDS, *_groups_of_classes(labels, groups).values()))
    fold_of: dict[str, int] = {}
    at = 0
    for c in sorted(set(labels.tolist())):
        own = sorted({group for group, label in zip(groups, labels, strict=True) if label == c} - fold_of.keys())
        for index in draw.permutation(len(own)):
            fold_of[own[index]] = at % number
            at += 1
    return np.array([fold_of[group] for group in groups], dtype=np.int64)


def _groups_of_classes(labels: IntArray, groups: Sequence[str]) -> Counter[int]:
    return Counter(int(label) for label, _ in set(zip(labels.tolist(), groups, strict=True)))


def replicates(labels: IntArray, groups: Sequence[str], count: int, seed: int) -> Array:
    """[1 + count, n]: ones, then how often each replicate drew a row's group, whole groups within each class."""
    draw, found = seeds.numpy_generator(seed, purpose="probe/bootstrap"), np.ones((1 + count, len(labels)))
    for c in sorted(set(labels.tolist())):
        rows = np.flatnonzero(labels == c)
        names, places = np.unique([groups[int(row)] for row in rows], return_inverse=True)
        drawn = draw.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
        found[1:, rows] = drawn[:, places]
    return found


def shuffled(labels: IntArray, groups: Sequence[str], seed: int, number: int) -> IntArray:
    """The classes of whole groups, exchanged at random: what a probe can tell of these is chance."""
    first = {group: int(label) for group, label in reversed(list(zip(groups, labels, strict=True)))}
    names = sorted(first)
    order = seeds.numpy_generator(seed, round=number, purpose="probe/shuffle").permutation(len(names))
    exchanged = {name: first[names[at]] for name, at in zip(names, order, strict=True)}
    return np.array([exchanged[group] for group in groups], dtype=np.int64)


def standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread [D] of every feature, float64; one that never varies is left as it is."""
    values = features.double()
    spread = values.std(dim=0, correction=0)
    return values.mean(dim=0), torch.where(spread > 1e-9, spread, 1.0)


def fitted(features: Tensor, labels: Tensor, num: int) -> Tensor:
    """[D + 1, num]: weights and, last, biases of the logistic regression of labels [n] on features [n, D], float64."""
    x = torch.nn.functional.pad(features.double(), (0, 1), value=1.0)
    sizes = torch.bincount(labels, minlength=num).double()
    alike = torch.where(sizes > 0, len(labels) / ((sizes > 0).sum() * sizes.clamp_min(1)), 0.0)
    probe = torch.zeros(x.shape[1], num, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([probe], max_iter=_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ probe, labels, alike, reduction="sum") / len(labels)
        loss = loss + PENALTY / 2 * probe[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return probe.detach()
