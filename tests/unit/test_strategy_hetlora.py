"""hetlora: the paper's rounds by hand at unequal ranks, pruning and its shapes on the wire, weights by size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium import registry
from consilium.check import predicted_bytes
from consilium.errors import ConfigError, TrainingError, WireError
from consilium.messages import Reply, decode_reply, encode
from consilium.product_sums import padded
from consilium.products import Product, products
from consilium.protocols import Factor, Spec, Tag
from consilium.ranks import at, rank_of, shrinking
from consilium.strategies.fedavg import jointly
from consilium.strategies.hetlora import HetLora, tail
from consilium.tensors import Tensors, equal
from tests import federation, toy

SITES = federation.hospitals(14, 9, 20, 11)
DRAWN = {2: ("a", "c"), 3: ("b",)}
G = "layer.lora.shared"
RANKS = {"a": 1, "b": 3}
RANK = 4
PRODUCT = Product(("b",), "a", ("w",), 3.0, "shared")


def _strategy(**options: Any) -> HetLora:
    found: HetLora = registry.build("strategies", "hetlora", options)
    return found


def _settings(options: dict[str, Any] | None = None, name: str = "hetlora", **train: Any) -> Any:
    return federation.configure(strategy={"name": name, **(options or {})}, train=train)


# ------------------------------------------------------------------------------------------------ the paper's rounds
def _norm(x: np.ndarray) -> float:
    return float(np.sqrt((x * x).sum()))


def _site(
    site: str, a: np.ndarray, b: np.ndarray, head: np.ndarray, gamma: float, strength: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three steps of gradient descent on loss + strength ||B_t|| ||A_t||, then the pruning."""
    x, y = (t.numpy() for t in toy.data(site))
    frozen, s, rank = toy.frozen().numpy(), toy.SCALE, len(a)
    keep = math.ceil(gamma * rank)
    before = _norm(b[:, keep:]) * _norm(a[keep:])
    for _ in range(3):
        hidden = x @ (frozen + s * b @ a).T
        slope = 2 * (hidden @ head.T - y) / y.size
        dense = s * (slope @ head).T @ x
        of_a, of_b = b.T @ dense, dense @ a.T
        if keep < rank:
            size_a, size_b = _norm(a[keep:]), _norm(b[:, keep:])
            if size_a and size_b:  # at zero the norm has no slope, and is left alone
                of_a[keep:] += strength * size_b * a[keep:] / size_a
                of_b[:, keep:] += strength * size_a * b[:, keep:] / size_b
        a, b, head = a - toy.RATE * of_a, b - toy.RATE * of_b, head - toy.RATE * slope.T @ hidden
    after = _norm(b[:, keep:]) * _norm(a[keep:])
    return (a[:keep], b[:, :keep], head) if after < before else (a, b, head)


