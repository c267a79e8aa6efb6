"""Sums of products against the obvious dense computation in float64 NumPy, for any shapes, ranks and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium import aggregation
from consilium.aggregation import Aggregation
from consilium.products import Product
from consilium.tensors import Tensors, equal

CLOSE = 1e-10  # of the largest number around


@dataclass(frozen=True)
class Case:
    """One product, what the coordinator holds, and what sites sent."""

    product: Product
    start: Tensors
    terms: list[tuple[float, Tensors]]

    def dense(self, tensors: Tensors) -> np.ndarray:
        """L R of one set of factors."""
        left = np.concatenate([tensors[name].numpy() for name in self.product.left])
        return left @ tensors[self.product.right].numpy()

    def mean(self) -> np.ndarray:
        """sum w_k L_k R_k / sum w_k."""
        total = sum(weight for weight, _ in self.terms)
        return sum(weight / total * self.dense(tensors) for weight, tensors in self.terms)

    def base(self, tensors: Tensors) -> np.ndarray:
        """All bases, below one another."""
        return np.concatenate([{**self.start, **tensors}[name].numpy() for name in self.product.base])

    def model(self, tensors: Tensors) -> np.ndarray:
        """base + scale * L R: what acts."""
        return self.base(tensors) + self.product.scale * self.dense({**self.start, **tensors})

    def wanted(self) -> np.ndarray:
        """base + scale * the mean of products."""
        return self.base({}) + self.product.scale * self.mean()


@st.composite
def cases(draw: st.DrawFn, equal_ranks: bool = False) -> Case:
    """1 to 3 left factors, 1 to 4 sites of any ranks and weights; some factors zero or short of their rank."""
    rows = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    columns, rank = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    size = st.just(rank) if equal_ranks else st.integers(1, 6)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lefts, bases = [f"l{at}" for at in range(len(rows))], [f"w{at}" for at in range(len(rows))]

    def factors(rank: int) -> dict[str, torch.Tensor]:
        kind, unit = draw(st.sampled_from(["full", "zero", "short"])), 10.0 ** draw(st.integers(-3, 2))
        made = [unit * generator.normal(size=(count, rank)) for count in rows]
        if kind != "full":
            made = [each * 0 if kind == "zero" else np.repeat(each[:, :1], rank, 1) for each in made]
        right = generator.normal(size=(rank, columns))
        arrays = dict(zip([*lefts, "r"], [*made, right], strict=True))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    weights = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    terms = [(weight, factors(draw(size))) for weight in weights]
    base = {name: torch.from_numpy(generator.normal(size=(n, columns))) for name, n in zip(bases, rows, strict=True)}
    product = Product(tuple(lefts), "r", tuple(bases), draw(st.sampled_from([1.0, 0.25, 16.0])), "shared")
    return Case(product, {**base, **factors(rank)}, terms)


def _near(found: np.ndarray, wanted: np.ndarray, unit: float) -> bool:
    return bool(np.abs(found - wanted).max() <= CLOSE * max(unit, np.abs(wanted).max()))


@given(cases())
def test_product_svd_is_the_nearest_of_its_rank_to_the_dense_mean(case: Case) -> None:
    found = aggregation.product_svd([case.product], case.terms, case.start)
    assert {name: value.shape for name, value in found.items()} == {
        name: case.start[name].shape for name in (*case.product.left, case.product.right)
    }
    wanted, rank = case.mean(), len(case.start["r"])
    values = np.linalg.svd(wanted, compute_uv=False)
    unit = max(np.abs(case.dense(tensors)).max() for _, tensors in case.terms) + 1e-300
    error = np.linalg.norm(case.dense(found) - wanted)
    assert abs(error - np.sqrt((values[rank:] ** 2).sum())) <= CLOSE * unit * 10
    right, left = found["r"].numpy(), np.concatenate([found[name].numpy() for name in case.product.left])
    kept = min(rank, right.shape[1])
    assert _near(right @ right.T, np.diag([1.0] * kept + [0.0] * (rank - kept)), 1.0)
    sizes = np.linalg.norm(left, axis=0)
    shown = np.pad(values, (0, rank))[:rank]
    assert _near(sizes, shown, unit)
    assert all(row[np.abs(row).argmax()] > 0 for row in right[:kept])


@given(cases())
def test_stack_puts_the_mean_of_products_into_the_base_whatever_the_ranks(case: Case) -> None:
    found = aggregation.stack([case.product], case.terms, case.start)
    assert found.keys() <= set(case.product.base)
    assert _near(case.model(found), case.wanted(), _unit(case))


@given(cases(equal_ranks=True))
def test_residual_averages_factors_and_puts_what_they_miss_into_the_base(case: Case) -> None:
    found = aggregation.residual([case.product], case.terms, case.start)
    means = Aggregation()(case.terms, [case.product], case.start)
    assert equal({**case.start, **found, **{n: case.start[n] for n in case.product.base}}, {**case.start, **means})
    assert _near(case.model(found), case.wanted(), _unit(case))


def _unit(case: Case) -> float:
    return 1 + 16 * max(np.abs(case.dense(tensors)).max() for tensors in (case.start, *(t for _, t in case.terms)))


@given(cases(equal_ranks=True), st.integers(1, 5))
@pytest.mark.parametrize("kind", ["mean", "refactor", "product_svd", "stack", "residual", "median", "trimmed_mean"])
def test_equal_sites_are_one_site_in_what_acts(kind: aggregation.Kind, case: Case, count: int) -> None:
    alike = [(weight, case.terms[0][1]) for weight in range(1, count + 1)]
    found = Aggregation(kind, 0.3)(alike, [case.product], case.start)
    wanted = case.base({}) + case.product.scale * case.dense(case.terms[0][1])
    assert _near(case.model(found), wanted, _unit(case))


@given(cases(equal_ranks=True))
@pytest.mark.parametrize("kind", ["product_svd", "stack", "residual"])
def test_a_site_that_sends_one_factor_trained_it_beside_the_coordinators_other(
    kind: aggregation.Kind, case: Case
) -> None:
    """A factor that nobody sent is common: it stays, and the mean of products is exact."""
    lefts = [(weight, {n: t[n] for n in case.product.left}) for weight, t in case.terms]
    found = Aggregation(kind)(lefts, [case.product], case.start)
    wanted = _at_start(case, lefts)
    assert _near(case.model(found), wanted, _unit(case))
    assert found.keys() <= (set(case.product.base) if kind == "stack" else set(case.product.left))


@given(cases(equal_ranks=True))
@pytest.mark.parametrize("kind", ["stack", "residual"])
def test_some_sites_may_send_both_factors_and_some_one(kind: aggregation.Kind, case: Case) -> None:
    half = [(weight, {n: t[n] for n in case.product.left}) for weight, t in case.terms[1:]]
    mixed = [case.terms[0], *half]
    found = Aggregation(kind)(mixed, [case.product], case.start)
    assert _near(case.model(found), _at_start(case, mixed), _unit(case))


def _at_start(case: Case, terms: list[tuple[float, Tensors]]) -> np.ndarray:
    return replace(case, terms=[(weight, {**case.start, **tensors}) for weight, tensors in terms]).wanted()
