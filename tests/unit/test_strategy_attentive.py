"""fedala, fedamp, fedacs: mixing weights learnt at a site, means of its own for each site; against the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from consilium import registry
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError
from consilium.protocols import Strategy, Update
from consilium.strategies.attentive import similarities
from consilium.tensors import Tensors, equal, under, within
from tests import federation, toy

SITES = federation.hospitals(9, 14, 12, 7)
HALF = {"rounds": 5, "participation": 0.5}
EXACT = {"rtol": 0, "atol": 1e-10}
Model = dict[str, Tensor]


def _build(name: str, **options: Any) -> Strategy:
    found: Strategy = registry.build("strategies", name, options)
    return found


def _run(folder: Path, name: str, options: Mapping[str, Any], **tables: Any) -> federation.Outcome:
    return federation.run(folder, federation.configure(strategy={"name": name, **options}, **tables), SITES)


def _personal(outcome: federation.Outcome, site: str) -> Tensors:
    states = StateFolder(outcome.folder / "sites" / site, outcome.experiment.handshake.agreement)
    return states.load(outcome.progress.builds_on[site]).personal.tensors


def _slope(model: Model, site: str) -> Model:
    leaves = {name: value.clone().requires_grad_() for name, value in model.items()}
    x, y = toy.data(site)
    weight = toy.frozen() + toy.SCALE * leaves["layer.lora.shared.b"] @ leaves["layer.lora.shared.a"]
    loss = ((x @ weight.T @ leaves["head.weight"].T - y) ** 2).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _start() -> Model:
    return toy.initial(toy.specs(_build("fedavg")), 1)


# ------------------------------------------------------------------------------------------------ FedALA
def test_fedalas_rounds_are_the_papers() -> None:
    rate = 3.0
    outcome = toy.federate(_build("fedala", mixing_epochs=2, mixing_rate=rate), 4)
    w, own, omegas = _start(), dict.fromkeys(toy.SITES, _start()), {}
    omegas = {site: {n: torch.ones_like(v) for n, v in w.items()} for site in toy.SITES}
    for _ in range(4):
        for site in toy.SITES:
            old, omega = own[site], omegas[site]
            for _ in range(2):
                mixed = {n: old[n] + (w[n] - old[n]) * omega[n] for n in w}
                slope = _slope(mixed, site)
                omega = {n: (omega[n] - rate * slope[n] * (w[n] - old[n])).clamp(0, 1) for n in w}
            model = {n: old[n] + (w[n] - old[n]) * omega[n] for n in w}
            for _ in range(3):
                slope = _slope(model, site)
                model = {n: v - toy.RATE * slope[n] for n, v in model.items()}
            own[site], omegas[site] = model, omega
        total = sum(toy.SIZES.values())
        w = {n: sum(toy.SIZES[s] * own[s][n] for s in toy.SITES) / total for n in w}
    torch.testing.assert_close(dict(outcome.server.shared), w, **EXACT)
    for site in toy.SITES:
        torch.testing.assert_close(within("own", outcome.personal[site].tensors), own[site], **EXACT)
        torch.testing.assert_close(within("omega", outcome.personal[site].tensors), omegas[site], **EXACT)
    values = torch.cat([v.flatten() for t in omegas.values() for v in t.values()])
    assert ((values > 0) & (values < 1)).any(), "something was learnt"


def test_fedala_with_omega_at_one_is_fedavg(tmp_path: Path) -> None:
    """Nothing to mix but the head, and a head that no round trains stays as it was sent: omega has no gradient."""
    train = {**HALF, **federation.SGD}
    plain = _run(tmp_path / "avg", "fedavg", {}, train=train)
    still = _run(tmp_path / "ala", "fedala", {"mixing_rate": 1e-30}, train=train)
    assert equal(plain.shared, still.shared)
    moving = _run(tmp_path / "mix", "fedala", {"mixing_rate": 20.0}, train=train)
    assert not equal(plain.shared, moving.shared)
    omegas = torch.cat([v.flatten() for s in SITES for n, v in _personal(moving, s).items() if n.startswith("omega/")])
    assert omegas.min() >= 0
    assert omegas.max() <= 1
    assert ((omegas > 0) & (omegas < 1)).any()
    assert not any("omega" in name for _, _, t in moving.sent("up", "down", "finish") for name in t)
    assert not equal(moving.served("a"), moving.served("b"))


@pytest.mark.parametrize(("start", "mixed"), [(None, set()), (0, set(range(6))), (4, {4, 5})])
def test_omega_acts_from_a_block_on(tmp_path: Path, start: int | None, mixed: set[int]) -> None:
    options = {} if start is None else {"mix_from_block": start}
    outcome = _run(tmp_path, "fedala", {"mix_from_block": start} if start is not None else options, train={"rounds": 1})
    specs = outcome.experiment.model.specs
    found = {specs[name].tag.block for name in within("omega", _personal(outcome, "a"))}
    assert found == (mixed | {None} if start is not None else set(range(6)) | {None})
    with pytest.raises(ConfigError, match="no such block"):
        federation.assemble(federation.configure(strategy={"name": "fedala", "mix_from_block": 6}))


# ------------------------------------------------------------------------------------------------ FedAMP
def _by_hand(weights: Any, pull: float, rounds: int) -> tuple[dict[str, Model], dict[str, Model]]:
    """Every site sent its own mean; gradient descent on F_i(w) + pull/2 ||w - u_i||^2 from the site's own model."""
    own, means = dict.fromkeys(toy.SITES, _start()), dict.fromkeys(toy.SITES, _start())
    for _ in range(rounds):
        new = {}
        for site in toy.SITES:
            model, u = own[site], means[site]
            for _ in range(3):
                slope = _slope(model, site)
                model = {n: v - toy.RATE * (slope[n] + pull * (v - u[n])) for n, v in model.items()}
            new[site] = model
        own = new
        xi = weights(own)
        means = {i: {n: sum(xi[i][j] * own[j][n] for j in own) for n in own[i]} for i in own}
    return own, means


