"""dual_lora and fedopal: against a slow reference, FedIT and local training, and the algebra of orthogonality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import orthogonality, registry
from consilium.algebra import LowRank, orthogonalised, overlap
from consilium.errors import ConfigError
from consilium.local.train import Trainer
from consilium.strategies.dual import Dual
from consilium.strategies.fedavg import FedAvg
from consilium.strategies.partial import nothing
from consilium.tensors import Tensors, equal, weighted_mean
from consilium.tuners import compose
from tests import federation, toy

SITES = federation.hospitals(14, 9, 20)
HALF = {"participation": 0.67}
G, P = "layer.lora.shared", "layer.lora.personal"
SIDED = ("entrywise", "frobenius", "rows", "subspace")
PENALTIES = (*SIDED, "product", "cos_squared", "cos", "pooled")


def _run(folder: Path, name: str, options: Mapping[str, Any], **tables: Any) -> federation.Outcome:
    strategy = {"name": name, **options}
    return federation.run(folder, federation.configure(strategy=strategy, **tables), SITES)


def _same(first: federation.Outcome, second: federation.Outcome) -> bool:
    return equal(first.shared, second.shared) and all(equal(first.served(s), second.served(s)) for s in SITES)


# ------------------------------------------------------------------------------------------------ the slow reference
def _sides(v: Mapping[str, Tensor], side: str) -> list[tuple[Tensor, Tensor]]:
    read, write = (v["A_g"], v["A_p"]), (toy.SCALE * v["B_g"].T, toy.SCALE * v["B_p"].T)
    return {"right": [read], "left": [write], "both": [read, write]}[side]


def _omega(kind: str, side: str, v: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Section 1.3's formulas, with dense matrices and QR."""
    delta_g, delta_p = toy.SCALE * v["B_g"] @ v["A_g"], toy.SCALE * v["B_p"] @ v["A_p"]
    if kind == "product":
        return (delta_g * delta_p).sum() ** 2 / (delta_g.norm() ** 2 * delta_p.norm() ** 2)
    if kind in ("cos_squared", "cos", "pooled"):
        first = x @ (delta_g + toy.frozen() if kind == "pooled" else delta_g).T
        cosine = torch.nn.functional.cosine_similarity(first, x @ delta_p.T, dim=1, eps=1e-12)
        return cosine.abs().mean() if kind == "cos" else (cosine**2).mean()
    found = []
    for a, b in _sides(v, side):
        if kind == "entrywise":
            found.append((a @ b.T).abs().sum())
        elif kind == "frobenius":
            found.append((a @ b.T).norm() ** 2 / (len(a) * len(b)))
        elif kind == "rows":
            unit = [m / m.norm(dim=1, keepdim=True) for m in (a, b)]
            found.append((unit[0] @ unit[1].T).norm() ** 2 / (len(a) * len(b)))
        else:
            q = [torch.linalg.qr(m.T)[0] for m in (a, b)]
            found.append((q[0].T @ q[1]).norm() ** 2 / min(len(a), len(b)))
    return sum(found) / len(found)


def _by_hand(kind: str, side: str, strength: float, personal_only: bool, rounds: int, personal_rank: int) -> Any:
    """FedAvg of (A_g, B_g, head), gradient descent on all factors, lambda growing over two rounds."""
    names = {f"{G}.a": "A_g", f"{G}.b": "B_g", f"{P}.a": "A_p", f"{P}.b": "B_p", "head.weight": "H"}
    known = toy.specs(registry.build("strategies", "dual_lora", {"personal_rank": personal_rank}))
    shared = {names[n]: v for n, v in toy.initial(known, 1).items() if n not in (f"{P}.a", f"{P}.b")}
    own = [{names[n]: toy.initial(known, 2 + at)[n] for n in (f"{P}.a", f"{P}.b")} for at in range(3)]
    for number in range(1, rounds + 1):
        sent = []
        for at, site in enumerate(toy.SITES):
            v, (x, y) = {**shared, **own[at]}, toy.data(site)
            for _ in range(3):
                leaves = {n: t.detach().requires_grad_() for n, t in v.items()}
                weight = toy.frozen() + toy.SCALE * (leaves["B_g"] @ leaves["A_g"] + leaves["B_p"] @ leaves["A_p"])
                task = ((x @ weight.T @ leaves["H"].T - y) ** 2).mean()
                slope = dict(zip(leaves, torch.autograd.grad(task, list(leaves.values())), strict=True))
                omega = strength * min(1, number / 2) * _omega(kind, side, leaves, x)
                pulls = torch.autograd.grad(omega, list(leaves.values()), allow_unused=True)
                for n, pull in zip(leaves, pulls, strict=True):
                    if pull is not None and (n in ("A_p", "B_p") or not personal_only):
                        slope[n] = slope[n] + pull
                v = {n: t - toy.RATE * slope[n] for n, t in v.items()}
            own[at] = {n: v[n] for n in ("A_p", "B_p")}
            sent.append({n: v[n] for n in shared})
        total = sum(toy.SIZES.values())
        shared = {n: sum(toy.SIZES[s] * t[n] for s, t in zip(toy.SITES, sent, strict=True)) / total for n in shared}
    return {back: shared.get(n) for back, n in names.items() if n in shared}, own


