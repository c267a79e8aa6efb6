"""median and trimmed_mean by name: rounds against the papers' sums in NumPy, and sites that are not honest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium import registry
from consilium.errors import ConfigError, TrainingError
from consilium.protocols import ServerState, Update
from consilium.tensors import equal
from tests import federation, quadratics
from tests.unit.test_dishonest_sites import Dishonest

STEPS, RATE = 3, 0.05
PROBLEMS = quadratics.problems(30, 50, 20, 40, 10)
START = np.linspace(-1, 1, quadratics.SIZE)
DRAWS = (tuple("abcde"), tuple("acd"), tuple("abde"), tuple("be"), tuple("abcde"))
OPTIONS: Mapping[str, Mapping[str, Any]] = {"median": {}, "trimmed_mean": {"trim": 0.25}}
SITES = federation.hospitals(14, 9, 20, 11)


def _middle(values: np.ndarray, name: str) -> np.ndarray:
    ordered = np.sort(values, axis=0)
    n = len(ordered)
    if name == "median":
        return np.asarray((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
    cut = math.floor(0.25 * n)
    return np.asarray(ordered[cut : n - cut].mean(axis=0))


def _local(problem: quadratics.Problem, w: np.ndarray) -> np.ndarray:
    for _ in range(STEPS):
        w = w - RATE * problem.gradient(w)
    return w


@pytest.mark.parametrize("name", OPTIONS)
def test_robust_rounds_are_the_papers(name: str) -> None:
    """Half of the sites in some rounds; the uniform mean where nobody can be cut off."""
    strategy = registry.build("strategies", name, OPTIONS[name])
    here, w = quadratics.Federation(strategy, PROBLEMS, START, STEPS, RATE), START
    for drawn in DRAWS:
        ends = np.stack([_local(PROBLEMS[site], w) for site in drawn])
        w = _middle(ends, name)
        here.round(*drawn)
        np.testing.assert_allclose(here.shared, w, rtol=0, atol=1e-12)
        assert len(drawn) < 4 or np.abs(ends.mean(axis=0) - w).max() > 1e-4, "the uniform mean is another"


@pytest.mark.parametrize("name", OPTIONS)
@given(data=st.data())
def test_each_coordinate_stays_among_honest_sites(name: str, data: st.DataObject) -> None:
    """Whatever one site of four or more sends; the mean leaves the range as far as it likes."""
    honest = data.draw(st.integers(3, 7))
    values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2)
    sent = [torch.tensor(data.draw(values)) for _ in range(honest)]
    wild = torch.tensor(data.draw(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=2)))
    strategy = registry.build("strategies", name, OPTIONS[name])
    updates = [Update(str(at), {"body": value}, 1) for at, value in enumerate([*sent, wild])]
    start = ServerState(0, tuple(update.site for update in updates), {"body": torch.zeros(2)})
    found = strategy.combine(start, updates, quadratics.SPECS).shared["body"]
    low, high = torch.stack(sent).amin(dim=0), torch.stack(sent).amax(dim=0)
    assert (found >= low - 1e-3).all()
    assert (found <= high + 1e-3).all()


def _run(folder: Path, name: str, times: float, rounds: int = 2, **options: Any) -> federation.Outcome:
    train = {"rounds": rounds, "refuse_longer": 0}  # else it is refused before the sum
    settings = federation.configure(strategy={"name": name, **options}, train=train)
    pieces = federation.assemble(settings)
    return federation.run(folder, settings, SITES, wrap=lambda inner: Dishonest(inner, pieces, times))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_site_that_sends_rubbish_is_outvoted_or_refused_by_name(tmp_path: Path, name: str) -> None:
    wild = _run(tmp_path / "wild", name, -1e6)
    assert max(float(value.abs().max()) for value in wild.shared.values()) < 5
    with pytest.raises(TrainingError, match=r"non-finite numbers from site b in round 2"):
        _run(tmp_path / "nan", name, math.nan)
    with pytest.raises(TrainingError, match=r"b: refused, the update of b is too long"):
        _run(tmp_path / "long", name, 1e6, refuse_updates=50)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_name_is_fedavg_with_the_key(tmp_path: Path, name: str) -> None:
    keys = {"aggregate": name, **OPTIONS[name]}
    for bound in ({}, {"clip_updates": 0.3}):
        named = _run(tmp_path / f"named{len(bound)}", name, 1.0, **bound)
        keyed = _run(tmp_path / f"keyed{len(bound)}", "fedavg", 1.0, **keys, **bound)
        assert equal(named.shared, keyed.shared)
        assert named.experiment.strategy.declares.needs_individual_updates


def test_what_cannot_go_is_refused() -> None:
    for name, options in (
        ("trimmed_mean", {"trim": 0}),
        ("trimmed_mean", {"trim": 0.5}),
        ("median", {"trim": 0.2}),
        ("median", {"weights": "examples"}),
        ("median", {"clip_updates": 0}),
        ("median", {"clip_updates": 2, "refuse_updates": 1}),
    ):
        with pytest.raises(ConfigError):
            registry.build("strategies", name, options)
