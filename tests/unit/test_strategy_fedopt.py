"""FedOpt against Reddi et al.'s algorithm 2 in NumPy; I16; what has no effect is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium import registry
from consilium.errors import ConfigError
from consilium.protocols import ServerState, Strategy, Update
from consilium.tensors import equal
from tests import federation, quadratics
from tests.quadratics import Federation

SITES = quadratics.problems(30, 50, 20)
START = np.linspace(-1, 1, quadratics.SIZE)
DRAWS = (("a", "b", "c"), ("a", "b"), ("c",), ("a", "c"), ("b", "c"))
CLOSE = {"rtol": 0, "atol": 1e-10}
RATE, STEPS = 0.05, 3


def _fedopt(**options: Any) -> Strategy:
    member: Strategy = registry.build("strategies", "fedopt", options)
    return member


def _by_the_paper(kind: str, eta: float, b1: float, b2: float, tau: float, v: float) -> list[np.ndarray]:
    x, m, square, found = START.copy(), np.zeros_like(START), np.full_like(START, v), []
    for drawn in DRAWS:
        changes = []
        for site in drawn:
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * SITES[site].gradient(y)
            changes.append(y - x)
        delta = np.average(changes, axis=0, weights=[SITES[site].images for site in drawn])
        m = b1 * m + (delta if kind == "avgm" else (1 - b1) * delta)
        if kind == "adagrad":
            square = square + delta**2
        elif kind == "yogi":
            square = square - (1 - b2) * delta**2 * np.sign(square - delta**2)
        elif kind == "adam":
            square = b2 * square + (1 - b2) * delta**2
        x = x + eta * (m if kind == "avgm" else m / (np.sqrt(square) + tau))
        found.append(x)
    return found


@pytest.mark.parametrize("kind", ["avgm", "adagrad", "adam", "yogi"])
@pytest.mark.parametrize("changed", [False, True])
def test_it_is_the_papers_algorithm(kind: str, changed: bool) -> None:
    options: dict[str, Any] = {"server": kind, "server_learning_rate": 0.03}
    numbers = (0.03, 0.9, 0.99, 1e-3, 1e-6)
    if changed:
        options |= {"beta1": 0.5}
        options |= {"beta2": 0.7} if kind in ("adam", "yogi") else {}
        options |= {"tau": 0.1, "start": "zero"} if kind != "avgm" else {}
        numbers = (0.03, 0.5, 0.7, 0.1, 0.0)
    here = Federation(_fedopt(**options), SITES, START, STEPS, RATE)
    for drawn, x in zip(DRAWS, _by_the_paper(kind, *numbers), strict=True):
        here.round(*drawn)
        np.testing.assert_allclose(here.shared, x, **CLOSE)


def test_the_first_step_of_adam_is_torchs() -> None:
    """I16: from v = 0, eta = sqrt(1 - b2) / (1 - b1) and tau = eps sqrt(1 - b2)."""
    b1, b2, eps = 0.9, 0.99, 1e-3
    eta, tau = np.sqrt(1 - b2) / (1 - b1), eps * np.sqrt(1 - b2)
    member = _fedopt(server="adam", server_learning_rate=eta, tau=tau, start="zero", beta1=b1, beta2=b2)
    here = Federation(member, SITES, START, STEPS, RATE)
    mean = Federation(_fedopt(server="avgm", server_learning_rate=1, beta1=0), SITES, START, STEPS, RATE)
    here.round()
    mean.round()
    weight = torch.tensor(START, requires_grad=True)
    weight.grad = torch.tensor(START - mean.shared)
    torch.optim.Adam([weight], lr=1.0, betas=(b1, b2), eps=eps).step()
    np.testing.assert_allclose(here.shared, weight.detach().numpy(), **CLOSE)
    assert np.abs(here.shared - START).max() > 0.1


def test_a_server_step_of_one_without_momentum_is_fedavg(tmp_path: Path) -> None:
    """I16, and its negative: any momentum, or another step, is not."""
    options = {"same": {"beta1": 0.0, "server_learning_rate": 1.0}, "momentum": {"server_learning_rate": 1.0}}
    settings = federation.configure(train={"participation": 0.67})
    sites = federation.hospitals(14, 9, 20)
    fedavg = federation.run(tmp_path / "fedavg", settings, sites)
    for name, changed in options.items():
        member = _fedopt(server="avgm", **changed)
        outcome = federation.run(tmp_path / name, settings, sites, strategy=member)
        assert equal(outcome.shared, fedavg.shared) == (name == "same")


@pytest.mark.parametrize("kind", ["avgm", "adagrad", "adam", "yogi"])
def test_what_no_site_trained_is_left_alone(kind: str) -> None:
    member = _fedopt(server=kind)
    state = member.init_server(quadratics.split(START), quadratics.SPECS, ("a", "b"))
    moved = {"body": state.shared["body"] + 1}
    after = member.combine(state, [Update("a", moved, 3)], quadratics.SPECS)
    assert after.memory.keys() == ({"m/body"} if kind == "avgm" else {"m/body", "v/body"})
    again = member.combine(after, [Update("a", {"head": state.shared["head"] + 1}, 3)], quadratics.SPECS)
    assert torch.equal(again.shared["body"], after.shared["body"])
    assert torch.equal(again.memory["m/body"], after.memory["m/body"])
    none = member.combine(again, [], quadratics.SPECS)
    assert equal(none.shared, again.shared)
    assert equal(none.memory, again.memory)


@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi"])
def test_an_update_of_nothing_moves_nothing(kind: str) -> None:
    member = _fedopt(server=kind, start="zero")
    state: ServerState = member.init_server(quadratics.split(START), quadratics.SPECS, ("a",))
    after = member.combine(state, [Update("a", {n: v.clone() for n, v in state.shared.items()}, 1)], quadratics.SPECS)
    assert equal(after.shared, state.shared)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aggregate": "product_svd"}, "one basis"),
        ({"aggregate": "stack"}, "one basis"),
        ({"server": "avgm", "beta2": 0.9}, "beta2"),
        ({"server": "adagrad", "beta2": 0.9}, "beta2"),
        ({"server": "avgm", "tau": 0.1}, "no effect"),
        ({"server": "avgm", "start": "zero"}, "no effect"),
        ({"server_learning_rate": 0}, "greater than 0"),
        ({"beta1": 1}, "less than 1"),
        ({"momentum": 0.9}, "unknown key"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _fedopt(**options)


def test_the_robust_sums_can_be_stepped_towards() -> None:
    here = Federation(_fedopt(server="avgm", beta1=0, server_learning_rate=1, aggregate="median"), SITES, START)
    here.round()
    assert here.strategy.declares.needs_individual_updates
    middle = np.median([START - 0.05 * p.gradient(START) for p in SITES.values()], axis=0)
    np.testing.assert_allclose(here.shared, middle, **CLOSE)
