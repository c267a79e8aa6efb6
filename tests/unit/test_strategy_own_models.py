"""ditto, apfl, pfedme: rounds of least squares against the papers' steps in float64, and the ends of their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import registry
from consilium.errors import ConfigError
from consilium.protocols import Strategy
from consilium.strategies.ditto import OWN
from consilium.tensors import Tensors, equal, within
from tests import federation, toy

SITES = federation.hospitals(14, 9, 20)
EXACT = {"rtol": 0, "atol": 1e-10}
HALF = {"participation": 0.67}
NO_CLIPPING = {"clip_norm": 0}
Model = dict[str, Tensor]
Step = Callable[[Model, Model, dict[str, float], int], tuple[Model, Model, dict[str, float]]]
DRAWN = {2: ("a", "c"), 3: ("b",)}


def _build(name: str, **options: Any) -> Strategy:
    found: Strategy = registry.build("strategies", name, options)
    return found


def _slope(model: Model, site: str) -> Model:
    """Gradient of the site's mean squared error."""
    leaves = {name: value.clone().requires_grad_() for name, value in model.items()}
    x, y = toy.data(site)
    weight = toy.frozen() + toy.SCALE * leaves["layer.lora.shared.b"] @ leaves["layer.lora.shared.a"]
    loss = ((x @ weight.T @ leaves["head.weight"].T - y) ** 2).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _rounds(step: Callable[..., Any], rounds: int, steps: int, beta: float = 1.0, kept: float = 0.0) -> Any:
    """FedAvg of w beside models v that start as the first w; `step(site, w, v, received, extra, number)`."""
    w = toy.initial(toy.specs(_build("fedavg")), 1)
    own: dict[str, Model] = {}
    extra = dict.fromkeys(toy.SITES, kept)
    for number in range(1, rounds + 1):
        there, sent = DRAWN.get(number, toy.SITES), {}
        for site in there:
            mine, v = dict(w), own.get(site, dict(w))
            for at in range(1, steps + 1):
                mine, v, extra[site] = step(site, mine, v, w, extra[site], at)
            own[site], sent[site] = v, mine
        total = sum(toy.SIZES[site] for site in there)
        mean = {n: sum(toy.SIZES[s] * m[n] for s, m in sent.items()) / total for n in w}
        w = {n: (1 - beta) * w[n] + beta * mean[n] for n in w}
    return w, own, extra


def _down(model: Model, slope: Model, rate: float | None = None) -> Model:
    return {name: value - (rate or toy.RATE) * slope[name] for name, value in model.items()}


def _assert_own(outcome: toy.Outcome, own: Mapping[str, Model]) -> None:
    for site, model in own.items():
        torch.testing.assert_close(within(OWN, outcome.personal[site].tensors), model, **EXACT)


# ------------------------------------------------------------------------------------------------ Ditto
def test_dittos_rounds_are_the_papers() -> None:
    lam = 0.7

    def step(site: str, w: Model, v: Model, received: Model, extra: float, at: int) -> Any:  # noqa: ARG001
        pulled = {n: g + lam * (v[n] - received[n]) for n, g in _slope(v, site).items()}
        return _down(w, _slope(w, site)), _down(v, pulled), extra

    outcome = toy.federate(_build("ditto", strength=lam), 4, drawn=DRAWN)
    w, own, _ = _rounds(step, 4, 3)
    torch.testing.assert_close(dict(outcome.server.shared), w, **EXACT)
    _assert_own(outcome, own)


