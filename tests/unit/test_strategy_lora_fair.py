"""lora_fair: the paper's rounds by hand with dense least squares, and where the correction is nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium import registry
from consilium.aggregation import Aggregation
from consilium.check import predicted_bytes
from consilium.errors import ConfigError, TrainingError
from consilium.product_sums import corrected
from consilium.products import Product
from consilium.strategies.fedavg import FedAvg, jointly
from consilium.tensors import Tensors, equal
from tests import federation, toy

SITES = federation.hospitals(14, 9, 20, 11)
DRAWN = {2: ("a", "c"), 3: ("b",)}
G = "layer.lora.shared"
PRODUCT = Product(("b1", "b2"), "a", ("w1", "w2"), 3.0, "shared")


def _strategy(**options: Any) -> FedAvg:
    found: FedAvg = registry.build("strategies", "lora_fair", options)
    return found


def _run(folder: Path, name: str, options: dict[str, Any] | None = None, **train: Any) -> federation.Outcome:
    settings = federation.configure(strategy={"name": name, **(options or {})}, train=train)
    return federation.run(folder, settings, SITES)


# ------------------------------------------------------------------------------------------------ the paper's rounds
def _best_left(a: np.ndarray, b: np.ndarray, dense: np.ndarray, ridge: float) -> np.ndarray:
    """b + the least of ||(b + d) a - dense||^2 + ridge ||d||^2, as plain least squares of stacked equations."""
    rows = np.concatenate([a.T, np.sqrt(ridge) * np.eye(len(a))])
    missed = np.concatenate([(dense - b @ a).T, np.zeros((len(a), len(b)))])
    return b + np.linalg.lstsq(rows, missed, rcond=None)[0].T


def _by_hand(rounds: int, ridge: float) -> dict[str, np.ndarray]:
    """Gradient descent on all of A, B and the head written out, means, and the correction; NumPy."""
    start = {n: t.numpy() for n, t in toy.initial(toy.specs(_strategy()), 1).items()}
    a, b, head = start[f"{G}.a"], start[f"{G}.b"], start["head.weight"]
    frozen, s = toy.frozen().numpy(), toy.SCALE
    for number in range(1, rounds + 1):
        found = []
        for site in DRAWN.get(number, toy.SITES):
            x, y = (t.numpy() for t in toy.data(site))
            a_k, b_k, head_k = a, b, head
            for _ in range(3):
                hidden = x @ (frozen + s * b_k @ a_k).T
                slope = 2 * (hidden @ head_k.T - y) / y.size
                dense = s * (slope @ head_k).T @ x
                a_k, b_k, head_k = (
                    a_k - toy.RATE * b_k.T @ dense,
                    b_k - toy.RATE * dense @ a_k.T,
                    head_k - toy.RATE * slope.T @ hidden,
                )
            found.append((toy.SIZES[site], a_k, b_k, head_k))
        total = sum(n for n, *_ in found)
        a, b, head = (sum(each[0] / total * each[at] for each in found) for at in (1, 2, 3))
        b = _best_left(a, b, sum(n / total * b_k @ a_k for n, a_k, b_k, _ in found), ridge)
    return {f"{G}.a": a, f"{G}.b": b, "head.weight": head}


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.5])
def test_rounds_are_the_papers_with_the_correction_by_dense_least_squares(ridge: float) -> None:
    strategy = _strategy(ridge=ridge)
    outcome, wanted = toy.federate(strategy, 5, drawn=DRAWN), _by_hand(5, ridge)
    for name, value in wanted.items():
        torch.testing.assert_close(outcome.server.shared[name], torch.from_numpy(value), rtol=0, atol=1e-10)
    plain = toy.federate(registry.build("strategies", "fedit", {}), 5, drawn=DRAWN).server.shared
    assert (plain[f"{G}.b"] - outcome.server.shared[f"{G}.b"]).abs().max() > 1e-5, "the correction is something"


# ------------------------------------------------------------------------------------------------ the correction
def _terms(count: int, common: str = "") -> tuple[list[tuple[float, Tensors]], Tensors]:
    shapes = {"b1": (4, 2), "b2": (3, 2), "a": (2, 6)}
    draw = lambda at: {n: toy.draw(10 * at + k, *shape) for k, (n, shape) in enumerate(shapes.items())}  # noqa: E731
    start = draw(0)
    terms = [
        (at + 1.0, {**draw(at + 1), **{n: start[n] for n in shapes if common and n[0] == common}})
        for at in range(count)
    ]
    return terms, start


def _dense(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors["b1"], tensors["b2"]]) @ tensors["a"]


def _missed(found: Tensors, terms: list[tuple[float, Tensors]]) -> float:
    total = sum(weight for weight, _ in terms)
    mean = sum(weight / total * _dense(tensors) for weight, tensors in terms)
    return float((_dense(found) - mean).norm())


def test_it_is_nearer_to_the_mean_of_products_the_less_a_correction_costs() -> None:
    terms, start = _terms(3)
    means = Aggregation()(terms, [PRODUCT], start)
    gaps = [_missed({**means, **corrected([PRODUCT], terms, start, ridge)}, terms) for ridge in (0, 0.1, 1, 10)]
    assert gaps == sorted(gaps)
    assert gaps[-1] < _missed(means, terms) * (1 - 1e-3)
    assert gaps[0] > 0.1, "not exact: the means' rows do not hold all of it"
    best = corrected([PRODUCT], terms, start, 0.0)
    for seed in range(5):
        other = {n: best[n] + 0.01 * toy.draw(90 + seed, *best[n].shape) for n in ("b1", "b2")}
        assert _missed({**best, **other}, terms) > gaps[0]
    large = corrected([PRODUCT], terms, start, 1e12)
    torch.testing.assert_close(dict(large), {n: means[n] for n in large}, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("count", "common"), [(1, ""), (3, "a"), (3, "b")])
def test_where_the_means_miss_nothing_they_keep_their_bits(count: int, common: str) -> None:
    terms, start = _terms(count, common)
    found = corrected([PRODUCT], terms, start, 0.01)
    means = Aggregation()(terms, [PRODUCT], start)
    if common:  # a mean of equal tensors may round
        torch.testing.assert_close(found, {n: means[n] for n in found}, rtol=0, atol=1e-12)
    else:
        assert equal(found, {n: means[n] for n in found})


def test_a_mean_of_right_factors_short_of_its_rank_is_no_trouble() -> None:
    terms, start = _terms(2)
    rights = [
        torch.stack([tensors["a"][0], sign * tensors["a"][0]]) for (_, tensors), sign in zip(terms, (1, 1), strict=True)
    ]
    terms = [(weight, {**tensors, "a": right}) for (weight, tensors), right in zip(terms, rights, strict=True)]
    found = corrected([PRODUCT], terms, start, 0.0)
    assert all(value.isfinite().all() for value in found.values())
    assert _missed(found, terms) < _missed(Aggregation()(terms, [PRODUCT], start), terms)


# ------------------------------------------------------------------------------------------------ in a federation
def test_equal_sites_and_one_site_are_fedit(tmp_path: Path) -> None:
    one = {"a": SITES["a"]}
    alone, plain = (
        federation.run(tmp_path / name, federation.configure(strategy={"name": name}), one)
        for name in ("lora_fair", "fedit")
    )
    assert equal(alone.shared, plain.shared)
    twins = {name: replace(SITES["a"], name=name) for name in "ab"}
    settings = federation.configure(strategy={"name": "lora_fair"}, train={"batch_size": 32})
    several = federation.run(tmp_path / "twins", settings, twins)
    single = federation.run(tmp_path / "single", settings, one)
    torch.testing.assert_close(dict(several.shared), dict(single.shared), rtol=0, atol=2e-3)


def test_bytes_are_fedits_and_predicted(tmp_path: Path) -> None:
    fair, plain = (
        _run(tmp_path / "fair", "lora_fair", participation=0.5),
        _run(tmp_path / "it", "fedit", participation=0.5),
    )
    assert fair.progress.ledger.payload == plain.progress.ledger.payload
    assert predicted_bytes(fair.experiment, SITES) == {
        way: fair.progress.ledger.summary()[way] for way in ("up", "down")
    }
    assert not equal(fair.shared, plain.shared)
    assert fair.experiment.strategy.declares.needs_individual_updates
    assert not fair.experiment.strategy.declares.restarts_factors, "a correction leaves the basis as it is"


def test_a_site_that_answers_nan_is_named(tmp_path: Path) -> None:
    def broken(training: Any, *rest: Any) -> Any:
        fitted = jointly(training, *rest)
        if (training.site, training.round) == ("b", 2):
            next(value for name, value in fitted.variables.items() if name.endswith(".a"))[0, 0] = torch.inf
        return fitted

    strategy = FedAvg(declares=_strategy().declares, aggregate=_strategy().aggregate, fit=broken)
    with pytest.raises(TrainingError, match="from site b in round 2"):
        federation.run(tmp_path, federation.configure(strategy={"name": "lora_fair"}), SITES, strategy=strategy)


@pytest.mark.parametrize("options", [{"ridge": -1}, {"ridge": float("nan")}, {"aggregate": "mean"}])
def test_what_it_does_not_take_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        _strategy(**options)


def test_it_is_no_sum_for_other_strategies() -> None:
    with pytest.raises(ConfigError):
        registry.build("strategies", "fedavg", {"aggregate": "corrected"})
