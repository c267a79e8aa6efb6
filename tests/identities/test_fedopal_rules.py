"""Server rules of dual_lora and fedopal, and personal factors designed from a site's inputs: identities, references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import keeping, orthogonality, registry
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError
from consilium.orthogonality import designed
from consilium.strategies.dual import Dual
from consilium.tensors import Tensors, equal
from tests import federation, toy

SITES = federation.hospitals(14, 9, 20, 11)
EXACT = {"rtol": 0, "atol": 1e-10}
DRAWN = {2: ("a", "c"), 3: ("b",)}
G, P = "layer.lora.shared", "layer.lora.personal"
HALF = {"rounds": 4, "participation": 0.5}


def _build(name: str = "fedopal", **options: Any) -> Dual:
    found = registry.build("strategies", name, options)
    assert isinstance(found, Dual)
    return found


def _run(folder: Path, options: dict[str, Any], **tables: Any) -> federation.Outcome:
    strategy = {"name": "fedopal", **options}
    return federation.run(folder, federation.configure(strategy=strategy, **tables), SITES)


def _personal(outcome: federation.Outcome, site: str) -> Tensors:
    states = StateFolder(outcome.folder / "sites" / site, outcome.experiment.handshake.agreement)
    number = outcome.progress.builds_on.get(site)
    return states.load(number).personal.tensors if number else {}


def _steps(v: dict[str, Tensor], site: str, still: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Three steps of gradient descent on (A_g, B_g, A_p, B_p, H), from the formula."""
    x, y = toy.data(site)
    for _ in range(3):
        leaves = {n: t.detach().requires_grad_() for n, t in v.items()}
        weight = toy.frozen() + toy.SCALE * (leaves["B_g"] @ leaves["A_g"] + leaves["B_p"] @ leaves["A_p"])
        slopes = torch.autograd.grad(((x @ weight.T @ leaves["H"].T - y) ** 2).mean(), list(leaves.values()))
        v = {n: t - (0 if n in still else toy.RATE) * s for (n, t), s in zip(v.items(), slopes, strict=True)}
    return v


def _start() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    names = {"A_g": f"{G}.a", "B_g": f"{G}.b", "A_p": f"{P}.a", "B_p": f"{P}.b", "H": "head.weight"}
    known = toy.specs(_build("dual_lora"))
    shared = {k: toy.initial(known, 1)[names[k]] for k in ("A_g", "B_g", "H")}
    own = {s: {k: toy.initial(known, 2 + at)[names[k]] for k in ("A_p", "B_p")} for at, s in enumerate(toy.SITES)}
    return shared, own


def _same(first: federation.Outcome, second: federation.Outcome) -> bool:
    return equal(first.shared, second.shared) and all(equal(first.served(s), second.served(s)) for s in SITES)


# ------------------------------------------------------------------------------------------------ server rules
@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ({"server": "mean"}, {"name": "fedit"}),
        ({"server": "ffa"}, {"name": "ffa"}),
        ({"server": "rolora"}, {"name": "rolora"}),
        ({"server": "fedsvd"}, {"name": "fedsvd"}),
        ({"server": "fedsvd", "period": 2}, {"name": "fedsvd", "period": 2}),
        ({"server": "fedsvd", "period": 9}, {"name": "ffa"}),
    ],
    ids=["fedit", "ffa", "rolora", "fedsvd", "fedsvd 2", "fedsvd 9"],
)
def test_without_a_personal_part_a_server_rule_is_the_strategy_of_its_name(
    tmp_path: Path, options: dict[str, Any], strategy: dict[str, Any]
) -> None:
    """I21 for every rule, bit by bit."""
    bare = _run(tmp_path / "rule", {"strength": 0, "personal_rank": 0, **options}, train=HALF)
    named = federation.run(tmp_path / "name", federation.configure(strategy=strategy, train=HALF), SITES)
    assert _same(bare, named)
    both = _run(tmp_path / "both", {"strength": 0, **options}, train=HALF)
    assert both.progress.ledger.payload == named.progress.ledger.payload
    assert not _same(both, named)


