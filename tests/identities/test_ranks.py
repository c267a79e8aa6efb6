"""Sites with ranks of their own: what is summed, cut, sent and refused, in whole federations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import checkpoint, registry, results
from consilium.check import predicted_bytes
from consilium.coordinator import Transport
from consilium.engines import stacked
from consilium.engines.simulate import Federation, Simulation, secrets_of
from consilium.errors import ConfigError, TrainingError, WireError
from consilium.messages import decode_reply, decode_request, encode
from consilium.products import Product, products
from consilium.protocols import ServerState, Update
from consilium.ranks import at, cut, filled
from consilium.tensors import Tensors, equal
from consilium.tuners import compose
from tests import federation, toy

SIZES = {"a": 9, "b": 14, "c": 12, "d": 7}
SITES = federation.hospitals(*SIZES.values())
RANKS = {"a": 1, "b": 3, "d": 2}  # c has the tuner's
RANK, ALPHA = 4, 10.0
OF = {"c": RANK, **RANKS}
LORA = {"name": "lora", "rank": RANK, "alpha": ALPHA, "blocks": [0, 3]}
HALF = {"rounds": 4, "participation": 0.5, "quorum": 0.5}


def _settings(name: str, ranks: Mapping[str, int] = RANKS, **tables: Any) -> Any:
    options = {"ranks": dict(ranks)} if ranks else {}
    tuner = tables.pop("tuner", LORA)
    return federation.configure(strategy={"name": name, **options}, tuner=[tuner], **tables)


def _run(folder: Path, name: str, wrap: Any = lambda inner: inner, **tables: Any) -> federation.Outcome:
    return federation.run(folder, _settings(name, **tables), SITES, wrap=wrap)


def _dense(p: Product, tensors: Tensors) -> Tensor:
    """What a product adds at the scale of the tuner: alpha / r of the tuner's rank."""
    return ALPHA / RANK * torch.cat([tensors[n].double() for n in p.left]) @ tensors[p.right].double()


def _base(pieces: Any, p: Product, tensors: Tensors) -> Tensor:
    own = {name: pieces.backbone.module.get_parameter(name) for name in p.base}
    return torch.cat([{**own, **tensors}[name].detach().double() for name in p.base])


def _merged(settings: Any, p: Product, tensors: Tensors) -> Tensor:
    """The weight that this model acts with, from the tuner's own merging."""
    pieces = federation.assemble(settings)
    module = compose.merge(pieces.model, {n: v for n, v in tensors.items() if not n.startswith("head.")})
    return torch.cat([module.get_parameter(name).detach().double() for name in p.base])


def _mean(pairs: list[tuple[float, Tensor]]) -> Tensor:
    total = sum(weight for weight, _ in pairs)
    return torch.stack([weight / total * value for weight, value in pairs]).sum(0)


def _rounds(outcome: federation.Outcome, lost: set[tuple[str, int]]) -> Any:
    """(state before, what its sites sent, state after) of every round, and that this is what the run did."""
    pieces, specs = outcome.experiment, outcome.experiment.model.specs
    server = pieces.strategy.init_server(pieces.initial(3), specs, tuple(SITES))
    for number in range(1, outcome.progress.server.round + 1):
        sent = {site: t for n, site, t in outcome.sent("up") if n == number and (site, n) not in lost}
        updates = [Update(site, tensors, SIZES[site]) for site, tensors in sent.items()]
        after = pieces.strategy.combine(server, updates, specs)
        yield server, sent, after
        server = ServerState(number, after.sites, after.shared, after.memory)
    assert equal(server.shared, outcome.shared)


