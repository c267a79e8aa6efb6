"""Low-rank algebra against the dense computation, in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium import algebra
from consilium.algebra import LowRank

CLOSE = {"rtol": 0, "atol": 1e-10}
RANKS = st.integers(1, 5)
SEEDS = st.integers(0, 10**6)


def _product(seed: int, rank: int, rows: int = 9, columns: int = 7) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return LowRank(left, torch.randn(rank, columns, generator=generator, dtype=torch.float64))


def _dense(product: LowRank) -> Tensor:
    return product.left @ product.right


@given(SEEDS, st.lists(st.tuples(st.floats(-3, 3), RANKS), min_size=1, max_size=4))
def test_a_weighted_sum_is_the_dense_one(seed: int, terms: list[tuple[float, int]]) -> None:
    """I1 with any ranks; weights of either sign add, scale and subtract."""
    pieces = [(weight, _product(seed + at, rank)) for at, (weight, rank) in enumerate(terms)]
    total = algebra.weighted_sum(pieces)
    assert total.left.shape[1] == len(total.right) == sum(rank for _, rank in terms)
    torch.testing.assert_close(_dense(total), sum(w * _dense(p) for w, p in pieces), **CLOSE)


@given(SEEDS, RANKS, RANKS)
def test_what_was_added_is_taken_away_again(seed: int, first: int, second: int) -> None:
    a, b = _product(seed, first), _product(seed + 1, second)
    back = algebra.weighted_sum([(1, algebra.weighted_sum([(1, a), (1, b)])), (-1, b)])
    torch.testing.assert_close(_dense(back), _dense(a), **CLOSE)


@given(SEEDS, st.integers(1, 9), st.integers(1, 6))
def test_truncation_is_that_of_the_dense_svd(seed: int, rank: int, kept: int) -> None:
    """I5: the error is what the dropped singular values say; ranks above those of the matrix too."""
    product = _product(seed, rank)
    cut, values = algebra.truncated(product, kept)
    dense = torch.linalg.svdvals(_dense(product))
    size = min(rank, len(dense))
    torch.testing.assert_close(values[:size], dense[:size], **CLOSE)
    error = (_dense(cut) - _dense(product)).norm()
    torch.testing.assert_close(error, dense[kept:].norm(), **CLOSE)
    torch.testing.assert_close(cut.right @ cut.right.T, torch.eye(len(cut.right), dtype=torch.float64), **CLOSE)
    assert cut.left.shape[1] == len(cut.right) <= kept


@given(SEEDS, RANKS, RANKS)
def test_inner_products_are_those_of_the_dense_matrices(seed: int, first: int, second: int) -> None:
    a, b = _product(seed, first), _product(seed + 1, second)
    torch.testing.assert_close(algebra.inner(a, b), (_dense(a) * _dense(b)).sum(), **CLOSE)
    torch.testing.assert_close(algebra.squared_norm(a), _dense(a).norm() ** 2, **CLOSE)


@given(SEEDS, RANKS, RANKS)
def test_orthogonalised_rows_are_orthogonal_and_nothing_else_is_taken(seed: int, first: int, second: int) -> None:
    a, b = _product(seed, first).right, _product(seed + 1, second).right
    found = algebra.orthogonalised(a, b)
    torch.testing.assert_close(found @ b.T, torch.zeros(first, second, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(algebra.orthogonalised(found, b), found, **CLOSE)
    inside = torch.linalg.lstsq(b.T, (a - found).T).solution
    torch.testing.assert_close(b.T @ inside, (a - found).T, **CLOSE)
    assert torch.equal(algebra.orthogonalised(a, torch.zeros_like(b)), a)


@given(SEEDS, RANKS, RANKS)
def test_overlap_is_that_of_the_projections_and_knows_no_gauge(seed: int, first: int, second: int) -> None:
    a, b = _product(seed, first).right, _product(seed + 1, second).right
    p, q = (torch.linalg.pinv(x) @ x for x in (a, b))
    torch.testing.assert_close(algebra.overlap(a, b), float((p @ q).trace() / min(first, second)), **CLOSE)
    gauge = torch.eye(first, dtype=torch.float64) + 0.1 * _product(seed + 2, first, first, first).left
    if torch.linalg.cond(gauge) < 100:
        torch.testing.assert_close(algebra.overlap(gauge @ a, b), algebra.overlap(a, b), **CLOSE)
    cosines = algebra.principal_cosines(a, b)
    torch.testing.assert_close(cosines, torch.linalg.svdvals(p @ q)[: len(cosines)], rtol=0, atol=1e-7)


def test_the_ends_of_overlap() -> None:
    x = _product(1, 3).right
    assert algebra.overlap(x, x[:2]) == 1.0 or abs(algebra.overlap(x, x[:2]) - 1) < 1e-12
    assert algebra.overlap(algebra.orthogonalised(_product(2, 2).right, x), x) < 1e-20
    assert algebra.overlap(torch.zeros_like(x), x) == 0.0
    assert algebra.basis(torch.cat([x, x])).shape == x.shape


def test_random_subspaces_overlap_by_r_over_d() -> None:
    """3.4: 0.0104 for r = 8, d = 768; a claim of disentanglement is measured against it."""
    found = [algebra.overlap(_product(at, 8, 1, 768).right, _product(at + 99, 8, 1, 768).right) for at in range(40)]
    assert abs(sum(found) / 40 / (8 / 768) - 1) < 0.08