def test_a_change_of_basis_keeps_what_the_personal_part_stands_beside(tmp_path: Path) -> None:
    """fedsvd's A_g is orthonormal and its span stays: a design stays orthogonal to it in every round."""
    options = {"server": "fedsvd", "hard": "designed", "strength": 0}
    outcome = _run(tmp_path, options, train={"rounds": 3})
    for product in orthogonality.products(outcome.experiment.model.specs):
        if product.part == "shared":
            a = outcome.shared[product.right].double()
            torch.testing.assert_close(a @ a.T, torch.eye(len(a), dtype=torch.float64), rtol=0, atol=1e-5)
    events = [e["sites"][site]["learned"] for e in outcome.events if e["event"] == "round" for site in SITES]
    assert max(event["overlap_right"] for event in events) < 1e-8
    assert max(event["overlap_received"] for event in events[len(SITES) :]) < 1e-8


def test_moments_of_the_personal_part_outlive_another_basis_of_the_shared_one(tmp_path: Path) -> None:
    outcome = _run(tmp_path, {"server": "fedsvd"}, train={"rounds": 2, "moments": "keep"})
    states = StateFolder(outcome.folder / "sites" / "a", outcome.experiment.handshake.agreement)
    kept = {name.rpartition("/")[2] for name in states.load(2).moments}
    known = outcome.experiment.model.specs
    own = {n for n, spec in known.items() if spec.tag.part == "personal"}
    assert kept == own | {n for n, spec in known.items() if spec.factor is None}


# ------------------------------------------------------------------------------------------------ leave-one-out
def test_leave_one_out_is_the_mean_of_the_other_sites_newest_formed_by_hand() -> None:
    """With sites that miss rounds; every site goes on from the others' mean, and is served it."""
    strategy = _build("dual_lora", server="leave_one_out")
    outcome = toy.federate(strategy, 4, drawn=DRAWN)
    start, own = _start()
    newest = {site: {k: start[k] for k in ("A_g", "B_g")} for site in toy.SITES}
    head = start["H"]
    for number in range(1, 5):
        before, heads = dict(newest), []
        for site in DRAWN.get(number, toy.SITES):
            others = {k: sum(before[j][k] for j in toy.SITES if j != site) / 2 for k in ("A_g", "B_g")}
            v = _steps({**others, **own[site], "H": head}, site)
            newest[site], own[site] = {k: v[k] for k in ("A_g", "B_g")}, {k: v[k] for k in ("A_p", "B_p")}
            heads.append(v["H"])
        head = sum(heads) / len(heads)
    torch.testing.assert_close(outcome.server.shared["head.weight"], head, **EXACT)
    for site in toy.SITES:
        served = outcome.model(strategy, site)
        for letter in "AB":
            others = sum(newest[j][f"{letter}_g"] for j in toy.SITES if j != site) / 2
            torch.testing.assert_close(served[f"{G}.{letter.lower()}"], others, **EXACT)
            torch.testing.assert_close(served[f"{P}.{letter.lower()}"], own[site][f"{letter}_p"], **EXACT)
        everyone = sum(newest[j]["A_g"] for j in toy.SITES) / 3
        torch.testing.assert_close(outcome.model(strategy, site, "global")[f"{G}.a"], everyone, **EXACT)


def test_before_aggregation_stands_what_the_site_itself_trained() -> None:
    strategy = _build("dual_lora", server="leave_one_out")
    outcome = toy.federate(strategy, 2)
    learned = outcome.learned[-1]["a"]
    before = strategy.deploy({**outcome.received["a"], **learned.update}, learned.personal)["personal"]
    for letter in "ab":
        assert torch.equal(before[f"{G}.{letter}"], learned.personal.tensors[f"own/{G}.{letter}"])
    assert before.keys() == toy.specs(strategy).keys()