@pytest.mark.parametrize("personal_only", [False, True], ids=["both", "personal"])
@pytest.mark.parametrize(
    ("kind", "side"),
    [*((kind, side) for kind in SIDED for side in ("right", "left", "both")), *((k, None) for k in PENALTIES[4:])],
)
def test_rounds_are_those_of_the_formulas(kind: str, side: str | None, personal_only: bool) -> None:
    options: dict[str, Any] = {"penalty": kind, "strength": 0.3, "warmup_rounds": 2, "personal_rank": 1}
    options |= {"side": side} if side else {}
    options |= {"floor": 1e-9} if kind not in ("entrywise", "frobenius") else {}
    options |= {"gradient": "personal"} if personal_only else {}
    outcome = toy.federate(registry.build("strategies", "fedopal", options), rounds=3)
    shared, own = _by_hand(kind, side or "right", 0.3, personal_only, rounds=3, personal_rank=1)
    close = {"rtol": 0, "atol": 1e-6 if kind in ("cos_squared", "cos", "pooled") else 1e-10}  # cosines are in float32
    torch.testing.assert_close(dict(outcome.server.shared), shared, **close)
    for at, site in enumerate(toy.SITES):
        torch.testing.assert_close(
            dict(outcome.personal[site].tensors), {f"{P}.a": own[at]["A_p"], f"{P}.b": own[at]["B_p"]}, **close
        )
    plain, _ = _by_hand(kind, side or "right", 0.0, personal_only, rounds=3, personal_rank=1)
    assert max(float((plain[n] - v).abs().max()) for n, v in shared.items()) > 1e-5, "the penalty acts"


# ------------------------------------------------------------------------------------------------ degenerate cases: I21
def test_without_a_personal_part_and_a_penalty_it_is_fedit(tmp_path: Path) -> None:
    fedit = _run(tmp_path / "fedit", "fedit", {}, train=HALF)
    for name, options in (("dual_lora", {}), ("fedopal", {"strength": 0}), ("fedopal_weights", {"strength": 0})):
        assert _same(fedit, _run(tmp_path / name, name, {"personal_rank": 0, **options}, train=HALF))
    assert not _same(fedit, _run(tmp_path / "two", "dual_lora", {}, train=HALF))


def test_without_a_penalty_it_is_dual_lora_and_a_penalty_shows(tmp_path: Path) -> None:
    dual = _run(tmp_path / "dual", "dual_lora", {}, train=HALF)
    assert _same(dual, _run(tmp_path / "none", "fedopal", {"strength": 0}, train=HALF))
    for name in ("fedopal_weights", "fedopal_representations"):
        assert not _same(dual, _run(tmp_path / name, name, {}, train=HALF))


def test_presets_are_the_family_with_a_penalty_named(tmp_path: Path) -> None:
    for preset, penalty in (("fedopal_weights", "subspace"), ("fedopal_representations", "cos_squared")):
        short = {"rounds": 1, "local_steps": 2}
        named = _run(tmp_path / preset, "fedopal", {"penalty": penalty}, train=short)
        assert _same(named, _run(tmp_path / penalty, preset, {}, train=short))


