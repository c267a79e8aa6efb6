"""Common: Gaussian mixtures, and a linear classifier. In: features [n, D], float64. Out: parameters, draws, a head.

Expectation-maximisation and multinomial logistic regression as in scikit-learn, which is the reference of the tests and
no dependency: what a run computes must have the same bits for any number of workers, and its solvers' threads sum in
the order in which they come. Everything here is torch on one thread or on as many as the caller runs with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Covariance = Literal["spherical", "diagonal", "full"]
STEPS, GAIN = 100, 1e-3  # at most so many steps; less gain in the mean log likelihood ends them (scikit-learn's)


@dataclass(frozen=True)
class Mixture:
    """`spreads`: standard deviations [K] or [K, D], or the rows of lower Cholesky factors of the covariances, what is
    left of the diagonal and it, [K, D (D + 1) / 2]."""

    weights: Tensor  # [K], sum 1
    means: Tensor  # [K, D]
    spreads: Tensor

    def log_likelihoods(self, x: Tensor) -> Tensor:
        """log(w_k N(x; m_k, S_k)) of every row and component, [n, K]."""
        steps, size = x[:, None] - self.means, x.shape[1]
        if self.full:
            roots = unpacked(self.spreads, size)
            scaled = torch.linalg.solve_triangular(roots, steps.permute(1, 2, 0), upper=False)
            squares, volume = scaled.square().sum(1).T, roots.diagonal(dim1=1, dim2=2).log().sum(1)
        else:
            wide = self.spreads.view(len(self.means), -1).expand_as(self.means)
            squares, volume = (steps / wide).square().sum(2), wide.log().sum(1)
        found: Tensor = self.weights.log() - volume - (squares + size * math.log(2 * math.pi)) / 2
        return found

    @property
    def full(self) -> bool:
        """Whether covariances are more than a diagonal; of one feature there is no more."""
        return self.spreads.ndim > 1 and self.spreads.shape[1] != self.means.shape[1]


def shape_of_spreads(covariance: Covariance, width: int) -> tuple[int, ...]:
    """Of one component."""
    return {"spherical": (), "diagonal": (width,), "full": (width * (width + 1) // 2,)}[covariance]


def unpacked(spreads: Tensor, width: int) -> Tensor:
    """Lower triangular [K, D, D]."""
    whole, at = spreads.new_zeros(len(spreads), width, width), torch.tril_indices(width, width)
    whole[:, at[0], at[1]] = spreads
    return whole


def joined(mixtures: Sequence[Mixture], counts: Sequence[float]) -> Mixture:
    """Several as one, each by its count; a weight of zero stands for no component. Weights add up to the counts."""
    shares = [m.weights * (n / m.weights.sum().clamp_min(1e-12)) for m, n in zip(mixtures, counts, strict=True)]
    return Mixture(torch.cat(shares), torch.cat([m.means for m in mixtures]), torch.cat([m.spreads for m in mixtures]))


def fit(x: Tensor, count: int, covariance: Covariance, floor: float, generator: torch.Generator) -> Mixture:
    """`count` components: k-means, then steps of expectation-maximisation. `floor` is added to variances."""
    found, before = maximised(x, clusters(x, count, generator), covariance, floor), -math.inf
    for _ in range(STEPS if count > 1 else 0):
        each = found.log_likelihoods(x)
        now = float(each.logsumexp(dim=1).mean())
        found = maximised(x, each.softmax(dim=1), covariance, floor)
        if now - before < GAIN:
            break
        before = now
    return found


def clusters(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means (Lloyd) from k-means++ seeds: which row is in which cluster, [n, K] of zeros and ones."""
    shares, centres = torch.zeros(len(x), count, dtype=x.dtype), seeds(x, count, generator)
    for _ in range(STEPS):
        before, shares = shares, torch.nn.functional.one_hot(torch.cdist(x, centres).argmin(dim=1), count).to(x)
        if torch.equal(before, shares):
            break
        sizes = shares.sum(dim=0)[:, None]
        centres = torch.where(sizes > 0, shares.T @ x / sizes.clamp_min(1), centres)
    return shares


def seeds(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows [count, D], each drawn by its squared distance from those before (Arthur and Vassilvitskii, SODA 2007)."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    far = torch.full((len(x),), math.inf, dtype=x.dtype)
    while len(chosen) < count:
        far = torch.minimum(far, (x - x[chosen[-1]]).square().sum(dim=1))
        by = far if float(far.sum()) > 0 else torch.ones_like(far)
        chosen.append(int(torch.multinomial(by, 1, generator=generator)))
    return x[chosen]


def maximised(x: Tensor, shares: Tensor, covariance: Covariance, floor: float) -> Mixture:
    """The mixture of most likelihood where component k has `shares` [n, K] of each row."""
    counts = shares.sum(dim=0) + 10 * torch.finfo(x.dtype).eps
    means = shares.T @ x / counts[:, None]
    if covariance == "full":
        each = [(x - mean).T @ ((x - mean) * share[:, None]) for mean, share in zip(means, shares.T, strict=True)]
        eye = floor * torch.eye(x.shape[1], dtype=x.dtype)
        at = torch.tril_indices(x.shape[1], x.shape[1])
        spreads = torch.linalg.cholesky(torch.stack(each) / counts[:, None, None] + eye)[:, at[0], at[1]]
    else:
        steps = (x[:, None] - means).square() * shares[:, :, None]
        variances = steps.sum(dim=0) / counts[:, None] + floor
        spreads = (variances if covariance == "diagonal" else variances.mean(dim=1)).sqrt()
    return Mixture(counts / counts.sum(), means, spreads)


def draw(mixture: Mixture, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of the mixture, [count, D]."""
    which = torch.multinomial(mixture.weights, count, replacement=True, generator=generator)
    noise = torch.randn(count, mixture.means.shape[1], dtype=mixture.means.dtype, generator=generator)
    if mixture.full:
        roots = unpacked(mixture.spreads, noise.shape[1])
        for at in range(len(roots)):
            noise[which == at] = noise[which == at] @ roots[at].T
        return mixture.means[which] + noise
    return mixture.means[which] + mixture.spreads[which].view(count, -1) * noise


def logistic(x: Tensor, labels: Tensor, num_classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] of multinomial logistic regression, mean cross entropy + decay/2 (|W|^2 + |b|^2) of
    standardised features, solved to the end by L-BFGS; given back for the features as they are."""
    with one_thread():
        middle, width = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-12)
        rows = torch.cat([(x - middle) / width, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        free = torch.zeros(num_classes, rows.shape[1], dtype=x.dtype, requires_grad=True)
        solver = torch.optim.LBFGS(
            [free], max_iter=1000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            entropy = torch.nn.functional.cross_entropy(rows @ free.T, labels)
            loss = entropy + decay / 2 * free.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(closure)  # type: ignore[no-untyped-call]
        weight = free.detach()[:, :-1] / width
        return weight, free.detach()[:, -1] - weight @ middle


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are split among threads, so that their number would be in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