def test_leave_one_out_in_a_federation_needs_sums_alone_and_its_own_bytes(tmp_path: Path) -> None:
    outcome = _run(tmp_path / "one out", {"server": "leave_one_out"}, train=HALF)
    assert not outcome.experiment.strategy.declares.needs_individual_updates
    start, kept = outcome.experiment.model.initial(3), {site: _personal(outcome, site) for site in SITES}
    for site in SITES:
        served = outcome.served(site)
        assert served.keys() == outcome.experiment.model.specs.keys()
        for name in (n for n in start if ".shared." in n):
            others = [kept[s].get(f"own/{name}", start[name]).double() for s in SITES if s != site]
            torch.testing.assert_close(served[name].double(), torch.stack(others).mean(0), rtol=1e-5, atol=1e-6)
        own = {n: v for n, v in kept[site].items() if ".personal." in n}
        if own:
            federation.assert_absent(own, outcome.wire)
    mean = _run(tmp_path / "mean", {"weights": "uniform"}, train=HALF)
    assert not equal(mean.served("a"), outcome.served("a"))
    up, other = (o.progress.ledger.payload["up"] for o in (outcome, mean))
    assert up == other


@pytest.mark.parametrize(
    "tuner",
    [
        {"name": "lora", "rank": 2, "freeze_a": True},
        {"name": "lora", "rank": 2, "dora": True},
        {"name": "low_rank_prompts", "length": 12, "rank": 2, "depth": "deep", "share_basis": True},
    ],
    ids=["frozen a", "dora", "prompts"],
)
def test_leave_one_out_goes_with_every_kind_of_factor(tmp_path: Path, tuner: dict[str, Any]) -> None:
    outcome = _run(tmp_path, {"server": "leave_one_out", "side": "left"}, tuner=[tuner], train=HALF)
    start = outcome.experiment.model.initial(3)
    for site in SITES:
        served = outcome.served(site)
        assert served.keys() == outcome.experiment.model.specs.keys()
        assert all(torch.isfinite(value).all() for value in served.values())
        if "freeze_a" in tuner:
            assert all(torch.equal(served[n], v) for n, v in start.items() if n.endswith(".shared.a"))


def test_a_site_without_others_is_refused(tmp_path: Path) -> None:
    settings = federation.configure(strategy={"name": "fedopal", "server": "leave_one_out"})
    with pytest.raises(ConfigError, match="needs other sites"):
        federation.run(tmp_path, settings, {"a": SITES["a"]})


@pytest.mark.parametrize("sides", ["right", "left", "both"])
def test_a_projection_takes_off_what_the_shared_part_spans_and_nothing_else(sides: Any) -> None:
    """A_p (I - Q Q^T), (I - Q Q^T) B_p of the factors themselves, whatever the scale."""
    specs = toy.specs(_build())
    x, pairs = toy.initial(specs, 5), orthogonality.couples(specs, {"personal"})
    found, ((g, p),) = orthogonality.projected(pairs, x, sides), pairs
    assert found.keys() == {*(p.left if sides != "right" else ()), *((p.right,) if sides != "left" else ())}
    for name, beside in ((p.right, x[g.right].T), (p.left[0], x[g.left[0]])):
        q = torch.linalg.qr(beside)[0]
        wanted = x[name] - x[name] @ q @ q.T if name == p.right else x[name] - q @ q.T @ x[name]
        torch.testing.assert_close(found.get(name, wanted), wanted, **EXACT)


# ------------------------------------------------------------------------------------------------ designed factors
def _by_hand(h: Tensor, a_g: Tensor, rank: int) -> Tensor:
    """InfLoRA's lines, dense: H <- H - M M^T H, A = U_r^T / sqrt 3."""
    m = torch.linalg.qr(a_g.T)[0]
    u = torch.linalg.svd(h - m @ m.T @ h)[0]
    return u[:, :rank].T / 3**0.5


def _span(rows: Tensor) -> Tensor:
    """The projector on the rows."""
    q = torch.linalg.qr(rows.T)[0]
    return q @ q.T


def test_the_design_is_inflora_s_and_reads_what_the_shared_one_does_not() -> None:
    x, a_g = toy.draw(1, 40, 9) * torch.arange(1, 10), toy.draw(2, 3, 9)
    h = x.T @ x / len(x)
    found = designed(h, a_g, toy.draw(3, 2, 9))
    expected = _by_hand(h, a_g, 2)
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found @ found.T, torch.eye(2, dtype=torch.float64) / 3, **EXACT)
    assert (found @ a_g.T).abs().max() < 1e-10
    assert (found.gather(1, found.abs().argmax(dim=1, keepdim=True)) > 0).all(), "signs do not depend on the library"
    free = torch.eye(9) - _span(a_g)
    caught = float((found * 3**0.5 @ free @ h).square().sum())
    for seed in range(20):  # of all frames beside A_g none catches more
        frame = torch.linalg.qr((toy.draw(seed + 50, 2, 9) @ free).T)[0].T
        assert float((frame @ free @ h).square().sum()) <= caught + 1e-9


