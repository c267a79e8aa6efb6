"""What FedAvg, its relatives and the federated LoRA methods do in a round, written out from their papers in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from consilium import registry
from tests import quadratics, toy
from tests.quadratics import BODY, Federation, Problem

DRAWS = (("a", "b"), ("b", "c"), ("a", "c"), ("a", "b", "c"))
PROBLEMS = quadratics.problems(30, 50, 20)
START = np.linspace(-1, 1, quadratics.SIZE)
SECRETS = {site: START + 1 + at for at, site in enumerate(PROBLEMS)}
RATE, STEPS = 0.05, 3
CLOSE = {"rtol": 0, "atol": 1e-10}


# ------------------------------------------------------------------------------------------------ on quadratics
def _local(problem: Problem, w: np.ndarray, pull: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    for _ in range(STEPS):
        w = w - RATE * (problem.gradient(w) + pull(w))
    return w


def _weights(kind: str, drawn: Sequence[str]) -> list[float]:
    return [PROBLEMS[site].images if kind == "examples" else 1 for site in drawn]


def _rounds(name: str, weights: str, mu: float) -> None:
    member = registry.build("strategies", name, {"weights": weights, **({"mu": mu} if mu else {})})
    here, w = Federation(member, PROBLEMS, START, STEPS, RATE), START
    for drawn in DRAWS:
        ends = [_local(PROBLEMS[site], w, lambda v, x=w: mu * (v - x)) for site in drawn]
        plain = [_local(PROBLEMS[site], w, lambda v: 0 * v) for site in drawn]
        w, other = (np.average(ends, axis=0, weights=_weights(kind, drawn)) for kind in (weights, OTHER[weights]))
        here.round(*drawn)
        np.testing.assert_allclose(here.shared, w, **CLOSE)
        assert np.abs(other - w).max() > 1e-4, "weights act"
        assert not mu or np.abs(np.subtract(ends, plain)).max() > 1e-3, "the pull acts"


OTHER = {"examples": "uniform", "uniform": "examples"}


@pytest.mark.parametrize("weights", OTHER)
def test_fedavgs_rounds_are_the_papers(weights: str) -> None:
    """Algorithm 1 of arXiv 1602.05629."""
    _rounds("fedavg", weights, 0.0)


@pytest.mark.parametrize("weights", OTHER)
def test_fedproxs_rounds_are_the_papers(weights: str) -> None:
    """Equation 2 of arXiv 1812.06127."""
    _rounds("fedprox", weights, 0.7)


@pytest.mark.parametrize("name", ["local", "fedper", "lg", "fedbn"])
def test_rules_on_tags_are_the_papers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Body and head train together; what the rule shares is averaged, the rest goes on from the site's own start."""
    if name == "fedbn":  # the second tensor is a norm
        norm = replace(quadratics.SPECS["head"], tag=replace(quadratics.SPECS["head"].tag, role="norm"))
        monkeypatch.setattr(quadratics, "SPECS", {**quadratics.SPECS, "head": norm})
    shared = {"local": slice(0, 0), "fedper": slice(0, BODY), "fedbn": slice(0, BODY), "lg": slice(BODY, None)}[name]
    here = Federation(registry.build("strategies", name, {}), PROBLEMS, START, STEPS, RATE, SECRETS)
    common, own = START[shared], dict(SECRETS)
    for drawn in DRAWS:
        for site in drawn:
            w = own[site].copy()
            w[shared] = common
            own[site] = _local(PROBLEMS[site], w, lambda v: 0 * v)
        if name != "local":
            common = np.average([own[site][shared] for site in drawn], axis=0, weights=_weights("examples", drawn))
        here.round(*drawn)
        for site in PROBLEMS:
            wanted = own[site].copy()
            wanted[shared] = common
            np.testing.assert_allclose(here.model(site), wanted, **CLOSE)


# ------------------------------------------------------------------------------------------------ on factors
TRAINED: Mapping[str, Callable[[int], set[str]]] = {
    "ffa": lambda round: {"B", "H"},  # noqa: ARG005
    "rolora": lambda round: {"B", "H"} if round % 2 else {"A", "H"},
}
NAMES = {f"{toy.LAYER}.lora.shared.a": "A", f"{toy.LAYER}.lora.shared.b": "B", "head.weight": "H"}
Values = dict[str, Tensor]