def test_sharing_nothing_is_local_training(tmp_path: Path) -> None:
    built = registry.build("strategies", "dual_lora", {})
    settings = federation.configure()
    alone = replace(built, shares=nothing)
    found = federation.run(tmp_path / "dual", settings, SITES, strategy=alone)
    local = FedAvg(shares=nothing, declares=built.declares)
    assert _same(found, federation.run(tmp_path / "local", settings, SITES, strategy=local))
    assert not found.shared


def test_exchanging_sites_exchanges_their_personal_parts_alone() -> None:
    """I21; sites of the toy are told apart by their data alone once their starts are alike."""
    strategy = registry.build("strategies", "fedopal", {})
    known = toy.specs(strategy)
    first = toy.federate(strategy, 2)
    swapped = dict(zip(toy.SITES, ("b", "c", "a"), strict=True))
    server = strategy.init_server(toy.initial(known, 1), known, toy.SITES)
    personal = {
        new: strategy.init_site(toy.initial(known, 2 + toy.SITES.index(old)), known, new)
        for new, old in swapped.items()
    }
    for number in (1, 2):
        learned = {
            new: strategy.learn(strategy.send(server, new), personal[new], toy.Toy(strategy, known, old, number))
            for new, old in swapped.items()
        }
        personal = {new: found.personal for new, found in learned.items()}
        updates = [toy.Update(n, learned[n].update, toy.SIZES[swapped[n]]) for n in sorted(learned)]
        server = strategy.combine(server, updates, known)
    torch.testing.assert_close(dict(server.shared), dict(first.server.shared), rtol=0, atol=1e-12)
    for new, old in swapped.items():
        mine, theirs = dict(personal[new].tensors), dict(first.personal[old].tensors)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert not equal(first.personal["a"].tensors, first.personal["b"].tensors)


# ------------------------------------------------------------------------------------------------ what travels
@pytest.mark.parametrize("head", ["shared", "personal", "both"])
def test_personal_tensors_never_travel_and_bytes_are_those_of_one_adapter(tmp_path: Path, head: str) -> None:
    outcome = _run(tmp_path, "fedopal", {"head": head, "personal_rank": 2})
    names = {name for _, _, tensors in outcome.sent("up", "down", "finish") for name in tensors}
    assert not [name for name in names if ".personal." in name or name.startswith("added/")]
    assert ("head.weight" in names) == (head != "personal")
    for site in SITES:
        kept = {n: v for n, v in outcome.served(site).items() if ".personal." in n}
        assert {v.shape[0] for n, v in kept.items() if n.endswith(".a")} == {2}
        federation.assert_absent(kept, outcome.wire)
    one = _run(tmp_path / "fedit", "fedper" if head == "personal" else "fedit", {})
    assert outcome.progress.ledger.payload == one.progress.ledger.payload
    models = outcome.experiment.strategy.deploy(outcome.shared, toy.Personal())
    assert ("global" in models) == (head != "personal")


def test_a_personal_head_is_added_to_the_shared_one(tmp_path: Path) -> None:
    outcome = _run(tmp_path, "dual_lora", {"head": "both"})
    for site in SITES:
        served = outcome.served(site)
        assert not [name for name in served if name.startswith("added/")]
        assert not torch.equal(served["head.weight"], outcome.shared["head.weight"])
    strategy = registry.build("strategies", "dual_lora", {"head": "both"})
    own = toy.federate(strategy, 1, steps=0).personal["a"].tensors["added/head.weight"]
    assert not own.any(), "it starts at zero, so that first predictions are the shared head's"
    with pytest.raises(ConfigError, match="needs a role that nothing has"):
        federation.assemble(
            federation.configure(strategy={"name": "dual_lora", "head": "both"}, head={"share": "frozen"})
        )


@pytest.mark.parametrize(
    ("server", "odd", "even"), [("ffa", {"b"}, {"b"}), ("rolora", {"b"}, {"a"}), ("mean", {"a", "b"}, {"a", "b"})]
)
def test_the_server_rule_is_of_the_shared_factors_alone(server: str, odd: set[str], even: set[str]) -> None:
    pieces = federation.assemble(federation.configure(strategy={"name": "fedopal", "server": server}))
    for number, letters in ((1, odd), (2, even)):
        assert {name[-1] for name in pieces.up(number) if ".lora." in name} == letters
        active = pieces.active(number, "a")
        own = [spec for name, spec in pieces.model.specs.items() if ".personal." in name]
        assert all(active(spec.tag) for spec in own)
    assert not pieces.strategy.declares.needs_individual_updates
    named = registry.build("strategies", "fedopal", {"aggregate": "product_svd"})
    assert named.declares.needs_individual_updates