@pytest.mark.parametrize("spanned", [0, 1])
def test_where_inputs_span_too_little_rows_of_the_start_go_on(spanned: int) -> None:
    x, a_g, start = toy.draw(1, spanned, 9), toy.draw(2, 3, 9), toy.draw(3, 4, 9)
    found = designed(x.T @ x, a_g, start)
    torch.testing.assert_close(found @ found.T, torch.eye(4, dtype=torch.float64) / 3, **EXACT)
    assert (found @ a_g.T).abs().max() < 1e-10
    with pytest.raises(ConfigError, match="no room for two orthogonal adapters"):
        designed(x.T @ x, a_g, toy.draw(3, 7, 9))


@pytest.mark.parametrize("server", ["mean", "ffa"])
def test_rounds_with_designed_factors_are_those_of_the_formulas(server: str) -> None:
    """Made once of the first shared part that a site sees, projected beside what arrives, never trained."""
    strategy = _build(strength=0, hard="designed", server=server)
    outcome = toy.federate(strategy, 4, drawn=DRAWN)
    shared, own = _start()
    still = ("A_p", "A_g") if server == "ffa" else ("A_p",)
    made: dict[str, Tensor] = {}
    for number in range(1, 5):
        there, sent = DRAWN.get(number, toy.SITES), {}
        for site in there:
            x = toy.data(site)[0]
            made.setdefault(site, designed(x.T @ x / len(x), shared["A_g"], own[site]["A_p"]))
            a_p = made[site] @ (torch.eye(toy.IN, dtype=torch.float64) - _span(shared["A_g"]))
            v = _steps({**shared, "A_p": a_p, "B_p": own[site]["B_p"]}, site, still)
            assert (v["A_p"] @ shared["A_g"].T).abs().max() < 1e-10
            own[site], sent[site] = {k: v[k] for k in ("A_p", "B_p")}, v
        total = sum(toy.SIZES[s] for s in there)
        shared = {k: sum(toy.SIZES[s] * sent[s][k] for s in there) / total for k in shared}
    torch.testing.assert_close(outcome.server.shared[f"{G}.b"], shared["B_g"], **EXACT)
    for site in toy.SITES:
        kept, served = outcome.personal[site].tensors, outcome.model(strategy, site)
        torch.testing.assert_close(kept[f"design/{P}.a"], made[site], **EXACT)
        torch.testing.assert_close(served[f"{P}.a"], own[site]["A_p"], **EXACT)
        torch.testing.assert_close(served[f"{P}.b"], own[site]["B_p"], **EXACT)
        overlap = orthogonality.of_sides("subspace", "right", _couple(strategy, served), 1e-9)
        assert (overlap < 1e-18) == (server == "ffa"), "exact for good where the shared A stays; else until the mean"


def _couple(strategy: Dual, values: Tensors) -> Any:
    pairs = orthogonality.couples(toy.specs(strategy), {"personal"})
    return tuple(orthogonality.factors(product, values) for product in pairs[0])