# ------------------------------------------------------------------------------------------------ what is summed
@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_round_by_round_the_model_is_the_mean_of_what_the_sites_models_act_with(tmp_path: Path, name: str) -> None:
    """Half of the sites in a round, one reply lost. The sites' weights come from the tuner's merging, so no scale is
    taken on trust; with alpha / r_k of each site, or one alpha over all ranks, the fold would be another (I1)."""
    drawn = [(n, site) for n, site, _ in _run(tmp_path / "who", "fedit", ranks={}, train=HALF).sent("up")]
    lost = {(drawn[2][1], 2)}
    wrap = lambda inner: federation.Lossy(inner, lost, before_work=False)  # noqa: E731
    outcome = _run(tmp_path / "run", name, wrap, train=HALF)
    pieces, settings, worst = outcome.experiment, _settings(name), 0.0
    for before, sent, after in _rounds(outcome, lost):
        for p in products(pieces.model.specs):
            bases = {n: v for n, v in before.shared.items() if n in p.base}
            acting = [(SIZES[s], _merged(settings, p, {**before.shared, **t})) for s, t in sent.items()]
            wanted = _mean(acting)
            start = _base(pieces, p, before.shared)
            if name == "flora":
                found = _base(pieces, p, after.shared) + _dense(p, after.shared)
                assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
                moved = (wanted - start).norm()
                for wrong in (lambda r: ALPHA / r, lambda _: ALPHA / sum(OF[s] for s in sent)):  # noqa: B023
                    other = [(SIZES[s], wrong(OF[s]) * RANK / ALPHA * _dense(p, t)) for s, t in sent.items()]
                    worst = max(worst, float((start + _mean(other) - wanted).norm() / moved))
            else:
                values = torch.linalg.svdvals(wanted - start)
                gap = (start + _dense(p, after.shared) - wanted).norm()
                torch.testing.assert_close(gap, values[RANK:].norm(), rtol=1e-3, atol=1e-6)
            assert bases.keys() == ({*p.base} if name == "flora" and before.round else set())
    assert worst > 0.1 or name == "flexlora", "the scale matters"


def test_scales_by_layer_are_folded_layer_by_layer(tmp_path: Path) -> None:
    """Layers of other ranks act with another alpha / r; folding all with one scale would be wrong."""
    tuner = {**LORA, "ranks": {"blocks.0": 1}}
    outcome = _run(tmp_path, "flora", ranks={}, tuner=tuner, train={"rounds": 1})
    settings = _settings("flora", ranks={}, tuner=tuner)
    scales = {}
    for p in products(outcome.experiment.model.specs):
        sent = [(SIZES[s], {**outcome.experiment.model.initial(3), **t}) for _, s, t in outcome.sent("up")]
        wanted = _mean([(n, _merged(settings, p, t)) for n, t in sent])
        found, start = _base(outcome.experiment, p, outcome.shared), _base(outcome.experiment, p, {})
        assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max() + 1e-7
        one_scale = start + _mean([(n, _dense(p, t)) for n, t in sent])
        scales[p.scale] = float((one_scale - wanted).norm() / (wanted - start).norm())
    assert scales.keys() == {ALPHA, ALPHA / RANK}
    assert scales[ALPHA] > 0.5 > 1e-4 > scales[ALPHA / RANK]


def test_flexlora_sends_every_site_its_own_top_triplets(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "flexlora", train={"rounds": 2})
    for p in products(outcome.experiment.model.specs):
        whole = _dense(p, outcome.shared)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        for site, rank in OF.items():
            served = outcome.served(site)
            assert served[p.right].shape[0] == rank
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            torch.testing.assert_close(_dense(p, served), best, rtol=1e-3, atol=1e-5 * float(s[0]))


DRAWN = {2: ("a", "c"), 3: ("c",), 4: ("b", "c")}  # a mean of full rank in every round: no basis is free
SMALL = {"a": 1, "b": 3}


