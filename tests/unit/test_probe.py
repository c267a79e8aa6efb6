"""The linear probe: against scikit-learn, and what it may and may not learn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from consilium import probe
from consilium.probe import Question

COUNT, WIDTH = 120, 6


def _labels() -> np.ndarray:
    return np.arange(COUNT, dtype=np.int64) % 3


def _groups(labels: np.ndarray, size: int = 2) -> list[str]:
    """Each of `size` images of one class."""
    seen = dict.fromkeys(range(3), 0)
    found = []
    for label in labels.tolist():
        found.append(f"{label}/{seen[label] // size}")
        seen[label] += 1
    return found


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _question(labels: np.ndarray, groups: list[str], bootstrap: int = 50) -> Question:
    return Question.of(labels, groups, 3, bootstrap, seed=4)


def test_it_is_the_logistic_regression_of_scikit_learn() -> None:
    labels = np.array([0] * 60 + [1] * 40 + [2] * 20)
    features = _noise(1, COUNT, WIDTH) + torch.from_numpy(labels)[:, None] * torch.linspace(0, 1, WIDTH)
    mean, spread = probe.standard(features)
    x = (features - mean) / spread
    found = probe.fitted(x, torch.from_numpy(labels), 3)
    peer = LogisticRegression(C=1 / (probe.PENALTY * COUNT), class_weight="balanced", tol=1e-10, max_iter=5000)
    peer.fit(x.numpy(), labels)
    np.testing.assert_allclose(found[:-1].T.numpy(), peer.coef_, atol=1e-4)
    biases = found[-1].numpy() - found[-1].numpy().mean()
    np.testing.assert_allclose(biases, peer.intercept_ - peer.intercept_.mean(), atol=1e-4)


def test_a_group_stands_in_one_fold_and_every_fold_has_every_class() -> None:
    labels = _labels()
    groups = [*_groups(labels)[:-1], "0/0"]  # the last image of class 2 shows a patient of class 0
    found = probe.folds(labels, groups, seed=1)
    of_group = {group: {f for f, g in zip(found, groups, strict=True) if g == group} for group in groups}
    assert all(len(each) == 1 for each in of_group.values())
    assert {frozenset(labels[found == fold]) for fold in range(probe.FOLDS)} == {frozenset({0, 1, 2})}
    few = np.array([0, 0, 1, 1, 1, 2, 2, 2])
    assert set(probe.folds(few, list("abcdefgh"), seed=1)) == {0, 1}, "as many as the smallest class has groups"


def test_what_tells_classes_apart_is_told_and_noise_is_not() -> None:
    labels, groups = _labels(), _groups(_labels())
    question = _question(labels, groups)
    plain = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).float() + 0.1 * _noise(2, COUNT, 3)
    assert question.balanced_accuracy(plain)[0] == 1.0
    assert abs(question.balanced_accuracy(_noise(3, COUNT, WIDTH))[0] - 1 / 3) < 0.15
    assert abs(question.control(plain, probe.shuffled(labels, groups, 4, 1)) - 1 / 3) < 0.2
    assert question.balanced_accuracy(torch.zeros(COUNT, 2))[0] == pytest.approx(1 / 3), "nothing varies"


def test_it_cannot_learn_patients_by_heart() -> None:
    """Features that name the patient alone: told perfectly where images of one patient stand on both sides."""
    labels = _labels()
    groups = _groups(labels, size=10)
    names = sorted(set(groups))
    features = torch.nn.functional.one_hot(torch.tensor([names.index(g) for g in groups]), len(names)).float()
    question = _question(labels, groups)
    assert question.balanced_accuracy(features)[0] < 0.5
    rows = [str(row) for row in range(COUNT)]
    careless = Question(labels, 3, probe.folds(labels, rows, 4), question.weights)
    assert careless.balanced_accuracy(features)[0] == 1.0


def test_held_out_rows_are_standardised_by_those_that_were_fitted() -> None:
    """Each fold lies elsewhere and on another scale: by its own or all rows' it would look alike."""
    labels, groups = _labels(), _groups(_labels())
    question = _question(labels, groups)
    away = torch.from_numpy(question.folds)[:, None].double()
    told = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).double()
    features = (told + 0.8 * _noise(6, COUNT, 3).double()) * (1 + 2 * away) + 3 * away
    right = np.zeros(COUNT)
    for fold in np.unique(question.folds):
        there = question.folds == fold
        scaler = StandardScaler().fit(features[~there].numpy())
        size = int((~there).sum())
        peer = LogisticRegression(C=1 / (probe.PENALTY * size), class_weight="balanced", tol=1e-10, max_iter=5000)
        peer.fit(scaler.transform(features[~there].numpy()), labels[~there])
        right[there] = peer.predict(scaler.transform(features[there].numpy())) == labels[there]
    wanted = np.mean([right[labels == c].mean() for c in range(3)])
    assert question.balanced_accuracy(features)[0] == pytest.approx(wanted, abs=1e-12)
    assert 0.4 < wanted < 0.95, "a question with right and wrong answers"


def test_a_class_counts_by_its_share_and_not_by_its_images() -> None:
    labels = np.array([0] * 100 + [1] * 10 + [2] * 10)
    question = _question(labels, [str(row) for row in range(COUNT)])
    always = torch.zeros(COUNT, 1)
    always[:100] = 5 + _noise(1, 100, 1)
    assert question.balanced_accuracy(always)[0] == pytest.approx(2 / 3, abs=0.17)


def test_replicates_draw_whole_groups_of_each_class() -> None:
    labels, groups = _labels(), _groups(_labels(), size=4)
    weights = probe.replicates(labels, groups, 30, seed=2)
    assert (weights[0] == 1).all()
    assert weights.shape == (31, COUNT)
    for group in set(groups):
        of_group = weights[:, [g == group for g in groups]]
        assert (of_group == of_group[:, :1]).all()
    for c in range(3):
        assert (weights[:, labels == c].sum(axis=1) == (labels == c).sum()).all(), "as many groups as there are"
    again = probe.replicates(labels, groups, 30, seed=2)
    assert (weights == again).all()
    assert not (weights == probe.replicates(labels, groups, 30, seed=3)).all()


def test_exchanged_classes_are_of_whole_groups_and_as_many() -> None:
    labels, groups = _labels(), _groups(_labels(), size=4)
    found = probe.shuffled(labels, groups, seed=1, number=0)
    for group in set(groups):
        assert len({int(c) for c, g in zip(found, groups, strict=True) if g == group}) == 1
    assert sorted(found) == sorted(labels)
    assert not (found == probe.shuffled(labels, groups, seed=1, number=1)).all()