def test_a_design_is_of_the_site_s_own_images_stays_there_and_is_not_trained(tmp_path: Path) -> None:
    outcome = _run(tmp_path, {"hard": "designed", "strength": 0, "server": "ffa", "personal_rank": 2}, train=HALF)
    pieces = outcome.experiment
    drawn = [site for site in SITES if outcome.progress.builds_on.get(site)]
    designs = {site: {n: v for n, v in _personal(outcome, site).items() if n.startswith("design/")} for site in drawn}
    for site in drawn:
        federation.assert_absent(designs[site], outcome.wire)
        served = outcome.served(site)
        assert served.keys() == pieces.model.specs.keys()
        for name, value in designs[site].items():
            variable = name.removeprefix("design/")
            a_g = outcome.shared[variable.replace(".personal.", ".shared.")]
            torch.testing.assert_close(served[variable], value, rtol=0, atol=1e-6)
            assert (served[variable] @ a_g.T).abs().max() < 1e-6
        events = [e["sites"][site] for e in outcome.events if e["event"] == "round"]
        assert max(e["learned"]["overlap_right"] for e in events if "learned" in e) < 1e-8
    assert not equal(designs[drawn[0]], designs[drawn[1]])
    active = pieces.active(1, "a")
    own = {n for n, spec in pieces.model.specs.items() if spec.tag.part == "personal" and active(spec.tag)}
    assert own
    assert all(name.endswith(".b") for name in own)


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {"hard": "designed"},
        {"server": "leave_one_out", "head": "both"},
        {"server": "leave_one_out", "hard": "designed"},
    ],
    ids=["designed", "one out", "both"],
)
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(tmp_path: Path, options: dict[str, Any]) -> None:
    def stop(told: dict[str, Any]) -> None:
        if (told["event"], told.get("round")) == ("site", 3):
            raise _Stop

    whole = _run(tmp_path / "whole", options, train=HALF)
    settings = federation.configure(strategy={"name": "fedopal", **options}, train=HALF)
    with pytest.raises(_Stop):
        federation.run(tmp_path / "stopped", settings, SITES, display=stop)
    resumed = federation.run(tmp_path / "stopped", settings, SITES)
    assert equal(resumed.shared, whole.shared)
    for site in SITES:
        assert equal(resumed.served(site), whole.served(site))
        assert equal(_personal(resumed, site), _personal(whole, site))


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"server": "leave_one_out", "weights": "examples"}, "counts all sites alike"),
        ({"server": "leave_one_out", "aggregate": "median"}, "counts all sites alike"),
        ({"server": "leave_one_out", "clip_updates": 1.0}, "counts all sites alike"),
        ({"server": "ffa", "aggregate": "product_svd"}, "no effect where one factor is common"),
        ({"server": "rolora", "aggregate": "residual"}, "no effect where one factor is common"),
        ({"server": "fedsvd", "aggregate": "median"}, "a sum of its own"),
        ({"server": "ffa", "aggregate": "refactor"}, "server = 'fedsvd'"),
        ({"period": 2}, "period has an effect with"),
        ({"hard": "designed", "gradient": "personal"}, "the penalty moves nothing"),
        ({"hard": "designed", "server": "ffa"}, "the penalty moves nothing"),
        ({"hard": "designed", "server": "fedsvd"}, "the penalty moves nothing"),
        ({"hard": "designed", "strength": 0, "side": "left"}, "side is of weights"),
        ({"server": "ffa", "gradient": "personal"}, "gradient has no effect"),
        ({"penalty": "entrywise", "floor": 0.1}, "floor has no effect"),
        ({"penalty": "frobenius", "floor": 0.1}, "floor has no effect"),
        ({"hard": "designed", "strength": 0, "personal_rank": 0}, "nothing to be orthogonal"),
    ],
)
def test_options_that_act_on_nothing_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _build(**options)


@pytest.mark.parametrize(("side", "goes"), [("right", False), ("left", True), ("both", True)])
def test_a_penalty_on_what_the_tuner_freezes_is_refused(tmp_path: Path, side: str, goes: bool) -> None:
    tables = {"tuner": [{"name": "lora", "rank": 2, "freeze_a": True}], "train": {"rounds": 1}}
    if goes:
        assert _run(tmp_path, {"side": side}, **tables).progress.server.round == 1
    else:
        settings = federation.configure(strategy={"name": "fedopal", "side": side}, **tables)
        with pytest.raises(ConfigError, match="the tuner trains no factor of this side"):
            keeping.kept(federation.assemble(settings), SITES)


def test_a_design_needs_a_layer_s_inputs() -> None:
    prompts = [{"name": "low_rank_prompts", "length": 12, "rank": 2}]
    with pytest.raises(ConfigError, match="needs a role that nothing has"):
        federation.assemble(federation.configure(tuner=prompts, strategy={"name": "fedopal", "hard": "designed"}))