def _descended(v: dict[str, Tensor], site: str) -> dict[str, Tensor]:
    """Three steps of gradient descent of mean squares of H (W + s B A) x - y, all but W."""
    x, y = toy.data(site)
    for _ in range(3):
        leaves = {n: t.detach().requires_grad_(n != "W") for n, t in v.items()}
        error = x @ (leaves["W"] + toy.SCALE * leaves["B"] @ leaves["A"]).T @ leaves["H"].T - y
        slopes = torch.autograd.grad((error**2).mean(), [leaves[n] for n in "ABH"])
        v = {**v, **{n: v[n] - toy.RATE * slope for n, slope in zip("ABH", slopes, strict=True)}}
    return v


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_rounds_at_unequal_ranks_are_the_formulas(name: str) -> None:
    """Slow reference in float64: sections of the first draw, or top triplets, dense products, a dense base; sites that
    missed rounds hold what those hold that did not."""
    member = registry.build("strategies", name, {"ranks": SMALL})
    outcome = toy.federate(member, 5, drawn=DRAWN, rank=RANK, b_at_zero=True)
    first = toy.initial(toy.specs(member, RANK), 1)
    g = f"{toy.LAYER}.lora.shared"
    start = {"A": first[f"{g}.a"], "B": first[f"{g}.b"] * 0, "H": first["head.weight"], "W": toy.frozen()}
    now = start
    for number in range(1, 6):
        sites = DRAWN.get(number, toy.SITES)
        own = {s: SMALL.get(s, RANK) for s in sites}
        found = {s: _descended({**now, "A": now["A"][: own[s]], "B": now["B"][:, : own[s]]}, s) for s in sites}
        shares = {s: toy.SIZES[s] / sum(toy.SIZES[each] for each in sites) for s in sites}
        dense = torch.stack([shares[s] * v["B"] @ v["A"] for s, v in found.items()]).sum(0)
        head = torch.stack([shares[s] * v["H"] for s, v in found.items()]).sum(0)
        if name == "flora":
            now = {**start, "W": now["W"] + toy.SCALE * dense, "H": head}
        else:
            u, values, vh = torch.linalg.svd(dense, full_matrices=False)
            now = {**now, "B": u[:, :RANK] * values[:RANK], "A": vh[:RANK], "H": head}
    close = {"rtol": 0, "atol": 1e-10}
    for site in toy.SITES:
        model, rank = outcome.model(member, site), SMALL.get(site, RANK)
        assert model[f"{g}.a"].shape[0] == model[f"{g}.b"].shape[1] == rank
        wanted = now["W"] + toy.SCALE * now["B"][:, :rank] @ now["A"][:rank]
        acting = model.get(f"{toy.LAYER}.weight", toy.frozen()) + toy.SCALE * model[f"{g}.b"] @ model[f"{g}.a"]
        torch.testing.assert_close(acting, wanted, **close)
        torch.testing.assert_close(model["head.weight"], now["H"], **close)


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_a_frozen_right_factor_is_common_to_the_rank_of_each(tmp_path: Path, name: str) -> None:
    outcome = _run(tmp_path, name, tuner={**LORA, "freeze_a": True}, train={"rounds": 1})
    start = outcome.experiment.model.initial(3)
    for p in products(outcome.experiment.model.specs):
        sent = [(SIZES[s], {p.right: start[p.right][: OF[s]], **t}) for _, s, t in outcome.sent("up")]
        wanted = _base(outcome.experiment, p, {}) + _mean([(n, _dense(p, t)) for n, t in sent])
        found = _base(outcome.experiment, p, outcome.shared) + _dense(p, outcome.shared)
        assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max() + 1e-6
        assert torch.equal(outcome.shared[p.right], start[p.right])


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_the_tuners_rank_at_every_site_is_no_rank_at_all(tmp_path: Path, name: str) -> None:
    named, plain = (
        _run(tmp_path / str(len(ranks)), name, ranks=ranks, train=HALF) for ranks in (dict.fromkeys(SITES, RANK), {})
    )
    assert equal(named.shared, plain.shared)
    assert all(equal(named.served(site), plain.served(site)) for site in SITES)
    assert named.progress.ledger.payload == plain.progress.ledger.payload


