"""fedalt: every site beside the mean of the others, by leave-one-out from one mean; a router in a federation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from consilium import registry
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError
from consilium.protocols import Strategy
from consilium.tensors import Tensors, equal
from tests import federation, toy

SITES = federation.hospitals(14, 9, 20, 11)
EXACT = {"rtol": 0, "atol": 1e-12}
DRAWN = {2: ("a", "c"), 3: ("b",)}
G, P = "layer.lora.shared", "layer.lora.personal"


def _strategy() -> Strategy:
    found: Strategy = registry.build("strategies", "fedalt", {})
    return found


def _personal(outcome: federation.Outcome, site: str) -> Tensors:
    states = StateFolder(outcome.folder / "sites" / site, outcome.experiment.handshake.agreement)
    number = outcome.progress.builds_on.get(site)
    return states.load(number).personal.tensors if number else {}


def test_rounds_are_the_papers_with_the_mean_of_the_others_formed_by_hand() -> None:
    """I20, with sites that miss rounds; the toy sums both adapters where the model routes them."""
    strategy = _strategy()
    outcome = toy.federate(strategy, 4, drawn=DRAWN)
    start = toy.initial(toy.specs(strategy), 1)
    own = {site: {k: start[f"{G}.{k}"] for k in "ab"} for site in toy.SITES}
    head = start["head.weight"]
    for number in range(1, 5):
        there, before, heads = DRAWN.get(number, toy.SITES), dict(own), []
        for site in there:
            others = {k: sum(before[j][k] for j in toy.SITES if j != site) / 2 for k in "ab"}
            v = {**before[site], "head": head}
            x, y = toy.data(site)
            for _ in range(3):
                leaves = {n: t.clone().requires_grad_() for n, t in v.items()}
                total = toy.frozen() + toy.SCALE * (others["b"] @ others["a"] + leaves["b"] @ leaves["a"])
                loss = ((x @ total.T @ leaves["head"].T - y) ** 2).mean()
                slopes = torch.autograd.grad(loss, list(leaves.values()))
                v = {n: t - toy.RATE * s for (n, t), s in zip(v.items(), slopes, strict=True)}
            own[site], _ = {k: v[k] for k in "ab"}, heads.append(v["head"])
        head = sum(heads) / len(heads)
    torch.testing.assert_close(outcome.server.shared["head.weight"], head, **EXACT)
    for site in toy.SITES:
        served = outcome.model(strategy, site)
        for k in "ab":
            torch.testing.assert_close(outcome.personal[site].tensors[f"own/{G}.{k}"], own[site][k], **EXACT)
            others = sum(own[j][k] for j in toy.SITES if j != site) / 2
            torch.testing.assert_close(served[f"{P}.{k}"], others, **EXACT)
            assert torch.equal(served[f"{G}.{k}"], outcome.personal[site].tensors[f"own/{G}.{k}"])


def test_the_model_before_aggregation_stands_beside_the_others_as_they_were() -> None:
    strategy = _strategy()
    outcome = toy.federate(strategy, 2)
    learned = outcome.learned[-1]["a"]
    before = strategy.deploy({**outcome.received["a"], **learned.update}, learned.personal)["personal"]
    for k in "ab":
        assert torch.equal(before[f"{P}.{k}"], learned.personal.tensors[f"beside/{G}.{k}"])
        assert torch.equal(before[f"{G}.{k}"], learned.personal.tensors[f"own/{G}.{k}"])


def test_one_site_has_no_others(tmp_path: Path) -> None:
    settings = federation.configure(strategy={"name": "fedalt"})
    with pytest.raises(ConfigError, match="needs other sites"):
        federation.run(tmp_path, settings, {"a": SITES["a"]})


def test_in_a_federation_others_are_the_mean_of_the_others(tmp_path: Path) -> None:
    settings = federation.configure(strategy={"name": "fedalt"}, train={"rounds": 4, "participation": 0.5})
    outcome = federation.run(tmp_path, settings, SITES)
    start = outcome.experiment.model.initial(3)
    kept = {site: _personal(outcome, site) for site in SITES}
    names = [n for n in start if ".shared." in n]
    for site in SITES:
        served = outcome.served(site)
        for name in names:
            own = {s: kept[s].get(f"own/{name}", start[name]) for s in SITES if s != site}
            mean = torch.stack([value.double() for value in own.values()]).mean(0)
            others = served[name.replace(".shared.", ".personal.")].double()
            torch.testing.assert_close(others, mean, rtol=1e-5, atol=1e-6)
    assert not outcome.experiment.strategy.declares.needs_individual_updates
    assert not equal(outcome.served("a"), outcome.served("b"))


def test_bytes_are_one_adapters_and_neither_router_nor_others_go_up(tmp_path: Path) -> None:
    outcome = federation.run(tmp_path, federation.configure(strategy={"name": "fedalt"}), SITES)
    up = {name for _, _, tensors in outcome.sent("up") for name in tensors}
    plain = federation.assemble(federation.configure(strategy={"name": "fedit"}))
    assert up == plain.up(1).keys()
    for site in SITES:
        private = {n: v for n, v in _personal(outcome, site).items() if n.endswith("router")}
        federation.assert_absent(private, outcome.wire)


def test_a_tuner_without_a_router_is_refused() -> None:
    for name in ("norm", "adapter", "low_rank_prompts"):
        with pytest.raises(ConfigError):
            federation.assemble(federation.configure(tuner=[{"name": name}], strategy={"name": "fedalt"}))
