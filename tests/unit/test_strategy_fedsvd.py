"""fedsvd: the paper's rounds by hand, the change of basis (I4), and what travels when."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium import registry
from consilium.aggregation import Aggregation, refactored
from consilium.check import predicted_bytes
from consilium.errors import ConfigError, TrainingError
from consilium.products import Product, products
from consilium.protocols import Declaration
from consilium.strategies.fedavg import FedAvg, jointly
from consilium.tensors import Tensors, equal
from tests import federation, toy

SITES = federation.hospitals(14, 9, 20, 11)
DRAWN = {2: ("a", "c"), 3: ("b",)}
G = "layer.lora.shared"
EXACT = {"rtol": 0, "atol": 1e-10}


def _strategy(**options: Any) -> FedAvg:
    found: FedAvg = registry.build("strategies", "fedsvd", options)
    return found


def _run(folder: Path, name: str = "fedsvd", options: dict[str, Any] | None = None, **train: Any) -> federation.Outcome:
    settings = federation.configure(strategy={"name": name, **(options or {})}, train={"rounds": 4, **train})
    return federation.run(folder, settings, SITES)


# ------------------------------------------------------------------------------------------------ the paper's rounds
def _by_hand(rounds: int, period: int) -> dict[str, np.ndarray]:
    """B and the head by gradient descent written out, weighted means, SVD(BA) = U S V^T, A <- V^T, B <- U S; NumPy."""
    start = {n: t.numpy() for n, t in toy.initial(toy.specs(_strategy()), 1).items()}
    a, b, head = start[f"{G}.a"], start[f"{G}.b"], start["head.weight"]
    frozen, s = toy.frozen().numpy(), toy.SCALE
    for number in range(1, rounds + 1):
        found = []
        for site in DRAWN.get(number, toy.SITES):
            x, y = (t.numpy() for t in toy.data(site))
            b_k, head_k = b.copy(), head.copy()
            for _ in range(3):
                hidden = x @ (frozen + s * b_k @ a).T
                slope = 2 * (hidden @ head_k.T - y) / y.size
                by_hidden = slope @ head_k
                b_k, head_k = b_k - toy.RATE * s * by_hidden.T @ x @ a.T, head_k - toy.RATE * slope.T @ hidden
            found.append((toy.SIZES[site], b_k, head_k))
        total = sum(n for n, _, _ in found)
        b, head = (sum(each[0] / total * each[at] for each in found) for at in (1, 2))
        if number % period == 0:
            u, values, v = np.linalg.svd(b @ a, full_matrices=False)
            signs = np.sign(v[np.arange(len(v)), np.abs(v).argmax(1)])
            b, a = (u[:, : len(a)] * values[: len(a)]) * signs[: len(a)], v[: len(a)] * signs[: len(a), None]
    return {f"{G}.a": a, f"{G}.b": b, "head.weight": head}


@pytest.mark.parametrize("period", [1, 2, 9])
def test_rounds_are_the_papers(period: int) -> None:
    """Sites come and go; another basis would train differently, so every round has to be right."""
    strategy = _strategy(period=period)
    outcome, wanted = toy.federate(strategy, 5, drawn=DRAWN), _by_hand(5, period)
    for name, value in wanted.items():
        torch.testing.assert_close(outcome.server.shared[name], torch.from_numpy(value), **EXACT)
    for site in toy.SITES:
        assert equal(outcome.model(strategy, site), outcome.model(strategy, "a"))


def test_a_change_of_basis_changes_how_training_goes_on_and_not_what_the_mean_was() -> None:
    """Negative: the periods do not agree, so the test above does not pass whatever the basis."""
    one, never = (toy.federate(_strategy(period=period), 2).server.shared for period in (1, 9))
    assert (one["head.weight"] - never["head.weight"]).abs().max() > 1e-4
    one, never = (toy.federate(_strategy(period=period), 1).server.shared for period in (1, 9))
    torch.testing.assert_close(one[f"{G}.b"] @ one[f"{G}.a"], never[f"{G}.b"] @ never[f"{G}.a"], **EXACT)
    assert torch.equal(one["head.weight"], never["head.weight"])
    assert not torch.allclose(one[f"{G}.a"], never[f"{G}.a"])


# ------------------------------------------------------------------------------------------------ the change itself
def _product(rows: Sequence[int] = (5,)) -> Product:
    return Product(tuple(f"b{at}" for at in range(len(rows))), "a", tuple(f"w{at}" for at in range(len(rows))), 3.0, "")


def _dense(product: Product, tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name] for name in product.left]) @ tensors[product.right]


@pytest.mark.parametrize(
    ("rows", "rank", "columns", "empty"),
    [((5,), 2, 6, 0), ((4, 3, 2), 4, 7, 0), ((5,), 3, 6, 2), ((5,), 3, 6, 3), ((2,), 4, 6, 0), ((6,), 4, 3, 0)],
    ids=["plain", "several", "short", "zero", "few rows", "few columns"],
)
def test_the_product_stays_and_the_right_factor_has_orthonormal_rows_of_the_same_span(
    rows: Sequence[int], rank: int, columns: int, empty: int
) -> None:
    product, start = _product(rows), {"a": toy.draw(1, rank, columns)}
    start |= {
        name: toy.draw(2 + at, count, rank) for at, (name, count) in enumerate(zip(product.left, rows, strict=True))
    }
    for name in product.left:
        start[name][:, rank - empty :] = 0
    found = refactored([product], start, start)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in start.items()}
    torch.testing.assert_close(_dense(product, found), _dense(product, start), **EXACT)
    kept = min(rank, columns)
    wanted = torch.diag(torch.tensor([1.0] * kept + [0.0] * (rank - kept), dtype=torch.float64))
    torch.testing.assert_close(found["a"] @ found["a"].T, wanted, **EXACT)
    projector = torch.linalg.pinv(start["a"]) @ start["a"]
    torch.testing.assert_close(found["a"] @ projector, found["a"], **EXACT, msg="no direction that was not there")
    left = torch.cat([found[name] for name in product.left])
    torch.testing.assert_close(left.T @ left, torch.diag(left.square().sum(0)), **EXACT)
    assert equal(found, refactored([product], start, start))


def test_what_nobody_trained_keeps_its_basis() -> None:
    product, start = _product(), {"b0": toy.draw(1, 5, 2), "a": toy.draw(2, 2, 6), "head": toy.draw(3, 2)}
    assert refactored([product], {"head": start["head"]}, start) == {}
    assert Aggregation("refactor")([(1, {"head": start["head"]})], [product], start).keys() == {"head"}
    assert Aggregation("refactor")([], [product], start) == {}


def test_any_strategy_can_sum_so_where_both_factors_are_trained(tmp_path: Path) -> None:
    """The mean of factors in another basis: after one round the same model, orthonormal on the right."""
    plain, other = (_run(tmp_path / kind, "fedavg", {"aggregate": kind}, rounds=1) for kind in ("mean", "refactor"))
    for p in products(other.experiment.model.specs):
        torch.testing.assert_close(_dense(p, other.shared), _dense(p, plain.shared), rtol=1e-4, atol=1e-6)
        right = other.shared[p.right]
        torch.testing.assert_close(right @ right.T, torch.eye(len(right)), rtol=0, atol=1e-6)
        assert not torch.allclose(right, plain.shared[p.right], atol=1e-3)
    for kind in ("mean", "refactor"):
        assert not FedAvg(declares=Declaration(), aggregate=Aggregation(kind)).declares.needs_individual_updates


# ------------------------------------------------------------------------------------------------ in a federation
def test_a_period_beyond_the_run_is_ffa_bit_by_bit(tmp_path: Path) -> None:
    ffa, svd = (
        _run(tmp_path / "ffa", "ffa", participation=0.5),
        _run(tmp_path / "svd", options={"period": 5}, participation=0.5),
    )
    assert equal(ffa.shared, svd.shared)
    assert ffa.progress.ledger.payload == svd.progress.ledger.payload
    assert not equal(ffa.shared, _run(tmp_path / "one", participation=0.5).shared)


@pytest.mark.parametrize("period", [1, 2])
def test_right_factors_never_go_up_and_down_after_a_change_alone(tmp_path: Path, period: int) -> None:
    outcome = _run(tmp_path, options={"period": period})
    specs = outcome.experiment.model.specs
    rights = {p.right for p in products(specs)}
    assert not [name for _, _, t in outcome.sent("up") for name in t.keys() & rights]
    came = {n: rights & t.keys() for n, site, t in outcome.sent("down") if site == "a"}
    assert came == {1: rights, **{n: rights if (n - 1) % period == 0 else set() for n in range(2, 5)}}
    assert all(torch.equal(outcome.served(site)[n], outcome.shared[n]) for site in SITES for n in rights)
    measured = outcome.progress.ledger.summary()
    assert predicted_bytes(outcome.experiment, SITES) == {way: measured[way] for way in ("up", "down")}


@pytest.mark.parametrize("codec", ["bfloat16", "int8"])
def test_a_coded_change_of_basis_arrives_alike_everywhere_and_is_predicted(tmp_path: Path, codec: str) -> None:
    settings = federation.configure(
        strategy={"name": "fedsvd"}, wire={"codec": codec}, train={"rounds": 4, "participation": 0.5}
    )
    outcome = federation.run(tmp_path, settings, SITES)
    measured = outcome.progress.ledger.summary()
    assert predicted_bytes(outcome.experiment, SITES) == {way: measured[way] for way in ("up", "down")}
    for p in products(outcome.experiment.model.specs):
        for site in SITES:
            assert torch.equal(outcome.served(site)[p.right], outcome.shared[p.right])
        right = outcome.shared[p.right]
        torch.testing.assert_close(right @ right.T, torch.eye(len(right)), rtol=0, atol=0.05)


def test_one_site_trains_its_own_product(tmp_path: Path) -> None:
    settings = federation.configure(strategy={"name": "fedsvd"}, train={"rounds": 1})
    ffa = federation.configure(strategy={"name": "ffa"}, train={"rounds": 1})
    one = {"a": SITES["a"]}
    found, wanted = federation.run(tmp_path / "svd", settings, one), federation.run(tmp_path / "ffa", ffa, one)
    for p in products(found.experiment.model.specs):
        torch.testing.assert_close(_dense(p, found.served("a")), _dense(p, wanted.served("a")), rtol=1e-4, atol=1e-6)


def test_a_site_that_missed_changes_of_basis_gets_both_factors_of_the_newest(tmp_path: Path) -> None:
    """Factors of two bases together would be another model: what a site trains on is one pair that the server held."""
    outcome = _run(tmp_path, participation=0.5, rounds=6)
    held: dict[str, Tensors] = dict.fromkeys(SITES, outcome.experiment.common)
    newest: dict[int, Tensors] = {}
    for number, site, tensors in outcome.sent("down"):
        held[site] = {**held[site], **tensors}
        own = {n: held[site][n] for n in outcome.shared}
        assert equal(newest.setdefault(number, own), own)
    drawn = [site for _, site, _ in outcome.sent("up")]
    rounds = [number for number, site, _ in outcome.sent("up") if site == drawn[0]]
    assert any(later - earlier > 1 for earlier, later in pairwise(rounds)), "somebody missed a round"


def test_kept_moments_of_another_basis_are_forgotten(tmp_path: Path) -> None:
    one, other = (
        federation.run(
            tmp_path / moments,
            federation.configure(
                strategy={"name": "fedsvd"}, head={"share": "frozen"}, train={"rounds": 2, "moments": moments}
            ),
            SITES,
        )
        for moments in ("keep", "reset")
    )
    assert equal(one.shared, other.shared)


def test_a_site_that_answers_nan_is_named(tmp_path: Path) -> None:
    def broken(training: Any, *rest: Any) -> Any:
        fitted = jointly(training, *rest)
        if (training.site, training.round) == ("b", 2):
            next(value for name, value in fitted.variables.items() if name.endswith(".b"))[0, 0] = torch.nan
        return fitted

    settings = federation.configure(strategy={"name": "fedsvd"})
    strategy = FedAvg(declares=_strategy().declares, aggregate=_strategy().aggregate, fit=broken)
    with pytest.raises(TrainingError, match="from site b in round 2"):
        federation.run(tmp_path, settings, SITES, strategy=strategy)


@pytest.mark.parametrize("options", [{"period": 0}, {"period": 1.5}, {"aggregate": "mean"}, {"warmup": 2}])
def test_what_it_does_not_take_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        _strategy(**options)
