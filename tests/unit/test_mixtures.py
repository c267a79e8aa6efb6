"""Mixtures and the linear head against scikit-learn, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from torch import Tensor

from consilium import mixtures
from consilium.mixtures import Covariance, Mixture

NAMES: dict[Covariance, str] = {"spherical": "spherical", "diagonal": "diag", "full": "full"}
KINDS = tuple(NAMES)
CLOSE = {"rtol": 0, "atol": 1e-9}


def blobs(n: int = 60, width: int = 4, seed: int = 0) -> Tensor:
    """Three clouds that overlap, stretched along an axis."""
    draw = np.random.default_rng(seed)
    middles = draw.normal(0, 2, (3, width))
    return torch.from_numpy(middles[np.arange(n) % 3] + draw.normal(size=(n, width)) * np.linspace(0.5, 1.5, width))


def covariances(mixture: Mixture) -> np.ndarray:
    """As scikit-learn has them."""
    if not mixture.full:
        return mixture.spreads.square().numpy()
    roots = mixtures.unpacked(mixture.spreads, mixture.means.shape[1])
    return (roots @ roots.mT).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_expectation_maximisation_are_scikit_learns(kind: Covariance) -> None:
    x, floor = blobs(), 1e-3
    generator = torch.Generator().manual_seed(4)
    found = mixtures.maximised(x, mixtures.clusters(x, 3, generator), kind, floor)
    inverse = np.linalg.inv(covariances(found)) if kind == "full" else 1 / covariances(found)
    start = {"weights_init": found.weights.numpy(), "means_init": found.means.numpy(), "precisions_init": inverse}
    theirs = GaussianMixture(3, covariance_type=NAMES[kind], reg_covar=floor, tol=0, max_iter=7, **start)
    with pytest.warns(UserWarning, match="did not converge"):
        theirs.fit(x.numpy())
    for _ in range(7):
        found = mixtures.maximised(x, found.log_likelihoods(x).softmax(dim=1), kind, floor)
    np.testing.assert_allclose(found.weights, theirs.weights_, **CLOSE)
    np.testing.assert_allclose(found.means, theirs.means_, **CLOSE)
    np.testing.assert_allclose(covariances(found), theirs.covariances_, **CLOSE)
    np.testing.assert_allclose(found.log_likelihoods(x).logsumexp(dim=1), theirs.score_samples(x.numpy()), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_is_as_likely_as_scikit_learns(kind: Covariance) -> None:
    x, ours, theirs = blobs(90), [], []
    for seed in range(5):
        found = mixtures.fit(x, 3, kind, 1e-6, torch.Generator().manual_seed(seed)).log_likelihoods(x)
        ours.append(float(found.logsumexp(dim=1).mean()))
        theirs.append(
            GaussianMixture(3, covariance_type=NAMES[kind], random_state=seed).fit(x.numpy()).score(x.numpy())
        )
    assert np.mean(ours) > np.mean(theirs) - 0.02
    assert np.max(ours) == pytest.approx(np.max(theirs), abs=0.02)
    found = mixtures.fit(x, 3, kind, 1e-6, torch.Generator().manual_seed(0)).log_likelihoods(x)
    again = mixtures.fit(x, 3, kind, 1e-6, torch.Generator().manual_seed(0)).log_likelihoods(x)
    assert torch.equal(found, again)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_mixtures_moments(kind: Covariance) -> None:
    x = blobs()
    fitted = mixtures.fit(x, 1, kind, 1e-6, torch.Generator().manual_seed(0))
    drawn = mixtures.draw(fitted, 40_000, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(drawn.mean(dim=0), x.mean(dim=0), atol=0.05)
    whole = covariances(fitted)[0]
    wanted = {"spherical": whole * np.eye(4), "diagonal": np.diag(np.atleast_1d(whole)), "full": whole}[kind]
    np.testing.assert_allclose(np.cov(drawn.T), wanted, atol=0.15)


def test_equal_rows_and_few_rows_are_fitted_too() -> None:
    same = torch.ones(6, 3, dtype=torch.float64)
    for kind in KINDS:
        found = mixtures.fit(same, 2, kind, 1e-4, torch.Generator().manual_seed(0))
        assert all(bool(value.isfinite().all()) for value in (found.weights, found.means, found.spreads))
        one = mixtures.fit(blobs(1), 1, kind, 1e-4, torch.Generator().manual_seed(0))
        np.testing.assert_allclose(one.means, blobs(1), rtol=1e-12)


@pytest.mark.parametrize("classes", [3, 4])
def test_the_head_is_scikit_learns(classes: int) -> None:
    """Also with a class that has no features."""
    x, decay = blobs(80, seed=3), 0.02
    labels = torch.arange(80) % 3
    x[labels == 1] += 0.7
    weight, bias = mixtures.logistic(x, labels, classes, decay)
    middle, width = x.mean(dim=0), x.std(dim=0, correction=0)
    rows = np.hstack([(x - middle) / width, np.ones((80, 1))])
    if classes == 3:
        theirs = LogisticRegression(C=1 / (decay * 80), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(
            rows, labels
        )
        ours = np.hstack([(weight * width).numpy(), (bias + weight @ middle).numpy()[:, None]])
        np.testing.assert_allclose(ours, theirs.coef_, atol=1e-6)
    with torch.enable_grad():
        free = torch.from_numpy(np.hstack([weight * width, (bias + weight @ middle)[:, None]])).requires_grad_()
        loss = (
            torch.nn.functional.cross_entropy(torch.from_numpy(rows) @ free.T, labels) + decay / 2 * free.square().sum()
        )
        loss.backward()
    assert float(free.grad.abs().max()) < 1e-7
    assert int((x @ weight.T + bias).argmax(dim=1).max()) < 3