# ------------------------------------------------------------------------------------------------ what is sent
@pytest.mark.parametrize(
    "tables", [{}, {"train": HALF}, {"wire": {"codec": "int8"}}, {"evaluation": {"serve": "best"}}]
)
@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_bytes_of_each_site_are_those_of_its_rank_and_predicted(tmp_path: Path, name: str, tables: Any) -> None:
    outcome = _run(tmp_path, name, **tables)
    measured = outcome.progress.ledger.summary()
    assert predicted_bytes(outcome.experiment, SITES) == {way: measured[way] for way in ("up", "down")}
    for way in ("up", "down", "finish") if "wire" not in tables else ():
        for _, site, tensors in outcome.sent(way):
            for p in products(outcome.experiment.model.specs):
                for n in tensors.keys() & {*p.left, p.right}:
                    assert tensors[n].shape[0 if n == p.right else 1] == OF[site]
    if tables:
        return
    specs, rounds = outcome.experiment.model.specs, 3
    wide = sum(spec.shape[1 if n.endswith(".a") else 0] or 0 for n, spec in specs.items() if ".lora." in n)
    rest = sum(math.prod(map(int, spec.shape)) for n, spec in specs.items() if ".lora." not in n)
    once = measured["up"]["per_site"]["c"] - rounds * 4 * (RANK * wide + rest)
    assert 0 < once < rounds * 20, "the head of a payload"
    for site, rank in OF.items():
        assert measured["up"]["per_site"][site] == rounds * 4 * (rank * wide + rest) + once
        assert results.site_parameters(outcome.experiment, [site])[site]["exchanged"] == rank * wide + rest


@dataclass
class Bent:
    """A wire on which one message is replaced."""

    inner: Transport
    change: Any

    def sites(self) -> tuple[str, ...]:
        return self.inner.sites()

    def round(self, requests: Mapping[str, bytes]) -> Any:
        for site, data in self.inner.round(requests):
            yield site, self.change(site, data)


@pytest.mark.parametrize("rank", [2, RANK])
def test_a_reply_of_another_rank_is_refused_with_the_sites_name(tmp_path: Path, rank: int) -> None:
    settings = _settings("flexlora")
    pieces = federation.assemble(settings)
    other = federation.assemble(_settings("flexlora", ranks={**RANKS, "b": rank}))

    def change(site: str, data: Any) -> Any:
        reply = decode_reply(data, pieces.up(1, site))
        if site != "b" or not reply.tensors:
            return data
        larger = {
            n: filled(v, torch.empty(pieces.model.specs[n].shape)) if ".lora." in n else v
            for n, v in reply.tensors.items()
        }
        return encode(type(reply)(**{**vars(reply), "tensors": cut(larger, other.at("b"))}), other.up(1, "b"))

    with pytest.raises(TrainingError, match=r"(?s)b: refused.*sender and receiver declare other tensors"):
        federation.run(tmp_path, settings, SITES, wrap=lambda inner: Bent(inner, change))


def test_a_site_takes_no_adapter_of_another_rank(tmp_path: Path) -> None:
    settings = _settings("flexlora")
    seen: dict[str, bytes] = {}
    outcome = federation.run(
        tmp_path / "run", settings, SITES, watch=lambda way, site, data: seen.setdefault(f"{way}{site}", data)
    )
    pieces = outcome.experiment
    request = decode_request(seen["downa"], pieces.down(1, "a"))
    with pytest.raises(WireError):
        decode_request(seen["downa"], pieces.down(1, "c"))
    start = cut(pieces.model.initial(3), pieces.at("c"))
    larger = {n: start[n] for n in request.tensors}
    bent = encode(type(request)(**{**vars(request), "tensors": larger}), pieces.down(1, "c"))
    here = Federation(settings, federation.CLASSES, SITES, tmp_path / "other", secrets_of(3, SITES))
    with Simulation({"run": here}, 1) as simulation:
        (_, answer), *_ = simulation.transport("run").round({"a": bent})
    assert isinstance(answer, bytes)
    failure = decode_reply(answer, pieces.up(1, "a")).failure
    assert failure is not None
    assert failure.code == "refused"
    assert "declare other tensors" in failure.message


