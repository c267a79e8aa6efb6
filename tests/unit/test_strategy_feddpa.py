"""feddpa_t and feddpa_f: rounds of least squares against the formulas in float64, and FedIT underneath."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import registry
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError
from consilium.protocols import Strategy
from consilium.tensors import equal
from tests import federation, toy

SITES = federation.hospitals(14, 9, 20)
EXACT = {"rtol": 0, "atol": 1e-10}
HALF = {"participation": 0.67}
DRAWN = {2: ("a", "c"), 3: ("b",)}
G, P = "layer.lora.shared", "layer.lora.personal"


def _build(name: str, **options: Any) -> Strategy:
    found: Strategy = registry.build("strategies", name, options)
    return found


def _run(folder: Path, name: str, options: Mapping[str, Any], **tables: Any) -> federation.Outcome:
    return federation.run(folder, federation.configure(strategy={"name": name, **options}, **tables), SITES)


def _slope(v: Mapping[str, Tensor], site: str, of: tuple[str, ...], share: float | None) -> dict[str, Tensor]:
    """Gradient with respect to `of` of the mixture with this share of the personal adapter; None: the shared alone."""
    leaves = {n: value.clone().requires_grad_(n in of) for n, value in v.items()}
    x, y = toy.data(site)
    shared, own = (toy.SCALE * leaves[f"{part}.b"] @ leaves[f"{part}.a"] for part in (G, P))
    weight = toy.frozen() + (shared if share is None else (1 - share) * shared + share * own)
    loss = ((x @ weight.T @ leaves["head.weight"].T - y) ** 2).mean()
    return dict(zip(of, torch.autograd.grad(loss, [leaves[n] for n in of]), strict=True))


def _train(v: dict[str, Tensor], site: str, of: tuple[str, ...], share: float | None) -> dict[str, Tensor]:
    for _ in range(3):
        slope = _slope(v, site, of, share)
        v = {n: value - toy.RATE * slope[n] if n in of else value for n, value in v.items()}
    return v


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_feddpa_ts_rounds_are_the_formulas(share: float) -> None:
    strategy = _build("feddpa_t", local_weight=share)
    outcome = toy.federate(strategy, 4, drawn=DRAWN)
    known, own, shared = toy.specs(strategy), (f"{P}.a", f"{P}.b"), (f"{G}.a", f"{G}.b", "head.weight")
    w = {n: toy.initial(known, 1)[n] for n in shared}
    personal = {s: {n: toy.initial(known, 2 + at)[n] for n in own} for at, s in enumerate(toy.SITES)}
    for number in range(1, 5):
        sent = []
        for site in DRAWN.get(number, toy.SITES):
            if number > 1:
                found = _train({**w, **personal[site]}, site, own, share)
                personal[site] = {n: found[n] for n in own}
            sent.append(_train({**w, **personal[site]}, site, shared, None))
        w = {n: sum(each[n] for each in sent) / len(sent) for n in w}
    torch.testing.assert_close(dict(outcome.server.shared), w, **EXACT)
    for site in toy.SITES:
        kept = outcome.personal[site].tensors
        torch.testing.assert_close({n: kept[n] for n in own}, personal[site], **EXACT)
        served = outcome.model(strategy, site)
        scaled = {f"{G}.b": (1 - share) * w[f"{G}.b"], f"{P}.b": share * personal[site][f"{P}.b"]}
        expected = {**w, **personal[site], **scaled}
        torch.testing.assert_close(dict(served), expected, **EXACT)


@pytest.mark.parametrize("name", ["feddpa_t", "feddpa_f"])
@pytest.mark.parametrize("head", [None, "personal"])
def test_the_shared_adapter_is_fedits(tmp_path: Path, name: str, head: str | None) -> None:
    tables: dict[str, Any] = {"train": {**HALF, "moments": "keep"}}
    found = _run(tmp_path / name, name, {}, **tables)
    plain = _run(tmp_path / "fedit", "fedit", {"weights": "uniform"}, **tables)
    assert equal(found.shared, plain.shared)
    assert found.progress.ledger.payload == plain.progress.ledger.payload
    if head:  # a head that stays is trained in either phase
        kept = _run(tmp_path / "head", name, {}, head={"share": head}, **tables)
        assert not any(n.startswith("head") for n in kept.shared)
        assert not torch.equal(kept.served("a")["head.weight"], kept.served("b")["head.weight"])


def test_before_a_local_phase_the_model_in_use_is_the_shared_one(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "feddpa_t", {}, train={"rounds": 1})
    served = outcome.served("a")
    assert all(torch.equal(served[name], value) for name, value in outcome.shared.items())
    assert not any(value.any() for name, value in served.items() if name.endswith("personal.b"))


def test_feddpa_f_trains_the_personal_adapter_alone_and_last(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "feddpa_f", {"local_epochs": 2})
    start = federation.assemble(federation.configure(strategy={"name": "feddpa_f"})).model.initial(3)
    for site, data in SITES.items():
        served = outcome.served(site)
        assert all(torch.equal(served[name], value) for name, value in outcome.shared.items())
        own = {name for name in served if ".personal." in name}
        assert all(served[name].any() for name in own)
        federation.assert_absent({name: served[name] for name in own}, outcome.wire)
        assert outcome.progress.passes[site] == (3 + 2) * len(data.train)
        states = StateFolder(outcome.folder / "sites" / site, outcome.experiment.handshake.agreement)
        kept = states.load(3).personal.tensors
        assert not any(kept[name].any() for name in own if name.endswith(".b")), "nothing before the end"
    assert start.keys() == outcome.served("a").keys()


def test_work_of_a_round_is_known(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "feddpa_t", {})
    assert outcome.progress.passes == {site: 5 * len(data.train) for site, data in SITES.items()}


def test_what_cannot_go_is_refused() -> None:
    with pytest.raises(ConfigError):
        _build("feddpa_t", local_weight=0)
    with pytest.raises(ConfigError, match="nothing that this strategy sums is a product"):
        federation.assemble(federation.configure(tuner=[{"name": "prompts"}], strategy={"name": "feddpa_t"}))
