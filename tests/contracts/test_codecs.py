"""What must hold for every strategy when parameters travel as coded steps: both ends believe the same, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import results
from consilium.check import predicted_bytes
from consilium.coordinator import Coordinator
from consilium.engines.simulate import Federation, Simulation, secrets_of
from consilium.engines.site import Site
from consilium.engines.state import SiteState, StateFolder
from consilium.errors import ConfigError
from consilium.messages import Request, decode_reply, decode_request, encode, envelope_of
from consilium.protocols import Strategy
from consilium.tensors import Tensors, digest, digest_all, equal
from tests import federation, variants
from tests.contracts import odd_members as odd

STRATEGIES = variants.FEDERATED
SITES = federation.hospitals(14, 9, 20, 11)
HALF = {**federation.TABLE["train"], "rounds": 4, "participation": 0.5, "moments": "keep"}
ODD: Mapping[str, Strategy] = {
    "controls": odd.Scaffold(),
    "stacks": odd.Flora(),
    "routed": odd.routed_dual_adapter(),
}


def _settings(name: str = "fedavg", codec: str = "int8", **tables: Any) -> Any:
    train = {**HALF, **tables.pop("train", {})}
    if name in ODD:
        return federation.configure(train={**train, **federation.SGD, "rounds": 4}, wire={"codec": codec}, **tables)
    return variants.settings(name, train=train, wire={"codec": codec}, **tables)


def _run(folder: Path, name: str, **how: Any) -> federation.Outcome:
    settings = how.pop("settings", None) or _settings(name)
    return federation.run(folder, settings, SITES, strategy=ODD.get(name), **how)


def _states(outcome: federation.Outcome) -> Mapping[str, Tensors]:
    """What each site's state holds of what was sent to it, by the round the coordinator goes on from."""
    agreement = outcome.experiment.handshake.agreement
    folders = {site: StateFolder(outcome.folder / "sites" / site, agreement) for site in SITES}
    rounds = outcome.progress.builds_on
    return {site: folders[site].load(number).received for site, number in sorted(rounds.items())}


@pytest.mark.parametrize("name", [*STRATEGIES, *ODD])
def test_a_site_holds_what_the_coordinator_believes(tmp_path: Path, name: str) -> None:
    outcome = _run(tmp_path, name)
    common = {name: digest(value) for name, value in outcome.experiment.common.items()}
    states = _states(outcome)
    assert states.keys() == SITES.keys() or name == "local" or len(states) > 2
    for site, received in states.items():
        believed = {**common, **outcome.progress.receipts[site]}
        assert {name: digest(value) for name, value in received.items()} == believed
    for site in SITES if name in ("fedavg", "fedex", "flexlora", "flora", "fedper") else ():  # serve what is shared
        assert equal(outcome.served(site), {**outcome.served(site), **outcome.shared})