def _descended(v: Values, names: set[str], site: str) -> Values:
    """Three steps of gradient descent of mean squares of H (W + s B A) x - y."""
    x, y = toy.data(site)
    for _ in range(3):
        leaves = {n: t.detach().requires_grad_(n in names) for n, t in v.items()}
        error = x @ (leaves["W"] + toy.SCALE * leaves["B"] @ leaves["A"]).T @ leaves["H"].T - y
        slopes = torch.autograd.grad((error**2).mean(), [leaves[n] for n in sorted(names)])
        v = {**v, **{n: v[n] - toy.RATE * slope for n, slope in zip(sorted(names), slopes, strict=True)}}
    return v


def _next(name: str, now: Values, start: Values, sites: list[Values], shares: list[float]) -> Values:
    """The server's half: what every site has after the round."""

    def mean(n: str) -> Tensor:
        return sum((p * v[n] for p, v in zip(shares, sites, strict=True)), torch.zeros_like(now[n]))

    products = sum((p * v["B"] @ v["A"] for p, v in zip(shares, sites, strict=True)), torch.zeros_like(now["W"]))
    means = {n: mean(n) for n in ("A", "B", "H")}
    if name == "flexlora":
        u, s, vh = torch.linalg.svd(products, full_matrices=False)
        return {**now, "A": vh[: toy.RANK], "B": u[:, : toy.RANK] * s[: toy.RANK], "H": means["H"]}
    if name == "flora":
        return {**start, "W": now["W"] + toy.SCALE * products, "H": means["H"]}
    if name == "fedex":
        return {**now, **means, "W": now["W"] + toy.SCALE * (products - means["B"] @ means["A"])}
    return {**now, "A": means["A"]} if name == "fedsa" else {**now, **means}


@pytest.mark.parametrize("name", ["fedit", "ffa", "rolora", "flexlora", "flora", "fedex", "fedsa", "feddpa_f"])
def test_round_by_round_the_factors_are_the_formulas(name: str) -> None:
    """Section 2.1 and 2.2: the factors themselves, W + s B A (all that acts of a refactored product), and the head;
    a wrong residual (transposed, without its weights) or one site's update alone would not pass."""
    drawn = dict(enumerate(DRAWS, start=1))
    outcome = toy.federate(_member(name), 4, drawn=drawn, b_at_zero=True)
    first = {NAMES[n]: v for n, v in toy.initial(_specs(name), 1).items() if n in NAMES}
    start = {**first, "B": torch.zeros_like(first["B"]), "W": toy.frozen()}
    now, own = start, _own(name)
    for number, sites in drawn.items():
        found = {
            site: _descended({**now, **own[site]}, TRAINED.get(name, lambda _: {"A", "B", "H"})(number), site)
            for site in sites
        }
        own |= {site: {n: v[n] for n in own[site]} for site, v in found.items()}
        total = sum(toy.SIZES[site] for site in sites)
        now = _next(name, now, start, [*found.values()], [toy.SIZES[site] / total for site in sites])
    for site in toy.SITES:
        model = outcome.model(_member(name), site)
        held = {NAMES[n]: v for n, v in model.items() if n in NAMES} | {
            "W": model.get(f"{toy.LAYER}.weight", toy.frozen())
        }
        wanted = {**now, **own[site]}
        for n in ("A", "B", "H", "W") if name != "flexlora" else ("H", "W"):
            torch.testing.assert_close(held[n], wanted[n], **CLOSE)
        torch.testing.assert_close(held["B"] @ held["A"], wanted["B"] @ wanted["A"], **CLOSE)
    assert (now["W"] - start["W"]).abs().max() > 1e-4 or name not in ("flora", "fedex")


def _specs(name: str) -> Any:
    return toy.specs(_member(name))


def _member(name: str) -> Any:
    return registry.build("strategies", name, {"weights": "examples"})


def _own(name: str) -> dict[str, Values]:
    """FedSA's left factor and head start, and stay, at the site."""
    starts = {site: toy.initial(_specs(name), 2 + at) for at, site in enumerate(toy.SITES)}
    kept = {"B", "H"} if name == "fedsa" else set()
    return {site: {NAMES[n]: v for n, v in start.items() if NAMES.get(n) in kept} for site, start in starts.items()}