def test_fedamps_rounds_are_the_papers_with_the_distance_squared() -> None:
    sigma, step = 5.0, 2.0

    def weights(own: Mapping[str, Model]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for i in own:
            squares = {j: sum(float(((own[i][n] - own[j][n]) ** 2).sum()) for n in own[i]) for j in own if j != i}
            found[i] = {j: step * np.exp(-d / sigma) / sigma for j, d in squares.items()}
            found[i][i] = 1 - sum(found[i].values())
        return found

    outcome = toy.federate(_build("fedamp", sigma=sigma, step=step, pull=0.4), 3)
    own, means = _by_hand(weights, 0.4, 3)
    for site in toy.SITES:
        torch.testing.assert_close(within("own", outcome.personal[site].tensors), own[site], **EXACT)
        torch.testing.assert_close(within(f"mean/{site}", outcome.server.memory), means[site], **EXACT)


def test_fedamp_refuses_a_step_at_which_the_others_weigh_more_than_all(tmp_path: Path) -> None:
    _run(tmp_path / "fits", "fedamp", {"step": 0.33}, train={"rounds": 1})
    with pytest.raises(ConfigError, match="more than one in all"):
        _run(tmp_path / "not", "fedamp", {"step": 0.34}, train={"rounds": 1})


# ------------------------------------------------------------------------------------------------ FedACS
def _dense(model: Model) -> Tensor:
    return toy.SCALE * model["layer.lora.shared.b"] @ model["layer.lora.shared.a"]


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_fedacss_rounds_are_the_formulas(alpha: float) -> None:
    temperature, least = 0.5, 0.2

    def weights(own: Mapping[str, Model]) -> dict[str, dict[str, float]]:
        found = {}
        for i in own:
            s = {
                j: float((_dense(own[i]) * _dense(own[j])).sum() / _dense(own[i]).norm() / _dense(own[j]).norm())
                for j in own
            }
            near = {j: np.exp(v / temperature) for j, v in s.items() if v >= least}
            found[i] = {j: alpha * near.get(j, 0.0) / sum(near.values()) + (1 - alpha) * (i == j) for j in own}
        return found

    options = {"temperature": temperature, "threshold": least, "alpha": alpha, "pull": 0.4}
    outcome = toy.federate(_build("fedacs", **options), 3)
    own, means = _by_hand(weights, 0.4, 3)
    for site in toy.SITES:
        torch.testing.assert_close(within("own", outcome.personal[site].tensors), own[site], **EXACT)
        torch.testing.assert_close(within(f"mean/{site}", outcome.server.memory), means[site], **EXACT)


def test_fedacs_with_no_threshold_and_a_great_temperature_is_the_uniform_mean() -> None:
    strategy = _build("fedacs", threshold=-1, temperature=1e12)
    outcome = toy.federate(strategy, 1)
    own = [within("own", outcome.personal[site].tensors) for site in toy.SITES]
    for site in toy.SITES:
        for name, value in within(f"mean/{site}", outcome.server.memory).items():
            torch.testing.assert_close(value, sum(model[name] for model in own) / 3, **EXACT)


def test_likeness_knows_no_gauge_and_finds_planted_clusters() -> None:
    specs = {n: s for n, s in toy.specs(_build("fedavg")).items() if n.startswith("layer")}
    directions = [toy.initial(specs, 70 + at) for at in range(3)]
    models: dict[str, Model] = {}
    for at in range(12):
        noise = toy.initial(specs, 200 + at)
        models[f"site{at:02d}"] = {n: v + 0.1 * noise[n] for n, v in directions[at % 3].items()}
    gauge = torch.eye(2, dtype=torch.float64) + 0.3 * toy.draw(3, 2, 2)
    a, b = "layer.lora.shared.a", "layer.lora.shared.b"
    turned = {s: {b: m[b] @ torch.linalg.inv(gauge), a: gauge @ m[a]} for s, m in models.items()}
    first, second = similarities(models, specs), similarities(turned, specs)
    for i in models:
        for j in models:
            assert first[i][j] == pytest.approx(second[i][j], abs=1e-10)
    rows = _build("fedacs").rows(models, specs, 1)  # type: ignore[attr-defined]
    for at, row in enumerate(rows.values()):
        assert sum(row.values()) == pytest.approx(1)
        assert min(row.values()) >= 0
        assert sum(v for other, v in enumerate(row.values()) if other % 3 == at % 3) >= 0.95


def test_a_site_that_none_is_like_keeps_its_own_model() -> None:
    outcome = toy.federate(_build("fedacs", threshold=1.0), 2)
    for site in toy.SITES:
        mine = within("own", outcome.personal[site].tensors)
        torch.testing.assert_close(within(f"mean/{site}", outcome.server.memory), mine, **EXACT)
    zero = {site: {n: v * (not n.endswith(".b")) for n, v in _start().items()} for site in "ab"}
    found = similarities(zero, toy.specs(_build("fedavg")))
    assert found == {"a": {"a": 0.0, "b": 0.0}, "b": {"a": 0.0, "b": 0.0}}
    rows = _build("fedacs").rows({**zero, "c": _start()}, toy.specs(_build("fedavg")), 1)  # type: ignore[attr-defined]
    assert rows["a"] == pytest.approx(dict.fromkeys("abc", 1 / 3)), "who has learnt nothing is sent everybody's mean"


def test_the_threshold_grows_with_the_rounds() -> None:
    strategy = _build("fedacs", threshold=-1, threshold_growth=0.5)
    models = {site: toy.initial(toy.specs(strategy), at) for at, site in enumerate("abc")}
    counts = []
    for number in (0, 2, 4):
        rows = strategy.rows(models, toy.specs(strategy), number)  # type: ignore[attr-defined]
        counts.append(sum(value > 0 for row in rows.values() for value in row.values()))
    assert counts[0] == 9 >= counts[1] >= counts[2] == 3


# ------------------------------------------------------------------------------------------------ both
@pytest.mark.parametrize("name", ["fedamp", "fedacs"])
def test_without_a_pull_it_is_local_training(tmp_path: Path, name: str) -> None:
    outcome = _run(tmp_path / name, name, {"pull": 0})
    settings = federation.configure(strategy={"name": "local"})
    local = federation.run(tmp_path / "local", settings, SITES, secrets=dict.fromkeys(SITES, 3))
    assert all(equal(outcome.served(site), local.served(site)) for site in SITES)


@pytest.mark.parametrize("name", ["fedamp", "fedacs"])
def test_exchanging_sites_exchanges_their_means(name: str) -> None:
    strategy = _build(name)
    known = toy.specs(strategy)
    models = {site: toy.initial(known, 5 + at) for at, site in enumerate("abc")}
    server = strategy.init_server(_start(), known, ("a", "b", "c"))

    def means(order: Mapping[str, str]) -> dict[str, Tensors]:
        after = strategy.combine(server, [Update(new, models[order[new]], 1) for new in sorted(order)], known)
        return {order[new]: strategy.send(after, new) for new in order}

    first, second = means(dict(zip("abc", "abc", strict=True))), means(dict(zip("abc", "cab", strict=True)))
    for site in "abc":
        torch.testing.assert_close(dict(first[site]), dict(second[site]), **EXACT)


@pytest.mark.parametrize("name", ["fedamp", "fedacs"])
def test_each_site_is_sent_its_own_and_a_site_that_missed_rounds_the_newest(tmp_path: Path, name: str) -> None:
    outcome = _run(tmp_path, name, {}, train=HALF)
    assert outcome.experiment.strategy.declares.needs_individual_updates
    last = {site: tensors for _, site, tensors in outcome.sent("finish")}
    for site in SITES:
        held = dict(under("", within(f"mean/{site}", outcome.progress.server.memory)))
        assert all(torch.equal(held[f"/{n}"], value) for n, value in last[site].items())
    assert not equal(last["a"], last["b"])


def test_likeness_needs_products() -> None:
    with pytest.raises(ConfigError, match="nothing that this strategy sums is a product"):
        federation.assemble(federation.configure(tuner=[{"name": "norm"}], strategy={"name": "fedacs"}))