# ------------------------------------------------------------------------------------------------ whole runs
class _Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_a_run_that_was_stopped_goes_on_and_late_sites_catch_up(tmp_path: Path, name: str) -> None:
    def stop(told: Any) -> None:
        if (told["event"], told["round"]) == ("site", 3):
            raise _Stop

    settings = _settings(name, train=HALF)
    whole = federation.run(tmp_path / "whole", settings, SITES)
    with pytest.raises(_Stop):
        federation.run(tmp_path / "cut", settings, SITES, display=stop)
    resumed = federation.run(tmp_path / "cut", settings, SITES, wrap=federation.Backwards)
    assert equal(resumed.shared, whole.shared)
    assert all(equal(resumed.served(site), whole.served(site)) for site in SITES)
    assert resumed.progress.ledger.payload == whole.progress.ledger.payload
    for site in SITES:  # whoever missed rounds has the newest base, and the newest factors at its own rank
        assert equal(whole.served(site), {**whole.served(site), **cut(whole.shared, whole.experiment.at(site))})


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora"])
def test_prefixes_that_are_kept_change_no_bit(tmp_path: Path, name: str) -> None:
    tuner = {**LORA, "blocks": [3]}
    kept, anew = (
        _run(tmp_path / str(cache), name, tuner=tuner, engine={"prefix_cache": cache, "cache": str(tmp_path / "cache")})
        for cache in (True, False)
    )
    assert list((tmp_path / "cache" / "prefixes").iterdir()), "there was something to keep"
    assert equal(kept.shared, anew.shared)
    assert all(equal(kept.served(site), anew.served(site)) for site in SITES)


def test_what_is_served_and_saved_has_the_sites_rank_and_is_a_whole_model(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "flexlora")
    pieces, images = outcome.experiment, torch.zeros(2, 3, federation.SIZE, federation.SIZE)
    for site in SITES:
        served, _ = checkpoint.load(tmp_path / "sites" / site / "served.safetensors")
        padded = {n: filled(v, outcome.shared[n]) for n, v in served.items()}
        torch.testing.assert_close(pieces.model.forward(served, images), pieces.model.forward(padded, images))
    assert {n: tuple(v.shape) for n, v in outcome.served("a").items()} == {
        n: s.shape for n, s in pieces.at("a").items()
    }
    assert at(pieces.model.specs, pieces.strategy.declares.parts, "c") is pieces.model.specs


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("name", "ranks", "tuner", "words"),
    [
        ("flora", {"a": RANK + 1}, LORA, r"(?s)exceeds the tuner's.*make the tuner's rank the largest"),
        ("flexlora", {"a": 1}, {"name": "low_rank_prompts", "length": 12, "rank": 2}, "ranks are for lora"),
        ("flora", {"a": 1}, {**LORA, "ranks": {"blocks.0": 2}}, "do not go together"),
        ("flora", {"a": 0}, LORA, "greater than or equal to 1"),
        ("fedit", {"a": 1}, LORA, "needs one rank at all sites"),
        ("fedex", {"a": 1}, LORA, "needs one rank at all sites"),
        ("ffa", {"a": 1}, LORA, "needs one rank at all sites"),
        ("fedsvd", {"a": 1}, LORA, "needs one rank at all sites"),
        ("lora_fair", {"a": 1}, LORA, "needs one rank at all sites"),
        ("fedavg", {"a": 1}, LORA, "unknown key: ranks"),
    ],
)
def test_ranks_that_cannot_be_are_refused_with_the_reason(
    name: str, ranks: dict[str, int], tuner: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        federation.assemble(_settings(name, ranks, tuner=tuner))


def test_ranks_of_nobody_are_refused_before_training_and_by_check(tmp_path: Path) -> None:
    from consilium.engines.state import check_room

    pieces = federation.assemble(_settings("flora", {"a": 1, "vienna": 2}))
    for ask in (lambda: predicted_bytes(pieces, SITES), lambda: check_room(pieces, tmp_path, SITES)):
        with pytest.raises(ConfigError, match=r"(?s)sites that there are not.*a, b, c, d.*vienna"):
            ask()


def test_sites_of_other_ranks_do_not_train_as_one_batch() -> None:
    settings = _settings("flexlora", train={"batch_size": 1}, engine={"stacked_sites": "auto"})
    assert stacked.resolved(federation.assemble(settings), 32).config.engine.stacked_sites == 1
    explicit = _settings("flexlora", engine={"stacked_sites": 2})
    with pytest.raises(ConfigError, match="ranks of their own"):
        stacked.resolved(federation.assemble(explicit), 4)


def test_only_members_that_declare_it_take_ranks() -> None:
    taking = {name for name, member in registry.members("strategies").items() if "ranks" in member.options.model_fields}
    assert taking == {"flora", "flexlora", "hetlora"}