def test_other_sums_leave_the_personal_part_alone(tmp_path: Path) -> None:
    for aggregate in ("product_svd", "stack", "residual", "median"):
        outcome = _run(tmp_path / aggregate, "fedopal", {"aggregate": aggregate}, train={"rounds": 2})
        served = outcome.served("a")
        assert all(torch.isfinite(value).all() for value in served.values())
        assert not [name for name in outcome.experiment.down(1) if ".personal." in name]


def test_both_parts_merged_are_both_summed(tmp_path: Path) -> None:
    """I23."""
    outcome = _run(tmp_path, "dual_lora", {"personal_rank": 2})
    model, served = outcome.experiment.model, outcome.served("b")
    images = torch.rand(3, 3, federation.SIZE, federation.SIZE, generator=torch.Generator().manual_seed(1))
    summed = model.features(served, images)
    alone = model.features({n: v for n, v in served.items() if ".personal." not in n}, images)
    assert (summed - alone).abs().max() > 1e-3
    merged = compose.merge(model, served)(images)
    torch.testing.assert_close(merged, summed, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ orthogonality: 3.4
def _couple(seed: int, rank: int = 2) -> tuple[LowRank, LowRank]:
    g, p = ((toy.draw(seed + at, 7, rank), toy.draw(seed + at + 10, rank, 9)) for at in (0, 1))
    return LowRank(*g), LowRank(*p)


def test_a_side_makes_updates_orthogonal_and_b_side_outputs() -> None:
    g, p = _couple(1)
    x, delta = toy.draw(5, 9), g.left @ g.right
    reads = p.left @ orthogonalised(p.right, g.right)
    assert (delta @ reads.T).abs().max() < 1e-10
    assert abs(float((delta * reads).sum())) < 1e-10
    assert abs(float((delta @ x) @ (reads @ x))) > 0.1, "outputs are not orthogonal"
    writes = orthogonalised(p.left.T, g.left.T).T @ p.right
    assert (delta.T @ writes).abs().max() < 1e-10
    assert abs(float((delta @ x) @ (writes @ x))) < 1e-10


def test_which_penalties_know_the_gauge_and_which_can_be_cheated() -> None:
    """W1 to W3 change with the factorisation of the same product, W4, W5 and representations do not; W1 and W2 fall
    when A_p shrinks and B_p grows."""
    g, p = _couple(3)
    gauge = torch.eye(2, dtype=torch.float64) + 0.3 * toy.draw(8, 2, 2)
    turned = LowRank(p.left @ torch.linalg.inv(gauge), gauge @ p.right)
    shrunk = LowRank(p.left * 10, p.right / 10)
    x = toy.draw(4, 5, 9)

    def all_of(own: LowRank) -> dict[str, float]:
        found = {kind: orthogonality.of_sides(kind, "right", (g, own), 1e-9) for kind in SIDED}
        found["product"] = orthogonality.of_products((g, own), 1e-9)
        u, v = x @ (g.left @ g.right).T, x @ (own.left @ own.right).T
        found["cos"] = orthogonality.cosines(u, v, 1e-9, squared=False)
        return {name: float(value) for name, value in found.items()}

    plain, other, small = all_of(p), all_of(turned), all_of(shrunk)
    assert {name for name in plain if abs(other[name] / plain[name] - 1) > 1e-5} == {"entrywise", "frobenius", "rows"}
    assert {name for name in plain if abs(small[name] / plain[name] - 1) > 1e-5} == {"entrywise", "frobenius"}


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_at_the_start_where_b_is_zero_everything_is_finite(kind: str, side: str) -> None:
    """A cosine has no value there, and next to it a gradient like one over the norm: the floor bounds it."""
    options = {"penalty": kind, **({"side": side} if kind in SIDED else {})}
    strategy = registry.build("strategies", "fedopal", options)
    known = toy.specs(strategy)
    start = {n: (v if n.endswith(".a") or n.startswith("head") else 0 * v) for n, v in toy.initial(known, 1).items()}
    personal = strategy.init_site(start, known, "a")
    for size in (0.0, 1e-12, 1e-6):
        moved = {n: v + size * torch.ones_like(v) for n, v in start.items()}
        received = {n: v for n, v in moved.items() if n not in personal.tensors}
        learned = strategy.learn(
            received, toy.Personal({n: moved[n] for n in personal.tensors}), toy.Toy(strategy, known, "a")
        )
        everything = {**learned.update, **learned.personal.tensors}
        assert all(torch.isfinite(value).all() for value in everything.values())
        assert max(float(value.abs().max()) for value in everything.values()) < 50
        assert all(torch.isfinite(torch.tensor(value)) for value in learned.numbers.values())


@pytest.mark.parametrize("kind", ["subspace", "product", "cos_squared", "cos", "pooled"])
@pytest.mark.parametrize("gradient", ["personal", "both"])
def test_a_penalty_for_the_personal_part_moves_no_shared_tensor_of_any_layer(kind: str, gradient: str) -> None:
    """Not by way of what enters a later layer either."""
    sent = []
    for strength in (1.0, 3.0):
        strategy = {"name": "fedopal", "penalty": kind, "gradient": gradient, "strength": strength}
        train = {**federation.SGD, "local_steps": 1, "local_epochs": None}
        pieces = federation.assemble(federation.configure(strategy=strategy, train=train))
        specs, trained = pieces.model.specs, pieces.model.initial(3)
        values = {n: v + 0.1 * toy.draw(at, *v.shape).float() for at, (n, v) in enumerate(sorted(trained.items()))}
        own = pieces.strategy.init_site(values, specs, "a")
        trainer = Trainer(pieces.setting, SITES["a"].train, 1, "a", [5, 5, 4])
        received = {name: value for name, value in values.items() if name not in own.tensors}
        sent.append(pieces.strategy.learn(received, own, trainer))
    assert not equal(sent[0].personal.tensors, sent[1].personal.tensors)
    for name, value in sent[0].update.items():
        alike = torch.allclose(value, sent[1].update[name], rtol=0, atol=1e-7)
        assert alike or gradient == "both", name
    assert equal(sent[0].update, sent[1].update) <= (gradient == "personal")


def test_with_b_at_zero_the_first_step_moves_b_alone() -> None:
    strategy = registry.build("strategies", "dual_lora", {})
    known = toy.specs(strategy)
    start = {n: 0 * v if n.endswith(".b") else v for n, v in toy.initial(known, 1).items()}
    personal = strategy.init_site(start, known, "a")
    received = {n: v for n, v in start.items() if n not in personal.tensors}
    learned = strategy.learn(received, personal, toy.Toy(strategy, known, "a", steps=1))
    moved = {n for n, v in {**learned.update, **learned.personal.tensors}.items() if not torch.equal(v, start[n])}
    assert moved == {f"{G}.b", f"{P}.b", "head.weight"}


def test_without_a_floor_the_start_would_have_no_gradient() -> None:
    zero = torch.zeros(4, requires_grad=True)
    cosine = (zero * torch.ones(4)).sum() / (zero.norm() * 2)
    assert torch.isnan(torch.autograd.grad(cosine, zero)[0]).all()


def test_the_mean_of_the_sites_undoes_what_each_reached_and_a_projection_restores_it() -> None:
    options = {"strength": 0, "hard": "projected"}
    strategy = registry.build("strategies", "fedopal", options)
    outcome = toy.federate(strategy, 3, steps=2)
    for learned in outcome.learned[-1].values():
        assert learned.numbers["overlap_received"] > 1e-3, "the mean brought it back"
    still = toy.federate(strategy, 1, steps=0)
    for site, learned in still.learned[0].items():
        assert learned.numbers["overlap_right"] < 1e-20
        assert learned.numbers["overlap_received"] > 0.01
        left = toy.federate(registry.build("strategies", "fedopal", {**options, "side": "left"}), 1, steps=0)
        assert left.learned[0][site].numbers["overlap_left"] < 1e-20


def test_numbers_of_a_round_are_overlaps_against_chance_and_shares(tmp_path: Path) -> None:
    strategy = registry.build("strategies", "dual_lora", {"personal_rank": 1})
    outcome = toy.federate(strategy, 1)
    for site, learned in outcome.learned[0].items():
        v: Tensors = {**learned.update, **learned.personal.tensors}
        a, b = v[f"{G}.a"], v[f"{P}.a"]
        assert learned.numbers["overlap_right"] == pytest.approx(overlap(a, b) / (2 / toy.IN))
        sizes = [float((v[f"{part}.b"] @ v[f"{part}.a"]).norm()) for part in (G, P)]
        assert learned.numbers["share_personal"] == pytest.approx(sizes[1] / sum(sizes)), site
    strong = _run(tmp_path / "strong", "fedopal", {"strength": 50.0})
    none = _run(tmp_path / "none", "dual_lora", {})
    logged = [[e["sites"]["a"]["learned"] for e in o.events if e["event"] == "round"] for o in (strong, none)]
    assert {*logged[0][-1]} == {*orthogonality.NUMBERS} == {*none.experiment.strategy.declares.numbers}
    assert logged[0][-1]["overlap_right"] < 0.5 * logged[1][-1]["overlap_right"]


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("fedopal", {"personal_rank": 0}, "nothing to be orthogonal"),
        ("fedopal", {"personal_rank": 0, "strength": 0, "hard": "projected"}, "nothing to be orthogonal"),
        ("fedopal", {"penalty": "product", "side": "left"}, "side is of weights"),
        ("fedopal", {"penalty": "cos", "side": "left"}, "side is of weights"),
        ("fedopal", {"strength": 0, "floor": 0.1}, "floor without effect"),
        ("fedopal_weights", {"penalty": "cos"}, "penalty"),
        ("fedopal_representations", {"penalty": "rows"}, "penalty"),
        ("dual_lora", {"personal_rank": -1}, "personal_rank"),
    ],
)
def test_options_that_act_on_nothing_are_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        registry.build("strategies", name, options)


