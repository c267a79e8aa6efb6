"""FedDyn against its paper in NumPy; where it ends, with exact solves, and what ends elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium import registry
from consilium.errors import ConfigError
from consilium.protocols import Strategy
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import equal
from tests import federation, quadratics
from tests.quadratics import Federation

SITES = quadratics.problems(30, 50, 20, 7)
START = np.linspace(-1, 1, quadratics.SIZE)
DRAWS = (("a", "b", "c", "d"), ("a", "b"), ("c", "d"), ("a", "d"), ("b", "c"))
CLOSE = {"rtol": 0, "atol": 1e-10}
RATE, STEPS = 0.05, 3
HOSPITALS = federation.hospitals(14, 9, 20)


def _feddyn(**options: Any) -> Strategy:
    member: Strategy = registry.build("strategies", "feddyn", options)
    return member


def _by_the_paper(alpha: float, share: dict[str, float], exact: bool, squared: bool = True) -> list[np.ndarray]:
    """Algorithm 1, with gradient steps or exact solves; the means over sites are weighted."""
    x, h, own, found = START.copy(), np.zeros_like(START), {site: np.zeros_like(START) for site in SITES}, []
    for drawn in DRAWS:
        ends = {}
        for site in drawn:
            problem, w = SITES[site], x.copy()
            if exact:
                w = np.linalg.solve(problem.h + alpha * np.eye(len(x)), problem.b + own[site] + alpha * x)
            for _ in range(0 if exact else STEPS):
                length = 1.0 if squared else np.linalg.norm(w - x) + 1e-12
                w = w - RATE * (problem.gradient(w) - own[site] + alpha * (w - x) / length)
            own[site] = own[site] - alpha * (w - x)
            ends[site] = w
        h = h - alpha * sum(share[site] * (ends[site] - x) for site in drawn)
        x = sum(share[site] * ends[site] for site in drawn) / sum(share[site] for site in drawn) - h / alpha
        found.append(x)
    return found


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize("exact", [False, True])
def test_it_is_the_papers_algorithm(weights: str, exact: bool) -> None:
    """The norm is squared: the other, which some code has, gives something else."""
    images = {site: problem.images if weights == "examples" else 1 for site, problem in SITES.items()}
    share = {site: count / sum(images.values()) for site, count in images.items()}
    here = Federation(_feddyn(alpha=0.3, weights=weights), SITES, START, None if exact else STEPS, RATE)
    for drawn, x in zip(DRAWS, _by_the_paper(0.3, share, exact), strict=True):
        here.round(*drawn)
        np.testing.assert_allclose(here.shared, x, **CLOSE)
    unsquared = _by_the_paper(0.3, share, exact=False, squared=False)[-1]
    assert exact or np.abs(unsquared - here.shared).max() > 1e-3


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_with_exact_solves_it_ends_at_the_optimum_of_all(weights: str) -> None:
    """I15; FedAvg, solved as exactly, stays beside it."""
    best = quadratics.optimum(SITES, {s: float(p.images if weights == "examples" else 1) for s, p in SITES.items()})
    feddyn, fedavg = (Federation(s, SITES, START, None) for s in (_feddyn(alpha=0.5, weights=weights), FedAvg(weights)))
    for _ in range(400):
        feddyn.round()
    for _ in range(3):
        fedavg.round()
    np.testing.assert_allclose(feddyn.shared, best, **CLOSE)
    assert np.abs(fedavg.shared - best).max() > 0.05
    for site, problem in SITES.items():
        own = quadratics.whole({n: feddyn.kept[site].tensors[f"h/{n}"] for n in ("body", "head")})
        np.testing.assert_allclose(own, problem.gradient(best), rtol=0, atol=1e-8)


def test_half_of_the_sites_in_a_round_go_there_too() -> None:
    best = quadratics.optimum(SITES, dict.fromkeys(SITES, 1.0))
    here = Federation(_feddyn(alpha=0.5), SITES, START, None)
    draw = np.random.default_rng(1)
    for _ in range(1500):
        here.round(*draw.permutation(list(SITES))[:2])
    assert np.abs(here.shared - best).max() < 1e-6


def test_what_travels_is_what_fedavg_sends_and_one_round_differs(tmp_path: Path) -> None:
    settings = federation.configure(strategy={"name": "feddyn"}, train={"participation": 0.67})
    outcome = federation.run(tmp_path / "feddyn", settings, HOSPITALS)
    fedavg = federation.run(tmp_path / "fedavg", federation.configure(train={"participation": 0.67}), HOSPITALS)
    assert outcome.progress.ledger.payload == fedavg.progress.ledger.payload
    assert not equal(outcome.shared, fedavg.shared)
    assert outcome.served("a").keys() == outcome.experiment.model.specs.keys()
    assert all(torch.isfinite(value).all() for value in outcome.shared.values())


def test_what_no_site_trained_is_left_alone() -> None:
    settings = federation.configure(strategy={"name": "feddyn"}, head={"share": "personal"})
    pieces = federation.assemble(settings)
    assert not [name for name in pieces.up(1) if "head" in name]
    member, specs = pieces.strategy, pieces.model.specs
    state = member.init_server(pieces.model.initial(3), specs, ("a", "b"))
    assert equal(member.combine(state, [], specs).shared, state.shared)


@pytest.mark.parametrize(
    ("options", "words"), [({"alpha": 0}, "greater than 0"), ({"aggregate": "mean"}, "unknown key")]
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _feddyn(**options)


def test_the_loss_that_is_logged_is_the_tasks() -> None:
    here = Federation(_feddyn(), SITES, START, STEPS, RATE)
    for _ in range(3):
        here.round()
    training = quadratics.Quadratic(SITES["a"], "a", 4, STEPS, RATE, lambda *_: True)
    learned = here.strategy.learn(here.strategy.send(here.server, "a"), here.kept["a"], training)
    assert learned.loss == pytest.approx(float(training.loss(learned.update, quadratics.BATCH)))