def _by_hand(wire: Tensors, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a message leads to, in plain arithmetic."""
    found = {name: value for name, value in wire.items() if ":" not in name}
    for name in {name.split(":")[0] for name in wire.keys() - found.keys()}:
        whole, scale = wire[f"{name}:int8"], wire[f"{name}:scale"]
        per_row = whole.ndim < 2 or len(whole) <= whole[0].numel()
        found[name] = held[name] + whole.float() * (scale[:, None] if per_row and whole.ndim > 1 else scale)
    return found


@pytest.mark.parametrize("name", ["fedavg", "rolora"])
def test_the_run_can_be_followed_from_its_messages_alone(tmp_path: Path, name: str) -> None:
    outcome = _run(tmp_path, name)
    coded = whole = 0
    held: dict[str, dict[str, Tensor]] = {site: dict(outcome.experiment.common) for site in SITES}
    for way, site, data in outcome.wire:
        tensors = _open(outcome, way, data)
        coded += sum(name.endswith(":int8") for name in tensors)
        whole += sum(":" not in name for name in tensors)
        if way == "down":
            held[site] |= _by_hand(tensors, held[site])
    assert coded > whole > 0, "both forms were needed"
    for site in SITES:
        assert equal(held[site], {**held[site], **outcome.shared})
        assert equal(outcome.served(site), {**outcome.served(site), **outcome.shared})


@pytest.mark.parametrize("name", ["fedavg", "rolora", "fedsa"])
def test_what_a_site_could_not_say_is_said_in_its_next_reply(tmp_path: Path, name: str) -> None:
    """arrived + residual = trained + residual before, at every site, over every round that it is drawn in."""
    states: dict[str, list[SiteState]] = {site: [] for site in SITES}
    agreement = federation.assemble(_settings(name)).handshake.agreement

    def look(way: str, site: str, _: bytes) -> None:
        folder = StateFolder(tmp_path / "sites" / site, agreement)
        if way == "up" and folder.rounds()[-1] not in [state.round for state in states[site]]:
            states[site].append(folder.load(folder.rounds()[-1]))

    outcome, waited = _run(tmp_path, name, watch=look), 0
    for _, site, data in [message for message in outcome.wire if message[0] == "up"]:
        number, wire = envelope_of(data)["round"], _open(outcome, "up", data)
        at = [state.round for state in states[site]].index(number) if wire else 0
        before = states[site][at - 1].residual if at else {}
        arrived = _by_hand(wire, states[site][at].received)
        for tensor, value in arrived.items():
            left = [each[tensor].double() if tensor in each else 0 for each in (states[site][at].residual, before)]
            trained = states[site][at].sent[tensor].double()
            torch.testing.assert_close(value.double() + left[0], trained + left[1], rtol=0, atol=1e-8)
            waited += tensor in before and bool(before[tensor].any())
    assert waited


def _open(outcome: federation.Outcome, way: str, data: bytes) -> Tensors:
    number = envelope_of(data)["round"]
    decode: Any = decode_request if way == "down" else decode_reply
    found: Tensors = decode(data, outcome.experiment.wire("down" if way == "down" else "up", number)).tensors
    return found


@pytest.mark.parametrize(
    ("name", "serve", "codec"),
    [*((name, "half", "int8") for name in STRATEGIES), ("fedavg", "best", "int8"), ("flora", "last", "bfloat16")],
)
def test_predicted_bytes_are_the_measured_ones(tmp_path: Path, name: str, serve: str, codec: str) -> None:
    how = {"train": {"participation": 0.5}} if serve == "half" else {"train": {"participation": 1.0, "rounds": 3}}
    settings = _settings(name, codec, evaluation={"serve": "last" if serve == "half" else serve}, **how)
    outcome = federation.run(tmp_path, settings, SITES)
    measured = outcome.progress.ledger.summary()
    predicted = predicted_bytes(outcome.experiment, SITES)
    for way in ("up", "down"):
        found, told = measured[way]["per_site"], predicted[way]["per_site"]
        bound = {site: max(told[site], count) for site, count in found.items()}
        assert told == (bound if outcome.experiment.strategy.declares.prunes else found)


@pytest.mark.parametrize("name", ["fedamp", "routed"])
def test_bytes_of_what_a_strategy_mixes_for_each_site_are_predicted_too(tmp_path: Path, name: str) -> None:
    outcome = _run(tmp_path, name)
    measured = outcome.progress.ledger.summary()
    predicted = predicted_bytes(outcome.experiment, SITES)
    assert {way: predicted[way] for way in ("up", "down")} == {way: measured[way] for way in ("up", "down")}


@pytest.mark.parametrize(("codec", "ratio"), [("bfloat16", 1.99), ("int8", 3.8)])
def test_a_steady_round_weighs_a_half_or_a_quarter_both_ways(tmp_path: Path, codec: str, ratio: float) -> None:
    """Of a narrow backbone: a scale for every 64 numbers."""
    lines = []
    for at, each in enumerate(("float32", codec)):
        settings = _settings(codec=each, train={"participation": 1.0})
        outcome = federation.run(tmp_path / str(at), settings, SITES)
        lines.append([event["bytes"] for event in outcome.events if event["event"] == "round"])
    for plain, short in zip(lines[0][1:], lines[1][1:], strict=True):
        for way in ("up", "down"):
            assert sum(plain[way].values()) / sum(short[way].values()) >= ratio


# ------------------------------------------------------------------------------------------------ what goes wrong
class _Stop(BaseException):
    pass


@pytest.mark.parametrize(("name", "at"), [("fedavg", 3), ("fedavg", 6), ("fedavg", 7), ("flexlora", 5), ("fedala", 6)])
def test_a_killed_run_goes_on_bit_by_bit(tmp_path: Path, name: str, at: int) -> None:
    whole, calls = _run(tmp_path / "whole", name), []

    def die(way: str, site: str, data: bytes) -> None:  # noqa: ARG001
        calls.append(way)
        if len(calls) == 2 * at:
            raise _Stop

    with pytest.raises(_Stop):
        _run(tmp_path / "killed", name, watch=die)
    resumed = _run(tmp_path / "killed", name)
    assert equal(resumed.shared, whole.shared)
    assert resumed.progress.ledger.payload == whole.progress.ledger.payload
    assert all(equal(resumed.served(site), whole.served(site)) for site in SITES)
    assert equal(resumed.progress.broadcast.residual, whole.progress.broadcast.residual)
    for site in whole.progress.builds_on:
        states = [StateFolder(o.folder / "sites" / site, o.experiment.handshake.agreement) for o in (resumed, whole)]
        one, other = (each.load(whole.progress.builds_on[site]) for each in states)
        assert equal(one.residual, other.residual)


@pytest.mark.parametrize("name", ["fedavg", "flexlora", "fedsa"])
@pytest.mark.parametrize("before_work", [True, False])
def test_a_reply_that_was_lost_leaves_both_ends_with_the_same_bits(
    tmp_path: Path, name: str, before_work: bool
) -> None:
    """The site has trained and kept a residual, and the coordinator goes on from the state before."""
    lost = {("a", 1), ("b", 2), ("c", 2), ("c", 3)}
    settings = _settings(name, train={"participation": 1.0, "quorum": 0.3})
    outcome = _run(tmp_path, name, settings=settings, wrap=lambda inner: federation.Lossy(inner, lost, before_work))
    common = {name: digest(value) for name, value in outcome.experiment.common.items()}
    for site, received in _states(outcome).items():
        believed = {**common, **outcome.progress.receipts[site]}
        assert {name: digest(value) for name, value in received.items()} == believed
    for site in SITES:
        assert equal(outcome.served(site), {**outcome.served(site), **outcome.shared})


def test_two_ends_with_other_codecs_do_not_agree(tmp_path: Path) -> None:
    pieces = {codec: federation.assemble(_settings(codec=codec)) for codec in ("float32", "int8", "bfloat16")}
    quiet = federation.assemble(federation.configure(train=HALF, wire={"codec": "int8", "error_feedback": False}))
    assert len({each.handshake.agreement for each in (*pieces.values(), quiet)}) == 4
    site = Site(pieces["int8"], SITES["a"], tmp_path, 5)
    request = Request("round", "a", 1, 0, pieces["float32"].handshake)
    reply = decode_reply(site.handle(encode(request, {})), {})
    assert reply.failure is not None
    assert "do not agree: agreement" in reply.failure.message


def test_a_step_from_what_a_site_does_not_hold_is_refused(tmp_path: Path) -> None:
    pieces = federation.assemble(_settings())
    site, number = Site(pieces, SITES["a"], tmp_path, 5), {"round": 1, "builds_on": 0}
    start = pieces.model.initial(3)
    wire, _ = pieces.codec.reply({"head.weight": start["head.weight"] + 1}, start, {}, pieces.down(1))
    request = Request("round", "a", handshake=pieces.handshake, tensors=wire, **number)  # type: ignore[arg-type]
    reply = decode_reply(site.handle(encode(request, pieces.wire("down", 1))), pieces.wire("up", 1))
    assert reply.failure is not None
    assert reply.failure.code == "refused"
    assert not list(tmp_path.glob("state-*"))


# ------------------------------------------------------------------------------------------------ what stays
@pytest.mark.parametrize("name", ["fedavg", "fedper", "fedala"])
def test_neither_residuals_nor_personal_values_cross_the_wire(tmp_path: Path, name: str) -> None:
    kept: dict[str, Tensor] = {}
    agreement = federation.assemble(_settings(name), ODD.get(name)).handshake.agreement

    def look(way: str, site: str, _: bytes) -> None:
        folder = StateFolder(tmp_path / "sites" / site, agreement)
        for number in folder.rounds() if way == "up" else ():
            state = folder.load(number)
            for part in (state.residual, state.personal.tensors, state.moments):
                kept.update({f"{site} {number} {n}": value for n, value in part.items() if value.numel() > 3})

    outcome = _run(tmp_path, name, watch=look)
    assert any(value.dtype == torch.float32 and value.any() for value in kept.values())
    federation.assert_absent({n: value for n, value in kept.items() if not n.endswith(".step")}, outcome.wire)


def test_a_guest_gets_whole_values_and_keeps_nothing(tmp_path: Path) -> None:
    settings = _settings()
    outcome = federation.run(tmp_path / "run", settings, SITES)
    pieces, guests = outcome.experiment, federation.hospitals(5, 5, 5, 5, 8)
    visitors = {"e": guests["e"]}
    wire: list[Any] = []
    here = Federation(settings, federation.CLASSES, visitors, tmp_path / "held", secrets_of(3, visitors))
    with Simulation({"held": here}, 1, lambda *each: wire.append(each)) as simulation:
        simulation.answering.experiments["held"] = pieces
        coordinator = Coordinator(pieces, simulation.transport("held"), tmp_path / "run", lambda _: None)
        coordinator.visit(outcome.progress)
    (request,) = [_open(outcome, "down", data) for way, _, data in wire if way == "down"]
    assert request.keys() == outcome.shared.keys()
    assert equal(request, outcome.shared)
    assert not list((tmp_path / "held").rglob("state-*"))


def test_a_frozen_factor_goes_down_once_and_in_full(tmp_path: Path) -> None:
    settings = _settings(tuner=[{"name": "lora", "rank": 4, "freeze_a": True}], train={"participation": 1.0})
    outcome = federation.run(tmp_path, settings, SITES)
    factors = [
        (site, name)
        for way, site, data in outcome.wire
        for name in _open(outcome, way, data)
        if ".lora.shared.a" in name
    ]
    assert len(factors) == len(set(factors)) == 4 * 6
    assert not [name for _, name in factors if ":" in name]


def test_each_tensor_has_a_version_of_its_own(tmp_path: Path) -> None:
    """A block that nobody trained for rounds comes as one step to whoever holds the version before."""
    settings = _settings(tuner=[{"name": "stochastic_block", "draw": "cycle"}], train={"rounds": 8})
    outcome = federation.run(tmp_path, settings, SITES)
    assert predicted_bytes(outcome.experiment, SITES)["down"] == outcome.progress.ledger.summary()["down"]
    for site in SITES:
        assert equal(outcome.served(site), {**outcome.served(site), **outcome.shared})
    tensors = [name for way, _, data in outcome.wire if way == "down" for name in _open(outcome, way, data)]
    assert [name for name in tensors if name.endswith(":int8")]
    assert [name for name in tensors if ":" not in name]


def test_a_codec_without_work_is_said_and_feedback_without_a_codec_refused() -> None:
    class Nothing:
        warnings: tuple[str, ...] = ()
        sites: tuple[str, ...] = ()

    found = [results.warnings(federation.assemble(_settings(name)), Nothing()) for name in ("local", "fedavg")]  # type: ignore[arg-type]
    assert ["changes nothing" in " ".join(each) for each in found] == [True, False]
    with pytest.raises(ConfigError, match="error_feedback has an effect"):
        federation.configure(wire={"error_feedback": False})


def test_the_rows_of_the_wire_say_how_a_tensor_travels() -> None:
    pieces = federation.assemble(_settings())
    rows = {row["name"]: row for row in results.wire(pieces.up(1), pieces.codec)}
    assert rows["head.weight"] == {**rows["head.weight"], "dtype": "int8", "bytes": 3 * 64 + 3 * 4, "shape": [3, 64]}
    plain = federation.assemble(_settings(codec="float32"))
    assert results.wire(plain.up(1), plain.codec) == results.wire(plain.up(1))


def test_feedback_brings_the_run_closer_to_the_one_without_a_codec(tmp_path: Path) -> None:
    """Many short rounds with tiny steps: what is rounded away every time adds up."""
    train = {**federation.SGD, "rounds": 8, "participation": 1.0, "local_steps": 1, "learning_rate": 1e-3}
    plain = federation.run(tmp_path / "plain", _settings(codec="float32", train=train), SITES).shared
    off = []
    for feedback in (True, False):
        settings = _settings(train=train)
        wire = settings.wire.model_copy(update={"error_feedback": feedback})
        found = federation.run(tmp_path / str(feedback), settings.model_copy(update={"wire": wire}), SITES).shared
        off.append(sum(float((found[name] - value).double().square().sum()) for name, value in plain.items()))
    assert off[0] < 0.5 * off[1]


def test_float32_is_as_if_there_were_no_codec(tmp_path: Path) -> None:
    plain = _settings(codec="float32")
    assert plain.wire == federation.configure().wire
    pieces = federation.assemble(plain)
    assert pieces.wire("up", 1) == pieces.up(1)
    assert pieces.wire("down", 1) == pieces.down(1)
    outcome = federation.run(tmp_path, plain, SITES)
    assert outcome.progress.broadcast.news == outcome.progress.broadcast.residual == {}
    assert digest_all(outcome.shared) != digest_all(pieces.model.initial(3))
