"""Other sums than the mean, and the published ways to federate factors, in whole federations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import registry
from consilium.aggregation import Aggregation
from consilium.data import SiteData
from consilium.errors import ConfigError
from consilium.local.train import Trainer
from consilium.products import Product, products
from consilium.protocols import Declaration, Part, Strategy, Update
from consilium.strategies.fedavg import FedAvg, everything
from consilium.strategies.federated_lora import LEFT, RIGHT
from consilium.strategies.partial import nothing
from consilium.tensors import Tensors, equal
from tests import federation

SIZES = {"a": 9, "b": 14, "c": 12, "d": 7}
SITES = federation.hospitals(*SIZES.values())
HALF = {"rounds": 4, "participation": 0.5, "quorum": 0.5}
LORA = {"name": "lora", "rank": 2, "alpha": 5, "blocks": [0, 3]}
PROMPTS = {"name": "low_rank_prompts", "length": 6, "rank": 2, "depth": "deep", "share_basis": True}
TUNERS = {"lora": LORA, "prompts": PROMPTS}
DORA = {**LORA, "dora": True}
CHANGES_BASE = ("stack", "residual")


def _run(
    folder: Path,
    strategy: Strategy | str,
    sites: Mapping[str, SiteData] = SITES,
    options: Mapping[str, Any] | None = None,
    tuner: str = "lora",
    wrap: federation.Wrap = lambda transport: transport,
    secrets: Mapping[str, int] | None = None,
    **train: Any,
) -> federation.Outcome:
    member = registry.build("strategies", strategy, options or {}) if isinstance(strategy, str) else strategy
    settings = federation.configure(tuner=[{**TUNERS, "dora": DORA}[tuner]], train={"rounds": 2, **train})
    return federation.run(folder, settings, sites, strategy=member, wrap=wrap, secrets=secrets)


def _products(outcome: federation.Outcome) -> tuple[Product, ...]:
    found = products(outcome.experiment.model.specs)
    assert found
    return found


def _product(product: Product, tensors: Tensors) -> Tensor:
    return product.scale * torch.cat([tensors[n].double() for n in product.left]) @ tensors[product.right].double()


def _base(outcome: federation.Outcome, product: Product, tensors: Tensors) -> Tensor:
    own = {name: outcome.experiment.backbone.module.get_parameter(name) for name in product.base}
    return torch.cat([{**own, **tensors}[name].detach().double() for name in product.base])


def _acting(outcome: federation.Outcome, tensors: Tensors) -> list[Tensor]:
    """base + scale * left @ right of every product: all of it that the model feels."""
    return [_base(outcome, p, tensors) + _product(p, tensors) for p in _products(outcome)]


def _gap(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))


def _mean(pairs: list[tuple[int, Any]]) -> Any:
    return sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)


# ------------------------------------------------------------------------------------------------ exact, or not
@pytest.mark.parametrize("tuner", [*TUNERS, "dora"])
@pytest.mark.parametrize("kind", ["mean", "product_svd", *CHANGES_BASE])
def test_round_by_round_the_model_is_the_one_with_the_mean_of_products(tmp_path: Path, kind: str, tuner: str) -> None:
    """Half of the sites in a round, one comes late, one reply is lost; the mean of factors is the negative."""
    drawn = [(number, site) for number, site, _ in _run(tmp_path / "who", "fedavg", tuner=tuner, **HALF).sent("up")]
    lost = {(drawn[2][1], 2)}
    wrap = lambda inner: federation.Lossy(inner, lost, before_work=False)  # noqa: E731
    outcome = _run(tmp_path / "run", "fedavg", options={"aggregate": kind}, tuner=tuner, wrap=wrap, **HALF)
    pieces, specs, worst = outcome.experiment, outcome.experiment.model.specs, 0.0
    server = pieces.strategy.init_server(pieces.initial(3), specs, tuple(SITES))
    for number in range(1, 5):
        sent = {site: t for n, site, t in outcome.sent("up") if n == number and (site, n) not in lost}
        now = server.shared
        wanted = [
            _base(outcome, p, now) + _mean([(SIZES[site], _product(p, {**now, **t})) for site, t in sent.items()])
            for p in _products(outcome)
        ]
        server = pieces.strategy.combine(server, [Update(site, t, SIZES[site]) for site, t in sent.items()], specs)
        worst = max(worst, _gap(_acting(outcome, server.shared), wanted))
    assert len(outcome.sent("up")) == 8
    assert not server.memory, "the frozen weights are remembered until they change, and no longer"
    assert equal(server.shared, outcome.shared)
    assert worst < 1e-6 if kind in CHANGES_BASE else worst > 1e-4
    assert all(equal(outcome.served(site), outcome.served("a")) for site in "bcd"), "late sites have caught up"
    bases = {name for p in _products(outcome) for name in p.base}
    assert (outcome.served("a").keys() - specs.keys()) == (bases if kind in CHANGES_BASE else set())
    assert not [name for _, _, t in outcome.sent("up") for name in t.keys() & bases]
    _assert_only_their_sum_acts(outcome)


def _assert_only_their_sum_acts(outcome: federation.Outcome) -> None:
    """All that products add may stand in the base: the model that is served feels nothing else of them."""
    served, model = outcome.served("a"), outcome.experiment.model
    folded = dict(served)
    for p, acting in zip(_products(outcome), _acting(outcome, served), strict=True):
        rows = acting.float().split([len(served[name]) for name in p.left])
        folded |= {**dict(zip(p.base, rows, strict=True)), **{n: torch.zeros_like(served[n]) for n in p.left}}
    images = torch.randn(2, 3, federation.SIZE, federation.SIZE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.forward(folded, images), model.forward(served, images), rtol=1e-4, atol=1e-4)
    own = {name: value for name, value in served.items() if name in model.specs}
    same = torch.allclose(model.forward(own, images), model.forward(served, images), rtol=1e-4, atol=1e-4)
    assert same == (served.keys() == own.keys()), "a base that changed shows"


@pytest.mark.parametrize("tuner", TUNERS)
def test_product_svd_is_the_dense_truncated_mean(tmp_path: Path, tuner: str) -> None:
    outcome = _run(tmp_path, "flexlora", tuner=tuner, rounds=1)
    for p in _products(outcome):
        mean = _mean([(SIZES[site], _product(p, t)) for _, site, t in outcome.sent("up")])
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        rank = len(outcome.shared[p.right])
        assert s[rank] > 1e-3 * s[0], "something is cut"
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(_product(p, outcome.shared), best, rtol=1e-4, atol=1e-5 * float(s[0]))


def test_one_step_on_pooled_data_is_the_mean_of_factors_and_not_of_products(tmp_path: Path) -> None:
    """Both are exact, with respect to different things; whole batches, plain SGD, weights by examples."""
    train = {**federation.SGD, "learning_rate": 10.0, "batch_size": 64, "rounds": 1}
    pooled = {"pooled": federation.pooled(SITES)}
    central = _run(tmp_path / "central", "local", pooled, tuner="prompts", secrets={"pooled": 3}, **train)
    wanted = _acting(central, central.served("pooled"))
    moved = _gap(wanted, _acting(central, central.experiment.model.initial(3)))
    for name, same in (("fedit", True), ("fedex", False), ("flora", False)):
        found = _run(tmp_path / name, name, tuner="prompts", **train)
        gap = _gap(_acting(found, found.shared), wanted) / moved
        assert gap < 1e-5 if same else gap > 1e-3, (name, gap)


# ------------------------------------------------------------------------------------------------ names and pieces
@pytest.mark.parametrize(
    ("name", "kind"), [("fedit", "mean"), ("flexlora", "product_svd"), ("flora", "stack"), ("fedex", "residual")]
)
def test_a_published_name_is_fedavg_with_its_sum(tmp_path: Path, name: str, kind: str) -> None:
    by_name = _run(tmp_path / "name", name, **HALF)
    by_sum = _run(tmp_path / "sum", "fedavg", options={"aggregate": kind}, **HALF)
    assert equal(by_name.shared, by_sum.shared)
    assert all(equal(by_name.served(site), by_sum.served(site)) for site in SITES)


@pytest.mark.parametrize("kind", ["product_svd", *CHANGES_BASE])
def test_the_sum_is_the_same_under_a_pull_of_nothing_and_differs_under_one(tmp_path: Path, kind: str) -> None:
    plain = _run(tmp_path / "avg", "fedavg", options={"aggregate": kind})
    assert equal(plain.shared, _run(tmp_path / "0", "fedprox", options={"aggregate": kind, "mu": 0}).shared)
    assert not equal(plain.shared, _run(tmp_path / "9", "fedprox", options={"aggregate": kind, "mu": 9}).shared)


@pytest.mark.parametrize(("kind", "forgotten"), [("product_svd", True), ("stack", True), ("residual", False)])
def test_kept_moments_of_factors_that_were_replaced_are_forgotten(tmp_path: Path, kind: str, forgotten: bool) -> None:
    strategy = registry.build("strategies", "fedavg", {"aggregate": kind})
    kept, reset = (
        federation.run(
            tmp_path / moments,
            federation.configure(tuner=[LORA], head={"share": "frozen"}, train={"rounds": 2, "moments": moments}),
            SITES,
            strategy=strategy,
        )
        for moments in ("keep", "reset")
    )
    assert equal(kept.shared, reset.shared) == forgotten


@pytest.mark.parametrize("kind", CHANGES_BASE)
def test_below_personal_blocks_only_the_bases_of_shared_products_change(tmp_path: Path, kind: str) -> None:
    outcome = _run(tmp_path, "fedper", options={"aggregate": kind, "personal_from_block": 3})
    bases = {name for name in outcome.shared if name not in outcome.experiment.model.specs}
    assert bases == {"blocks.0.attn.qkv.weight"}
    assert outcome.served("a").keys() == outcome.experiment.model.specs.keys() | bases


# ------------------------------------------------------------------------------------------------ one site, equal sites
@pytest.mark.parametrize("tuner", TUNERS)
def test_one_site_is_local_training(tmp_path: Path, tuner: str) -> None:
    alone, same = {"a": SITES["a"]}, {"a": 3}  # the site's secret is the run's seed: starts agree
    local = _run(tmp_path / "local", "local", alone, tuner=tuner, secrets=same)
    for name in ("fedit", "fedex", "fedsa"):
        assert equal(_run(tmp_path / name, name, alone, tuner=tuner, secrets=same).served("a"), local.served("a"))
    once = _run(tmp_path / "once", "local", alone, tuner=tuner, secrets=same, rounds=1)
    for name in ("flexlora", "flora"):  # other factors, and the same model
        found = _run(tmp_path / f"{name} once", name, alone, tuner=tuner, rounds=1)
        assert _gap(_acting(found, found.served("a")), _acting(once, once.served("a"))) < 1e-6
        assert torch.equal(found.shared["head.weight"], once.served("a")["head.weight"])


def test_flora_of_one_site_merges_and_starts_anew(tmp_path: Path) -> None:
    """The second round is training on the merged weights, from the first factors and the head as it was."""
    flora = _run(tmp_path, "flora", {"a": SITES["a"]})
    pieces, start = flora.experiment, flora.experiment.model.initial(3)
    (_, _, first), (_, _, second) = flora.sent("up")
    base = {name: value for name, value in flora.sent("down")[1][2].items() if name not in start}
    for p in _products(flora):
        for merged, before, update in ((base, {}, first), (flora.served("a"), base, second)):
            wanted = _base(flora, p, before) + _product(p, update)
            assert (_base(flora, p, merged) - wanted).abs().max() < 1e-6
        assert all(torch.equal(flora.served("a")[name], start[name]) for name in (*p.left, p.right))
    head = {name: value for name, value in first.items() if name.startswith("head.")}
    trainer = Trainer(pieces.setting, SITES["a"].train, 2, "a", [3, 3, 3])
    assert equal(trainer.fit({**start, **head}, fixed=base).variables, second)
    assert not equal(trainer.fit({**start, **head}).variables, second)


@pytest.mark.parametrize("kind", ["mean", "refactor", "product_svd", *CHANGES_BASE, "median", "trimmed_mean"])
def test_equal_sites_are_one_site(tmp_path: Path, kind: str) -> None:
    """Whole batches, no augmentation, no dropout: rows come in another order at every site."""
    options = {"aggregate": kind, **({"trim": 0.3} if kind == "trimmed_mean" else {})}
    twins = {name: replace(SITES["a"], name=name) for name in "abc"}
    several, one = (
        _run(tmp_path / str(len(sites)), "fedavg", sites, options=options, batch_size=32)
        for sites in (twins, {"a": SITES["a"]})
    )
    moved = _gap(_acting(one, one.shared), _acting(one, one.experiment.model.initial(3)))
    assert _gap(_acting(several, several.shared), _acting(one, one.shared)) < 0.01 * moved


@pytest.mark.parametrize("kind", ["product_svd", *CHANGES_BASE, "median"])
def test_the_order_of_replies_changes_no_bit(tmp_path: Path, kind: str) -> None:
    forth, back = (
        _run(tmp_path / at, "fedavg", options={"aggregate": kind}, wrap=wrap)
        for at, wrap in (("forth", lambda inner: inner), ("back", federation.Backwards))
    )
    assert equal(forth.shared, back.shared)


@pytest.mark.parametrize("options", [{"aggregate": "median"}, {"aggregate": "trimmed_mean", "trim": 0.25}])
def test_robust_sums_of_four_sites_are_the_mean_of_the_two_in_the_middle(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    outcome = _run(tmp_path, "fedavg", options=options, rounds=1)
    updates = [t for _, _, t in outcome.sent("up")]
    for name, value in outcome.shared.items():
        middle = torch.stack([t[name] for t in updates]).double().sort(0).values[1:3].mean(0)
        torch.testing.assert_close(value.double(), middle)


# ------------------------------------------------------------------------------------------------ what is trained
def _roles(outcome: federation.Outcome, tensors: Tensors) -> set[str]:
    return {outcome.experiment.model.specs[name].tag.role for name in tensors}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_with_one_factor_common_the_mean_of_factors_is_the_mean_of_products(
    tmp_path: Path, name: str, tuner: str
) -> None:
    outcome = _run(tmp_path, name, tuner=tuner, **HALF)
    right, left = (_roles(outcome, outcome.shared) & side for side in (RIGHT, LEFT))
    now: dict[str, Tensor] = dict(outcome.experiment.model.initial(3))
    for number in range(1, 5):
        frozen = right if name == "ffa" or number % 2 else left
        sent = {site: t for n, site, t in outcome.sent("up") if n == number}
        assert all(_roles(outcome, t) == _roles(outcome, outcome.shared) - frozen for t in sent.values())
        mean = {n: _mean([(SIZES[s], t[n].double()) for s, t in sent.items()]) for n in next(iter(sent.values()))}
        now = {**now, **mean}
        for p in _products(outcome):
            dense = _mean([(SIZES[site], _product(p, {**now, **t})) for site, t in sent.items()])
            torch.testing.assert_close(_product(p, now), dense, rtol=1e-9, atol=1e-12)
        now = {n: value.float() for n, value in now.items()}
    torch.testing.assert_close(dict(outcome.shared), {n: now[n] for n in outcome.shared}, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["flexlora", "fedex"])
def test_a_factor_that_the_tuner_freezes_stays_under_every_sum(tmp_path: Path, name: str) -> None:
    """Its product with the mean of the other is the mean of products: nothing to cut, nothing to add to the base."""
    settings = federation.configure(tuner=[{**LORA, "freeze_a": True}], train={"rounds": 2})
    member = registry.build("strategies", name, {})
    outcome = federation.run(tmp_path / name, settings, SITES, strategy=member)
    fedit = federation.run(tmp_path / "fedit", settings, SITES, strategy=registry.build("strategies", "fedit", {}))
    assert equal(outcome.shared, fedit.shared)


def test_what_is_never_trained_goes_down_once_and_never_up(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "ffa", **HALF)
    rights = {p.right for p in _products(outcome)}
    assert not [name for _, _, t in outcome.sent("up") for name in t.keys() & rights]
    times = {site: [rights & t.keys() for _, s, t in outcome.sent("down", "finish") if s == site] for site in SITES}
    assert all(got[0] == rights and not any(got[1:]) for got in times.values())
    start = outcome.experiment.model.initial(3)
    assert all(torch.equal(outcome.served("d")[name], start[name]) for name in rights)


@pytest.mark.parametrize("tuner", TUNERS)
def test_fedsa_sends_right_factors_alone(tmp_path: Path, tuner: str) -> None:
    outcome = _run(tmp_path, "fedsa", tuner=tuner)
    assert outcome.shared.keys() == {p.right for p in _products(outcome)}
    assert all(t.keys() == outcome.shared.keys() for _, _, t in outcome.sent("up"))
    kept = {n: v for site in SITES for n, v in outcome.served(site).items() if n not in outcome.shared}
    assert _roles(outcome, kept) & LEFT
    federation.assert_absent(kept, outcome.wire)
    assert not equal(outcome.served("a"), outcome.served("b"))


def test_fedsa_with_nothing_shared_is_local_and_with_all_fedit(tmp_path: Path) -> None:
    """I11: the same sum under other rules on tags, and its own rule is neither."""
    summed = Aggregation(of_factors=True)
    secrets = dict.fromkeys(SITES, 3)
    alone, all_of_it = FedAvg(shares=nothing, aggregate=summed), FedAvg(shares=everything, aggregate=summed)
    pairs = {"local": alone, "fedit": all_of_it}
    found = {name: _run(tmp_path / name, name, secrets=secrets) for name in ("local", "fedit", "fedsa")}
    for name, rule in pairs.items():
        same = _run(tmp_path / f"{name} by rule", rule, secrets=secrets)
        assert all(equal(same.served(site), found[name].served(site)) for site in SITES)
        assert not equal(found["fedsa"].served("a"), found[name].served("a"))


def test_a_personal_adapter_stays_itself_on_a_base_that_changes(tmp_path: Path) -> None:
    parts = (Part("common"), Part("own", personal=True))
    strategy = FedAvg(declares=Declaration(parts), aggregate=Aggregation("stack"))
    outcome = _run(tmp_path, strategy, rounds=1)
    common = [p for p in _products(outcome) if p.part == "common"]
    assert len(common) * 2 == len(_products(outcome))
    for p in common:
        mean = _mean([(SIZES[site], _product(p, t)) for _, site, t in outcome.sent("up")])
        torch.testing.assert_close(
            _base(outcome, p, outcome.shared), _base(outcome, p, {}) + mean, rtol=1e-6, atol=1e-6
        )
    own = {n: v for n, v in outcome.served("a").items() if ".own." in n}
    assert own
    federation.assert_absent(own, outcome.wire)


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize("name", ["fedit", "ffa", "rolora", "flexlora", "flora", "fedex", "fedsa"])
def test_a_tuner_without_products_is_refused_before_training(name: str) -> None:
    settings = federation.configure(tuner=[{"name": "linear"}], strategy={"name": name})
    with pytest.raises(ConfigError, match=r"product of two factors(.|\n)*'head'"):
        federation.assemble(settings)


def test_a_shared_head_is_refused_where_it_stays() -> None:
    federation.assemble(federation.configure(strategy={"name": "fedsa"}))
    with pytest.raises(ConfigError, match="contradicts the strategy"):
        federation.assemble(federation.configure(strategy={"name": "fedsa"}, head={"share": "shared"}))