@pytest.mark.parametrize("server", ["mean", "leave_one_out"])
def test_a_personal_head_is_not_added_to_a_head_that_is_not_shared(server: str) -> None:
    both = {"name": "fedopal", "head": "both", "server": server}
    federation.assemble(federation.configure(strategy=both))
    with pytest.raises(ConfigError, match=r"no head is shared[\s\S]*strategy\.head"):
        federation.assemble(federation.configure(strategy=both, head={"share": "personal"}))


def test_outputs_per_layer_need_layers() -> None:
    prompts = [{"name": "low_rank_prompts", "length": 12, "rank": 2}]
    federation.assemble(federation.configure(tuner=prompts, strategy={"name": "fedopal_weights"}))
    with pytest.raises(ConfigError, match="needs a role that nothing has"):
        federation.assemble(federation.configure(tuner=prompts, strategy={"name": "fedopal_representations"}))
    with pytest.raises(ConfigError, match="nothing that this strategy sums is a product"):
        federation.assemble(federation.configure(tuner=[{"name": "adapter"}], strategy={"name": "dual_lora"}))


def test_the_mean_of_shared_tensors_is_fedavgs() -> None:
    strategy = registry.build("strategies", "fedopal", {"weights": "uniform"})
    assert isinstance(strategy, Dual)
    outcome = toy.federate(strategy, 1)
    mean = weighted_mean([(1, learned.update) for learned in outcome.learned[0].values()])
    assert equal(outcome.server.shared, mean)


@pytest.mark.parametrize("penalty", ["cos", "pooled", "subspace"])
def test_fast_paths_and_recomputing_change_no_bit(tmp_path: Path, penalty: str) -> None:
    """What a penalty looks at is there under a cached prefix and in blocks that are computed again."""
    outcomes = []
    for cached, again in ((False, False), (True, False), (False, True)):
        engine = {"prefix_cache": cached, "gradient_checkpointing": again}
        tables = {"tuner": [{"name": "lora", "rank": 2, "blocks": [4, 5]}], "train": {"rounds": 2}, "engine": engine}
        outcomes.append(_run(tmp_path / f"{cached} {again}", "fedopal", {"penalty": penalty}, **tables))
    assert all(_same(outcomes[0], other) for other in outcomes[1:])