def _by_hand(
    rounds: int, ranks: dict[str, int], gamma: float, strength: float
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    start = {n: t.numpy() for n, t in toy.initial(toy.specs(_strategy(), RANK), 1).items()}
    a, b, head = start[f"{G}.a"], start[f"{G}.b"], start["head.weight"]
    own = {site: ranks.get(site, RANK) for site in toy.SITES}
    for number in range(1, rounds + 1):
        found = []
        for site in DRAWN.get(number, toy.SITES):
            a_k, b_k, head_k = _site(site, a[: own[site]], b[:, : own[site]], head, gamma, strength)
            own[site] = len(a_k)
            size = _norm(b_k @ a_k)
            a_k = np.concatenate([a_k, np.zeros((RANK - len(a_k), a.shape[1]))])
            b_k = np.concatenate([b_k, np.zeros((len(b), RANK - b_k.shape[1]))], axis=1)
            found.append((size, toy.SIZES[site], a_k, b_k, head_k))
        a, b = (sum(f[0] * f[at] for f in found) / sum(f[0] for f in found) for at in (2, 3))
        head = sum(f[1] * f[4] for f in found) / sum(f[1] for f in found)
    return {f"{G}.a": a, f"{G}.b": b, "head.weight": head}, own


@pytest.mark.parametrize(("gamma", "strength"), [(1.0, None), (0.5, 0.0), (0.5, 0.3), (0.75, 2.0)])
def test_rounds_are_the_papers_by_hand(gamma: float, strength: float | None) -> None:
    options = {} if strength is None else {"strength": strength}
    strategy = _strategy(ranks=RANKS, gamma=gamma, **options)
    outcome = toy.federate(strategy, 5, drawn=DRAWN, rank=RANK)
    wanted, own = _by_hand(5, RANKS, gamma, strength or 0.0)
    for name, value in wanted.items():
        torch.testing.assert_close(outcome.server.shared[name], torch.from_numpy(value), rtol=0, atol=1e-10)
    told = {n.removeprefix("rank/"): int(v) for n, v in outcome.server.memory.items()}
    assert told == ({} if gamma == 1 else own)
    if strength == 2.0:
        assert own["c"] < RANK, "somebody pruned"
        assert own["a"] == 1, "a rank of one has no tail"


def test_a_tail_that_grows_is_kept(pruned: federation.Outcome) -> None:
    """B starts at zero, so that no tail is smaller after the first round of all."""
    limits = {"c": RANK, "d": RANK, **PRUNED["ranks"]}
    first = {site: rank_of(t, pruned.experiment.model.specs) for n, site, t in pruned.sent("up") if n == 1}
    assert first == {site: limits[site] for site in first}


def test_the_tail_is_a_mean_over_layers_of_whole_products() -> None:
    """Of a layer with two left factors, one below the other, and of another with one."""
    left = lambda rows, base: Spec((rows, 4), Tag("m", "lora_b"), factor=Factor((base,), "left"))  # noqa: E731
    right = lambda *bases: Spec((4, 6), Tag("m", "lora_a"), factor=Factor(bases, "right"))  # noqa: E731
    specs = {"qb": left(5, "q"), "vb": left(7, "v"), "pb": left(3, "p"), "qva": right("q", "v"), "pa": right("p")}
    x = {name: toy.draw(at, *(size or 0 for size in spec.shape)) for at, (name, spec) in enumerate(specs.items())}
    first = torch.cat([x["qb"], x["vb"]])[:, 3:].norm() * x["qva"][3:].norm()
    torch.testing.assert_close(tail(x, specs, 3), (first + x["pb"][:, 3:].norm() * x["pa"][3:].norm()) / 2)


# ------------------------------------------------------------------------------------------------ the sum
def _terms() -> tuple[list[tuple[float, Tensors]], Tensors]:
    draw = lambda at, r: {"b": toy.draw(at, 5, r), "a": toy.draw(at + 50, r, 6)}  # noqa: E731
    return [(1.0, draw(1, 1)), (3.0, draw(2, 3)), (2.0, draw(3, 4))], draw(9, 4)


def test_zeros_add_nothing_to_a_product_but_dilute_a_mean() -> None:
    """A mean of factors filled with zeros is no mean of products: the negative."""
    terms, start = _terms()
    found = padded([PRODUCT], terms, start)
    mean = sum(weight / 6 * tensors["b"] @ tensors["a"] for weight, tensors in terms)
    assert (found["b"] @ found["a"] - mean).norm() > 0.1 * mean.norm()
    torch.testing.assert_close(found["a"][3], terms[2][1]["a"][3] * 2 / 6)
    one = padded([PRODUCT], terms[1:2], start)
    torch.testing.assert_close(one["b"] @ one["a"], terms[1][1]["b"] @ terms[1][1]["a"], rtol=0, atol=1e-12)


def test_a_site_counts_by_the_size_of_its_product_and_by_weight_where_all_are_zero() -> None:
    terms, start = _terms()
    sizes = [float((tensors["b"] @ tensors["a"]).norm()) for _, tensors in terms]
    found = padded([PRODUCT], terms, start, by_size=True)
    first = sum(size * tensors["a"][0] for size, (_, tensors) in zip(sizes, terms, strict=True)) / sum(sizes)
    torch.testing.assert_close(found["a"][0], first, rtol=0, atol=1e-12)
    again = padded([PRODUCT], [(1, terms[0][1]), (99, terms[1][1]), (2, terms[2][1])], start, by_size=True)
    assert equal(again, found)
    empty = [(weight, {"b": tensors["b"] * 0, "a": tensors["a"]}) for weight, tensors in terms]
    assert equal(padded([PRODUCT], empty, start, by_size=True), padded([PRODUCT], empty, start))


def test_equal_ranks_by_weight_without_pruning_are_fedit(tmp_path: Path) -> None:
    """I6."""
    for weights in ("uniform", "examples"):
        plain = federation.run(tmp_path / f"it-{weights}", _settings({"weights": weights}, "fedit"), SITES)
        options = {"weights": weights, "gamma": 1, "by_size": False}
        het = federation.run(tmp_path / f"het-{weights}", _settings(options), SITES)
        assert equal(plain.shared, het.shared)
        assert plain.progress.ledger.payload == het.progress.ledger.payload
    sized = federation.run(tmp_path / "sized", _settings({"gamma": 1}), SITES)
    assert not equal(sized.shared, het.shared)


# ------------------------------------------------------------------------------------------------ in a federation
PRUNED = {"ranks": {"a": 3, "b": 2}, "gamma": 0.5, "strength": 50.0}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> federation.Outcome:
    settings = _settings(PRUNED, rounds=5, participation=0.75, moments="keep")
    return federation.run(tmp_path_factory.mktemp("hetlora"), settings, SITES)


def _ranks(outcome: federation.Outcome, way: str, site: str) -> list[int]:
    specs = outcome.experiment.model.specs
    return [rank for _, s, t in outcome.sent(way) if s == site and (rank := rank_of(t, specs)) is not None]


def test_ranks_fall_travel_in_shapes_and_both_ways_agree(pruned: federation.Outcome) -> None:
    limits = {"c": RANK, "d": RANK, **PRUNED["ranks"]}
    assert any(min(_ranks(pruned, "up", site)) < limits[site] for site in SITES), "somebody pruned"
    for site in SITES:
        up, down = _ranks(pruned, "up", site), _ranks(pruned, "down", site)
        assert down == [limits[site], *up[:-1]], "a site gets what it came down to"
        assert up == sorted(up, reverse=True)
        last = rank_of(pruned.served(site), pruned.experiment.model.specs)
        assert last == up[-1] == int(pruned.progress.server.memory[f"rank/{site}"])
    for p in products(pruned.experiment.model.specs):
        assert pruned.shared[p.right].shape[0] == RANK, "the server's rank stays"


def test_bytes_fall_with_the_ranks_and_stay_below_what_check_says(pruned: federation.Outcome) -> None:
    predicted, measured = predicted_bytes(pruned.experiment, SITES), pruned.progress.ledger.summary()
    specs = pruned.experiment.model.specs
    wide = sum(spec.shape[1 if n.endswith(".a") else 0] or 0 for n, spec in specs.items() if ".lora." in n)
    for site in SITES:
        limit = {"c": RANK, "d": RANK, **PRUNED["ranks"]}[site]
        missing = sum(limit - rank for rank in _ranks(pruned, "up", site)) * wide * 4
        assert predicted["up"]["per_site"][site] - measured["up"]["per_site"][site] == missing
        assert predicted["down"]["per_site"][site] >= measured["down"]["per_site"][site]


def test_with_a_codec_factors_that_may_shrink_go_in_full_and_fixed_ranks_are_predicted(tmp_path: Path) -> None:
    for options in ({"ranks": RANKS, "gamma": 1}, PRUNED):
        settings = federation.configure(strategy={"name": "hetlora", **options}, wire={"codec": "int8"})
        outcome = federation.run(tmp_path / str(options["gamma"]), settings, SITES)
        measured, predicted = outcome.progress.ledger.summary(), predicted_bytes(outcome.experiment, SITES)
        pairs = [(measured[w]["per_site"][s], predicted[w]["per_site"][s]) for w in ("up", "down") for s in SITES]
        assert all(found <= bound for found, bound in pairs)
        coded = {name for name in outcome.experiment.wire("up", 1) if ":" in name and ".lora." in name}
        assert bool(coded) == all(found == bound for found, bound in pairs) == (options["gamma"] == 1)


def test_a_rank_above_the_sites_or_several_in_one_message_are_refused(pruned: federation.Outcome) -> None:
    pieces = pruned.experiment
    declared = pieces.up(1, "a")
    specs = at(pieces.model.specs, pieces.strategy.declares.parts, "a")
    right = {n: torch.ones([int(size or 0) for size in spec.shape]) for n, spec in specs.items()}
    whole = encode(Reply("a", 1, 3, right), declared)
    assert equal(decode_reply(whole, declared).tensors, right)
    name = next(n for n in right if n.endswith(".a"))
    for bad in (torch.ones(4, right[name].shape[1]), torch.ones(0, right[name].shape[1])):
        with pytest.raises(WireError, match="another form"):
            encode(Reply("a", 1, 3, {name: bad}), declared)
    with pytest.raises(WireError, match="several ranks"):
        encode(Reply("a", 1, 3, {**right, name: right[name][:2]}), declared)
    fixed = federation.assemble(_settings({"ranks": PRUNED["ranks"], "gamma": 1})).up(1, "a")
    with pytest.raises(WireError, match="declare other tensors"):  # who knows of no smaller ranks reads no such message
        decode_reply(whole, fixed)


class _Stop(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_at_the_ranks_it_had(tmp_path: Path, pruned: federation.Outcome) -> None:
    def stop(told: Any) -> None:
        if (told["event"], told["round"]) == ("site", 4):
            raise _Stop

    settings = _settings(PRUNED, rounds=5, participation=0.75, moments="keep")
    with pytest.raises(_Stop):
        federation.run(tmp_path, settings, SITES, display=stop)
    resumed = federation.run(tmp_path, settings, SITES, wrap=federation.Backwards)
    assert equal(resumed.shared, pruned.shared)
    assert equal(resumed.progress.server.memory, pruned.progress.server.memory)
    assert all(equal(resumed.served(site), pruned.served(site)) for site in SITES)


def test_a_reply_that_was_lost_leaves_the_site_at_the_rank_the_server_knows(tmp_path: Path) -> None:
    lost = {("c", number) for number in (2, 4)}
    wrap = lambda inner: federation.Lossy(inner, lost, before_work=False)  # noqa: E731
    outcome = federation.run(tmp_path, _settings(PRUNED, rounds=5, quorum=0.5), SITES, wrap=wrap)
    kept = [
        rank_of(t, outcome.experiment.model.specs)
        for n, s, t in outcome.sent("up")
        if s == "c" and ("c", n) not in lost
    ]
    assert int(outcome.progress.server.memory["rank/c"]) == kept[-1]
    assert rank_of(outcome.served("c"), outcome.experiment.model.specs) == kept[-1]


def test_a_site_that_answers_nan_is_named(tmp_path: Path) -> None:
    def broken(training: Any, *rest: Any) -> Any:
        fitted = jointly(training, *rest)
        if (training.site, training.round) == ("b", 2):
            next(value for name, value in fitted.variables.items() if name.endswith(".b"))[0, 0] = torch.nan
        return fitted

    with pytest.raises(TrainingError, match="from site b in round 2"):
        federation.run(tmp_path, _settings(PRUNED), SITES, strategy=replace(_strategy(**PRUNED), fit=broken))


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    "options", [{"gamma": 0}, {"gamma": 1.1}, {"gamma": 1, "strength": 0.5}, {"strength": -1}, {"ranks": {"a": 0}}]
)
def test_what_has_no_meaning_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        _strategy(**options)


def test_layers_of_other_ranks_do_not_prune_together() -> None:
    tuner = [{"name": "lora", "rank": 4, "ranks": {"blocks.0": 2}}]
    settings = federation.configure(strategy={"name": "hetlora"}, tuner=tuner)
    with pytest.raises(ConfigError, match="one rank for all layers"):
        federation.assemble(settings).up(1)
    plain = federation.configure(strategy={"name": "hetlora", "gamma": 1}, tuner=tuner)
    assert federation.assemble(plain).up(1)


def test_only_the_rank_of_factors_may_shrink() -> None:
    specs = shrinking(toy.specs(_strategy()))
    assert {name: spec.shrinks for name, spec in specs.items()} == {f"{G}.a": 0, f"{G}.b": 1, "head.weight": None}