@pytest.mark.parametrize("strength", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("head", [None, "personal"])
def test_dittos_shared_model_is_fedavgs_for_every_pull(tmp_path: Path, strength: float, head: str | None) -> None:
    """I17."""
    tables: dict[str, Any] = {"head": {"share": head}, "train": {**HALF, "moments": "keep"}}
    found = _run(tmp_path / "ditto", "ditto", {"strength": strength}, **tables)
    plain = _run(tmp_path / "fedavg", "fedavg", {}, **tables)
    assert equal(found.shared, plain.shared)
    assert not equal(found.served("a"), plain.served("a"))


def test_ditto_without_a_pull_is_local_training(tmp_path: Path) -> None:
    """I17, from the common start."""
    found = _run(tmp_path / "ditto", "ditto", {"strength": 0})
    secrets = dict.fromkeys(SITES, 3)  # the site's secret is the run's seed: starts agree
    local = federation.run(tmp_path / "local", federation.configure(strategy={"name": "local"}), SITES, secrets=secrets)
    assert all(equal(found.served(site), local.served(site)) for site in SITES)


def test_a_great_pull_holds_dittos_models_at_the_shared_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """I17: with lambda * rate = 1 each step ends at w but for one gradient step; the gap falls like the rate."""
    gaps = []
    for rate in (1e-2, 1e-3, 1e-4):
        monkeypatch.setattr(toy, "RATE", rate)
        outcome = toy.federate(_build("ditto", strength=1 / rate), 1)
        own = within(OWN, outcome.personal["a"].tensors)
        start = toy.initial(toy.specs(_build("fedavg")), 1)
        gaps.append(max(float((own[n] - start[n]).abs().max()) for n in own))
    assert gaps[0] > 8 * gaps[1] > 60 * gaps[2] > 0


# ------------------------------------------------------------------------------------------------ APFL
@pytest.mark.parametrize("learn", [True, False])
def test_apfls_rounds_are_the_papers(monkeypatch: pytest.MonkeyPatch, learn: bool) -> None:
    """v and alpha step at the mixture: a library's version, which steps v on its own loss, gives other numbers."""
    monkeypatch.setattr(toy, "RATE", 0.01)

    def step(site: str, w: Model, v: Model, received: Model, alpha: float, at: int) -> Any:  # noqa: ARG001
        mixed = {n: alpha * v[n] + (1 - alpha) * w[n] for n in v}
        slope = _slope(mixed, site)
        along = sum(float((slope[n] * (v[n] - w[n])).sum()) for n in v)
        moved = _down(v, {n: alpha * g for n, g in slope.items()})
        return _down(w, _slope(w, site)), moved, min(1.0, max(0.0, alpha - toy.RATE * along * learn))

    outcome = toy.federate(_build("apfl", alpha=0.3, learn_alpha=learn), 4, drawn=DRAWN)
    w, own, alphas = _rounds(step, 4, 3, kept=0.3)
    torch.testing.assert_close(dict(outcome.server.shared), w, **EXACT)
    _assert_own(outcome, own)
    found = {site: float(outcome.personal[site].tensors["/alpha"]) for site in toy.SITES}
    assert found == pytest.approx(alphas, abs=1e-10)
    assert (len(set(found.values())) > 1) == learn
    served = outcome.model(_build("apfl"), "a")
    for name, value in own["a"].items():
        torch.testing.assert_close(served[name], alphas["a"] * value + (1 - alphas["a"]) * w[name], **EXACT)


def test_apfl_at_its_ends_is_fedavg_and_local_training(tmp_path: Path) -> None:
    """I18."""
    plain = _run(tmp_path / "fedavg", "fedavg", {}, train=NO_CLIPPING)
    shared = _run(tmp_path / "zero", "apfl", {"alpha": 0, "learn_alpha": False}, train=NO_CLIPPING)
    assert equal(shared.shared, plain.shared)
    assert all(equal(shared.served(site), plain.served(site)) for site in SITES)
    alone = _run(tmp_path / "one", "apfl", {"alpha": 1, "learn_alpha": False}, train=NO_CLIPPING)
    assert equal(alone.shared, plain.shared)
    settings = federation.configure(strategy={"name": "local"}, train=NO_CLIPPING)
    local = federation.run(tmp_path / "local", settings, SITES, secrets=dict.fromkeys(SITES, 3))
    assert all(equal(alone.served(site), local.served(site)) for site in SITES)
    clipped = _run(tmp_path / "clipped", "apfl", {"alpha": 1, "learn_alpha": False}, train={"clip_norm": 0.01})
    clipped_alone = _run(tmp_path / "clipped avg", "fedavg", {}, train={"clip_norm": 0.01})
    assert not equal(clipped.shared, clipped_alone.shared), "a norm over both models: the departure that is named"


# ------------------------------------------------------------------------------------------------ pFedMe
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_pfedmes_rounds_are_the_papers(beta: float) -> None:
    lam, eta, inner = 2.0, 0.2, 2

    def step(site: str, w: Model, theta: Model, received: Model, extra: float, at: int) -> Any:  # noqa: ARG001
        theta = _down(theta, {n: g + lam * (theta[n] - w[n]) for n, g in _slope(theta, site).items()})
        moved = {n: w[n] - eta * lam * (w[n] - theta[n]) for n in w}
        return (w if at % inner and at < 5 else moved), theta, extra  # 2, 2 and 1 steps

    options = {"strength": lam, "outer_rate": eta, "inner_steps": inner, "beta": beta}
    outcome = toy.federate(_build("pfedme", **options), 4, steps=5, drawn=DRAWN)
    w, own, _ = _rounds(step, 4, 5, beta=beta)
    torch.testing.assert_close(dict(outcome.server.shared), w, **EXACT)
    _assert_own(outcome, own)


def test_pfedme_with_a_great_pull_is_fedavg_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """I18: with theta at its minimum w takes a gradient step on the envelope, whose gradient nears the loss's."""
    start = toy.initial(toy.specs(_build("fedavg")), 1)
    eta, gaps = 0.05, []
    for lam in (100.0, 1000.0, 10000.0):
        monkeypatch.setattr(toy, "RATE", 0.5 / lam)
        strategy = _build("pfedme", strength=lam, outer_rate=eta, inner_steps=60)
        learned = toy.federate(strategy, 1, steps=60).learned[0]["a"].update
        step = _down(start, _slope(start, "a"), eta)
        gaps.append(max(float((learned[n] - step[n]).abs().max()) for n in step))
    assert gaps[0] > 7 * gaps[1] > 49 * gaps[2] > 0


def test_pfedme_leaves_the_shared_model_where_it_may_not_move() -> None:
    outcome = toy.federate(_build("pfedme", outer_rate=0.0), 2, steps=5)
    start = toy.initial(toy.specs(_build("fedavg")), 1)
    for name, value in outcome.server.shared.items():
        torch.testing.assert_close(value, start[name], rtol=1e-15, atol=1e-15)


# ------------------------------------------------------------------------------------------------ all of them
def _run(folder: Path, name: str, options: Mapping[str, Any], **tables: Any) -> federation.Outcome:
    settings = federation.configure(strategy={"name": name, **options}, **tables)
    return federation.run(folder, settings, SITES)


NAMES = ("ditto", "apfl", "pfedme")


@pytest.mark.parametrize("name", NAMES)
def test_a_sites_own_model_never_travels_and_bytes_are_fedavgs(tmp_path: Path, name: str) -> None:
    outcome = _run(tmp_path / name, name, {})
    sent = {n for _, _, tensors in outcome.sent("up", "down", "finish") for n in tensors}
    assert sent == outcome.experiment.model.specs.keys()
    for site in SITES:
        federation.assert_absent(outcome.served(site), outcome.wire)
    plain = _run(tmp_path / "fedavg", "fedavg", {})
    assert outcome.progress.ledger.payload == plain.progress.ledger.payload
    assert not outcome.experiment.strategy.declares.needs_individual_updates
    models = outcome.experiment.strategy.deploy(outcome.shared, toy.Personal())
    assert models.keys() == {"personal", "global"}


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_factor_is_frozen_in_a_sites_own_model_too(tmp_path: Path, name: str) -> None:
    settings = federation.configure(
        strategy={"name": name}, tuner=[{"name": "lora", "rank": 4, "freeze_a": True}], train={"moments": "keep"}
    )
    outcome = federation.run(tmp_path, settings, SITES)
    start = outcome.experiment.model.initial(3)
    for variable, value in outcome.served("a").items():
        assert torch.equal(value, start[variable]) == (".lora." in variable and variable.endswith(".a")), variable


@pytest.mark.parametrize("name", NAMES)
def test_other_sums_and_changed_bases_reach_both_models(tmp_path: Path, name: str) -> None:
    outcome = _run(tmp_path, name, {"aggregate": "residual"}, train={"rounds": 2})
    served: Tensors = outcome.served("a")
    assert all(torch.isfinite(value).all() for value in served.values())
    assert "blocks.0.attn.qkv.weight" in served


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ditto", {"strength": -1}),
        ("apfl", {"alpha": 1.5}),
        ("pfedme", {"strength": 0}),
        ("pfedme", {"inner_steps": 0}),
    ],
)
def test_impossible_options_are_refused(name: str, options: Mapping[str, float]) -> None:
    with pytest.raises(ConfigError):
        registry.build("strategies", name, options)
