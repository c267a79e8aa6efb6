"""Data vectors against references that are written from the papers, entry by entry, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium import vectors
from consilium.algebra import LowRank
from consilium.products import Product
from consilium.vectors import Term, Vector

CLOSE = {"rtol": 0, "atol": 1e-10}
SEEDS = st.integers(0, 10**6)
RANKS = st.lists(st.integers(1, 3), min_size=1, max_size=4)
PRODUCT = Product(("left.0", "left.1"), "right", ("base.0", "base.1"), 0.5, "shared")


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _vector(seed: int, rank: int) -> Vector:
    factors = LowRank(_draw(seed, 6, rank), _draw(seed + 1, rank, 5))
    return Vector({"head": _draw(seed + 2, 3, 4)}, {"right": factors})


def _terms(seed: int, ranks: list[int]) -> list[Term]:
    return [Term(f"site {at}", _vector(seed + 10 * at, rank), 1.0 + at) for at, rank in enumerate(ranks)]


def _flat(vector: Vector) -> np.ndarray:
    return np.concatenate(
        [vector.plain["head"].flatten().numpy(), vectors.dense(vector.products["right"]).flatten().numpy()]
    )


# ------------------------------------------------------------------------------------------------ slow references
def _ties(task_vectors: list[np.ndarray], share: float) -> np.ndarray:
    """arXiv 2306.01708, algorithm 1, one parameter after the other."""
    trimmed = []
    for tau in task_vectors:
        keep = max(1, round(share * len(tau)))
        longest = sorted(range(len(tau)), key=lambda p: -abs(tau[p]))[:keep]
        trimmed.append([tau[p] if p in longest else 0.0 for p in range(len(tau))])
    merged = []
    for p in range(len(task_vectors[0])):
        elected = np.sign(sum(tau[p] for tau in trimmed))
        agreeing = [tau[p] for tau in trimmed if np.sign(tau[p]) == elected and tau[p] != 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.array(merged)


@settings(deadline=None)
@given(SEEDS, RANKS, st.sampled_from([0.05, 0.2, 0.5, 1.0]))
def test_ties_is_the_papers(seed: int, ranks: list[int], share: float) -> None:
    terms = _terms(seed, ranks)
    merged = vectors.merged("ties", terms, share, 0)
    np.testing.assert_allclose(_flat(merged), _ties([_flat(term.vector) for term in terms], share), atol=1e-10)


@settings(deadline=None)
@given(SEEDS, RANKS, st.sampled_from([0.2, 0.5, 1.0]))
def test_dare_drops_and_rescales_and_takes_the_mean(seed: int, ranks: list[int], share: float) -> None:
    """arXiv 2311.03099: every entry is either nothing or tau / (1 - p), with p = 1 - share the drop rate."""
    terms = _terms(seed, ranks)
    weights = [term.weight / sum(term.weight for term in terms) for term in terms]
    masked = []
    for term in terms:
        entries = {"head": term.vector.plain["head"], "right": vectors.dense(term.vector.products["right"])}
        thinned = vectors.dare(entries, share, 7, term.site)
        for name, value in thinned.items():
            kept = value != 0
            torch.testing.assert_close(value[kept], entries[name][kept] / share, **CLOSE)
            assert share < 1 or kept.all()
        masked.append(np.concatenate([thinned["head"].flatten().numpy(), thinned["right"].flatten().numpy()]))
    expected = sum(weight * value for weight, value in zip(weights, masked, strict=True))
    np.testing.assert_allclose(_flat(vectors.merged("dare", terms, share, 7)), expected, atol=1e-10)


def test_dare_keeps_its_share_and_the_mean_of_its_draws_is_the_vector() -> None:
    entries = {"w": torch.ones(200, 50, dtype=torch.float64)}
    draws = torch.stack([vectors.dare(entries, 0.2, seed, "a")["w"] for seed in range(40)])
    assert abs(float((draws != 0).double().mean()) - 0.2) < 0.005
    assert abs(float(draws.mean()) - 1) < 0.02
    assert not torch.equal(vectors.dare(entries, 0.2, 0, "a")["w"], vectors.dare(entries, 0.2, 0, "b")["w"])
    alike = vectors.dare({"v": entries["w"], "w": entries["w"]}, 0.2, 0, "a")
    assert not torch.equal(alike["v"], alike["w"]), "two tensors of one shape do not drop the same entries"


@settings(deadline=None)
@given(SEEDS, RANKS)
def test_sum_and_mean_are_those_of_the_dense_vectors(seed: int, ranks: list[int]) -> None:
    """(iv) of the reference: stacked factors are exact, at any ranks; the mean of factors is not."""
    terms = _terms(seed, ranks)
    flat, weights = [_flat(term.vector) for term in terms], np.array([term.weight for term in terms])
    np.testing.assert_allclose(_flat(vectors.merged("sum", terms, 1, 0)), sum(flat), atol=1e-10)
    mean = vectors.merged("mean", terms, 1, 0)
    np.testing.assert_allclose(_flat(mean), np.average(flat, axis=0, weights=weights), atol=1e-10)
    product = mean.products["right"]
    assert isinstance(product, LowRank)
    assert product.left.shape[1] <= min(sum(ranks), 5)


@settings(deadline=None)
@given(SEEDS, RANKS, st.permutations(range(4)), st.sampled_from(["mean", "sum", "ties", "dare"]))
def test_the_order_does_not_matter(seed: int, ranks: list[int], order: list[int], rule: vectors.Rule) -> None:
    terms = _terms(seed, ranks)
    other = [terms[at] for at in order if at < len(terms)]
    first, second = vectors.merged(rule, terms, 0.5, 3), vectors.merged(rule, other, 0.5, 3)
    np.testing.assert_array_equal(_flat(first), _flat(second))


@settings(deadline=None)
@given(SEEDS, RANKS)
def test_what_was_added_is_taken_away(seed: int, ranks: list[int]) -> None:
    terms = _terms(seed, [*ranks, 2])
    whole, others = vectors.merged("sum", terms, 1, 0), vectors.merged("sum", terms[:-1], 1, 0)
    back = vectors.combination([(1.0, whole), (-1.0, terms[-1].vector)])
    np.testing.assert_allclose(_flat(back), _flat(others), atol=1e-12)
    assert back.products["right"].left.shape[1] == others.products["right"].left.shape[1], "and its rank with it"


def test_one_vector_keeps_its_bits() -> None:
    (term,) = _terms(3, [2])
    for rule in vectors.LINEAR:
        product = vectors.merged(rule, [term], 1, 0).products["right"]
        assert torch.equal(product.left, term.vector.products["right"].left)
        assert torch.equal(product.right, term.vector.products["right"].right)


def test_a_vector_of_nothing_is_nothing_under_every_rule() -> None:
    nothing = Vector(
        {"head": torch.zeros(2, 2).double()}, {"right": LowRank(torch.zeros(4, 2).double(), _draw(1, 2, 3))}
    )
    for rule in ("mean", "sum", "ties", "dare"):
        merged = vectors.merged(rule, [Term("a", nothing), Term("b", nothing)], 0.5, 0)
        assert not _flat(merged).any()


# ------------------------------------------------------------------------------------------------ from and to models
def _model(seed: int, rank: int) -> dict[str, Tensor]:
    factors = {"left.0": _draw(seed, 2, rank), "left.1": _draw(seed + 1, 4, rank), "right": _draw(seed + 2, rank, 5)}
    return {**factors, "head": _draw(seed + 3, 3, 4)}


def _whole(model: dict[str, Tensor], scale: float) -> Tensor:
    return scale * torch.cat([model["left.0"], model["left.1"]]) @ model["right"]


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
def test_a_start_whose_product_is_not_nothing_is_taken_off_and_put_back(scale: float) -> None:
    start, trained = _model(0, 2), _model(50, 3)
    other = Product(PRODUCT.left, PRODUCT.right, PRODUCT.base, 2.0, "shared")
    vector = vectors.difference(trained, start, [other], [PRODUCT])
    found = vectors.product_at(vector, scale, PRODUCT, start)
    expected = _whole(start, 0.5) + scale * (_whole(trained, 2.0) - _whole(start, 0.5))
    torch.testing.assert_close(vectors.dense(found), expected, **CLOSE)
    plain = vectors.added(vector, scale, start)["head"]
    torch.testing.assert_close(plain, start["head"] + scale * (trained["head"] - start["head"]), **CLOSE)
    base = {"base.0": _draw(90, 2, 5), "base.1": _draw(91, 4, 5)}
    folded = vectors.folded(vector, scale, [PRODUCT], base)
    step = scale * (_whole(trained, 2.0) - _whole(start, 0.5))
    torch.testing.assert_close(torch.cat([folded[n] - base[n] for n in sorted(base)]), step, **CLOSE)


@pytest.mark.parametrize("kind", ["factors", "entries"])
def test_a_rank_cuts_to_the_nearest_and_says_by_how_much(kind: str) -> None:
    value = LowRank(_draw(0, 8, 4), _draw(1, 4, 6))
    whole = value.left @ value.right
    found, missed = vectors.at_rank(value if kind == "factors" else whole, torch.zeros(2, 6))
    singular = torch.linalg.svdvals(whole)
    expected = float((singular[2:].square().sum() / singular.square().sum()).sqrt())
    assert found.right.shape == (2, 6)
    assert float((found.left @ found.right - whole).norm() / whole.norm()) == pytest.approx(expected, abs=1e-9)
    assert missed == pytest.approx(expected, abs=1e-7)
    again, lost = vectors.at_rank(value if kind == "factors" else whole, _draw(2, 5, 6))
    torch.testing.assert_close(again.left @ again.right, whole, **CLOSE)
    assert lost < 1e-6


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_cosine_is_that_of_the_entries(sign: float) -> None:
    first, second = _vector(0, 2), _vector(5, 3)
    flat = _flat(first), _flat(second)
    expected = sign * flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    turned = vectors.combination([(sign, second)])
    assert vectors.cosine(first, turned) == pytest.approx(expected, abs=1e-12)
