"""Nothing private on the wire: all traffic is recorded and searched by value, not by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from consilium import registry, results
from consilium.config import Config
from consilium.coordinator import Coordinator
from consilium.data import SiteData
from consilium.engines import failures
from consilium.engines.site import Site
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError, DataError, StateError, TrainingError, WireError
from consilium.exchange import Transport
from consilium.experiment import Experiment
from consilium.messages import (
    Handshake,
    Reply,
    Request,
    RequestKind,
    check_numbers,
    decode_reply,
    encode,
    envelope_of,
    size,
)
from consilium.protocols import Declaration, Learned, LocalTraining, Part, Personal, Specs, Strategy
from consilium.strategies.fedavg import FedAvg
from consilium.strategies.partial import below
from consilium.tensors import Tensors
from tests import federation, variants

STRATEGIES = variants.FEDERATED
SITES = federation.hospitals(10, 7)
SHORT = {**federation.TABLE["train"], "rounds": 2, "moments": "keep"}


def _traffic(folder: Path, settings: Config, strategy: Strategy) -> tuple[federation.Outcome, list[Tensors]]:
    """A run, and all that its sites kept to themselves at any time: personal tensors and optimiser moments."""
    kept: list[Tensors] = []
    agreement = federation.assemble(settings, strategy).handshake.agreement

    def look(way: str, site: str, _: bytes) -> None:
        states = StateFolder(folder / "sites" / site, agreement)
        for path in states.folder.glob("state-*") if way == "up" else ():
            state = states.load(int(path.stem.split("-")[1]))
            kept.extend([state.personal.tensors, state.moments])

    return federation.run(folder, settings, SITES, strategy=strategy, watch=look), kept


def _private(outcome: federation.Outcome, kept: list[Tensors]) -> Mapping[str, torch.Tensor]:
    """Under names of their own: what a site kept and never declared, and a row of pixels of every image. A copy of what
    it declared, "<of which kind>/<name>", is no secret: its last model, the sum of what it sent."""
    sent = results.both_ways(outcome.experiment)[0].keys()
    own = [{n: v for n, v in each.items() if not {n, n.partition("/")[2]} & sent} for each in kept]
    found = {f"{number} {name}": value for number, each in enumerate(own) for name, value in each.items()}
    found = {name: value for name, value in found.items() if value.numel() > 1}
    pixels = {
        f"pixels {site}": torch.from_numpy(data.train.images[:, 0].copy()).flatten(1) for site, data in SITES.items()
    }
    assert outcome.wire
    return {**found, **pixels}


HEADS = [
    (n, share)
    for n in STRATEGIES
    for share in ("shared", "personal")
    if n not in variants.ONE_SHOT or share != "personal"
]


@pytest.mark.parametrize(("name", "share"), HEADS)
def test_no_personal_value_crosses_the_wire(tmp_path: Path, name: str, share: str) -> None:
    table = {"share": share} if share == "personal" else {}
    settings = variants.settings(name, train=SHORT, head=table)
    outcome, kept = _traffic(tmp_path, settings, registry.build("strategies", name, settings.strategy.options()))
    federation.assert_absent(_private(outcome, kept), outcome.wire)
    if name in ("local", "fedper") or share == "personal":
        assert any("head.weight" in tensors for tensors in kept), "there was something to hide"


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "local"])
def test_the_search_would_find_what_does_travel(tmp_path: Path, name: str) -> None:
    """Without this the search could be blind."""
    settings = variants.settings(name, train=SHORT)
    outcome, _ = _traffic(tmp_path, settings, registry.build("strategies", name, settings.strategy.options()))
    with pytest.raises(AssertionError, match="crossed the wire"):
        federation.assert_absent(outcome.shared or outcome.sent("up")[-1][2], outcome.wire)


# ------------------------------------------------------------------------------------------------ planted leaks
@dataclass(frozen=True)
class Planted:
    """FedPer that also sends something it should not."""

    inner: FedAvg = field(default_factory=lambda: FedAvg(shares=below(None)))
    kind: str = "rows"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def up(self, specs: Specs, round: int) -> Specs:
        declared = dict(self.inner.up(specs, round))
        if self.kind == "declared" or (self.kind == "declared late" and round == 2):
            declared["head.weight"] = specs["head.weight"]
        if self.kind == "retagged":
            spec = specs["head.weight"]
            declared["head.weight"] = replace(spec, tag=replace(spec.tag, part="shared"))
        return declared

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        learned = self.inner.learn(received, personal, training)
        update, head = dict(learned.update), learned.personal.tensors["head.weight"]
        if self.kind == "rows":
            name = "blocks.0.attn.qkv.lora.shared.a"
            update[name] = torch.cat([head[1:], update[name][2:]])
        elif self.kind != "none":
            update["head.weight"] = head
        return replace(learned, update=update)


@pytest.mark.parametrize(("kind", "found"), [("none", False), ("rows", True)])
def test_a_planted_leak_under_a_shared_name_is_found(tmp_path: Path, kind: str, found: bool) -> None:
    """All names, shapes and tags of this update are in order; only its values are not."""
    settings = federation.configure(train=SHORT)
    outcome, kept = _traffic(tmp_path, settings, Planted(kind=kind))
    private = _private(outcome, kept)
    if found:
        with pytest.raises(AssertionError, match=r"head\.weight"):
            federation.assert_absent(private, outcome.wire)
    else:
        federation.assert_absent(private, outcome.wire)


@pytest.mark.parametrize("kind", ["declared", "declared late", "retagged"])
def test_declaring_a_personal_tensor_is_refused_before_anything_runs(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"would send personal tensors(.|\n)*head.weight"):
        federation.assemble(federation.configure(head={"share": "personal"}, train=SHORT), Planted(kind=kind))


def test_a_personal_part_of_another_name_is_refused_too() -> None:
    @dataclass(frozen=True)
    class SharesAll(Planted):
        declares: Declaration = Declaration((Part("mine", personal=True),))  # noqa: RUF009

        def up(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
            return specs

    with pytest.raises(ConfigError, match=r"would send personal tensors(.|\n)*lora\.mine\.a"):
        federation.assemble(federation.configure(), SharesAll())
    safe = FedAvg(declares=Declaration((Part("mine", personal=True),)))
    assert set(federation.assemble(federation.configure(), safe).up(1)) == {"head.bias", "head.weight"}


# ------------------------------------------------------------------------------------------------ both ends refuse
def _pieces(member: Strategy | None = None, **tables: Any) -> Experiment:
    return federation.assemble(federation.configure(**{"train": SHORT, **tables}), member)


def _site(folder: Path, pieces: Experiment, data: SiteData = SITES["a"]) -> Site:
    return Site(pieces, data, folder, 5)


def _request(pieces: Experiment, kind: RequestKind = "round", **changes: Any) -> bytes:
    shared = {name: pieces.model.initial(3)[name] for name in pieces.down(1)}
    return encode(replace(Request(kind, "a", 1, 0, pieces.handshake, shared), **changes), pieces.down(1))


def test_the_sender_refuses_what_was_not_declared(tmp_path: Path) -> None:
    pieces = _pieces(Planted(kind="undeclared"))
    reply = decode_reply(_site(tmp_path, pieces).handle(_request(pieces)), {})
    assert reply.failure is not None
    assert reply.failure.code == "refused"
    assert "'head.weight' is not declared to travel" in failures.unseal(tmp_path, reply.failure.message)
    assert not reply.tensors


@pytest.mark.parametrize(("error", "code"), [(OSError, "error"), (DataError, "refused"), (TrainingError, "non_finite")])
def test_the_text_of_a_failure_stays_at_the_site(tmp_path: Path, error: type[Exception], code: str) -> None:
    @dataclass(frozen=True)
    class Failing(Planted):
        def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:  # noqa: ARG002
            raise error("/wards/7/patient-4711.png is broken")

    pieces = _pieces(Failing())
    data = _site(tmp_path, pieces).handle(_request(pieces))
    failure = decode_reply(data, {}).failure
    assert failure is not None
    assert failure.code == code
    assert b"patient" not in data
    assert "/wards/7/patient-4711.png" in failures.unseal(tmp_path, failure.message)
    assert failures.unseal(tmp_path / "elsewhere", failure.message) == failure.message


def test_a_simulation_tells_the_text_that_stayed(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Failing(Planted):
        def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:  # noqa: ARG002
            raise OSError("the scanner burns")

    with pytest.raises(TrainingError, match="a: error, OSError: the scanner burns"):
        federation.run(tmp_path, federation.configure(train=SHORT), SITES, strategy=Failing())


WEIGHTED = {"class_weight": "inverse", "class_counts": "federation"}


@pytest.mark.parametrize(
    ("task", "kind", "counts"),
    [
        ({}, "describe", True),
        ({}, "round", [5, 5, 4]),
        ({}, "round", []),
        (WEIGHTED, "round", None),
        (WEIGHTED, "round", [5, 5]),
        (WEIGHTED, "round", [5, 5, -4]),
        (WEIGHTED, "round", "554"),
        (WEIGHTED, "evaluate", [5, 5, 4]),
    ],
)
def test_class_counts_that_were_not_agreed_on_are_refused(
    tmp_path: Path, task: Mapping[str, Any], kind: RequestKind, counts: Any
) -> None:
    pieces = _pieces(task=task)
    site = _site(tmp_path, pieces, _Untouchable())  # type: ignore[arg-type]
    reply = decode_reply(site.handle(_request(pieces, kind, context={"class_counts": counts})), {})
    assert reply.failure is not None
    assert (reply.failure.code, "class counts" in reply.failure.message) == ("refused", True)


@pytest.mark.parametrize("task", [{}, WEIGHTED])
def test_a_site_tells_its_class_counts_only_where_the_task_wants_them(tmp_path: Path, task: Mapping[str, Any]) -> None:
    pieces = _pieces(task=task)
    reply = decode_reply(_site(tmp_path, pieces).handle(_request(pieces, "describe")), {})
    assert reply.numbers == ({"class_counts": [4, 3, 3]} if task else {})


class _Answers:
    """A wire on which every site gives the same answer."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def sites(self) -> tuple[str, ...]:
        return ("a",)

    def round(self, requests: Mapping[str, bytes]) -> Any:
        yield from ((site, self.answer) for site in requests)


def _coordinator(folder: Path, answer: bytes) -> Coordinator:
    return Coordinator(_pieces(FedAvg(shares=below(None))), _Answers(answer), folder, lambda _: None)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("a", 1, 9, {"head.weight": torch.ones(3, 64)}), "refused, sender and receiver declare other tensors"),
        (Reply("a", 1, 9, {"blocks.0.attn.qkv.lora.shared.a": torch.ones(3, 64)}), "refused, .* other tensors"),
        (Reply("b", 1, 9), "stale, asked a for round 1, got an answer of b"),
        (Reply("a", 7, 9), "stale, .* for round 7"),
        (b"not a message at all", "refused, these bytes are no whole message"),
        (b"", "refused, these bytes are no whole message"),
    ],
    ids=["undeclared", "other form", "other site", "other round", "garbage", "nothing"],
)
def test_the_receiver_refuses_too(tmp_path: Path, reply: Reply | bytes, reason: str) -> None:
    specs = _pieces().model.specs
    loose = {name: replace(spec, shape=(None,) * len(spec.shape)) for name, spec in specs.items()}
    data = reply if isinstance(reply, bytes) else encode(reply, loose)
    with pytest.raises(TrainingError, match=f"a: {reason}"):
        _coordinator(tmp_path, data).run()
    assert not list(tmp_path.glob("checkpoints/*"))


VAL: Any = {"incoming": {"loss": 1.0}}
NUMBERS = {"loss": 0.5, "num_steps": 2, "image_passes": 7, "seconds": 0.1, "val": VAL}


@dataclass
class _Rubbish:
    """A wire on which site b's reply in round 2 has other fields."""

    inner: Transport
    changed: Mapping[str, Any]
    number: int = 0

    def sites(self) -> tuple[str, ...]:
        return self.inner.sites()

    def round(self, requests: Mapping[str, bytes]) -> Any:
        self.number += 1
        for site, data in self.inner.round(requests):
            assert isinstance(data, bytes)
            yield site, self._spoilt(data) if (site, self.number) == ("b", 2) else data

    def _spoilt(self, data: bytes) -> bytes:
        length = int.from_bytes(data[32:40], "little")
        text = json.dumps({**envelope_of(data), **self.changed}).encode()
        return _rehashed(bytes(32) + len(text).to_bytes(8, "little") + text + data[40 + length :])


RUBBISH: dict[str, Any] = {
    "text for a count": {"num_examples": "many"},
    "negative": {"num_examples": -7},
    "truth for a count": {"num_examples": True},
    "half an image": {"num_examples": 7.5},
    "another count than before": {"num_examples": 10**9},
    "no numbers": {"numbers": {}},
    "numbers in a list": {"numbers": [1]},
    "text for passes": {"numbers": {**NUMBERS, "image_passes": "all"}},
    "no validation": {"numbers": {**NUMBERS, "val": {}}},
    "text for a metric": {"numbers": {**NUMBERS, "val": {"incoming": {"loss": "low"}}}},
    "metrics in a list": {"numbers": {**NUMBERS, "val": {"incoming": [1.0]}}},
    "infinite seconds": {"numbers": {**NUMBERS, "seconds": math.inf}},
    "a number that nobody declared": {"numbers": {**NUMBERS, "learned": {"secret": 1.0}}},
    "a number for a message": {"failure": {"site": "b", "code": 5, "message": None}},
    "text for a round": {"round": 2, "site": ["b"]},
}


@pytest.mark.parametrize("changed", RUBBISH.values(), ids=RUBBISH)
def test_one_rubbish_reply_does_not_end_a_run_whose_quorum_is_reached(
    tmp_path: Path, changed: Mapping[str, Any]
) -> None:
    settings = federation.configure(train={**SHORT, "quorum": 0.5})
    outcome = federation.run(tmp_path, settings, SITES, wrap=lambda inner: _Rubbish(inner, changed))
    told = [event["sites"] for event in outcome.events if event["event"] == "round"]
    assert [sites["b"]["status"] for sites in told] == ["ok", "refused"]
    assert [sites["a"]["status"] for sites in told] == ["ok", "ok"]
    assert outcome.progress.passes == {"a": 20, "b": 7}


@pytest.mark.parametrize("counts", [None, "554", [5, 5], [5, 5, -4], [5, 5, 4.5]])
def test_class_counts_that_are_none_are_refused(counts: Any) -> None:
    with pytest.raises(WireError, match="class_counts"):
        check_numbers("describe", {} if counts is None else {"class_counts": counts}, 3)
    with pytest.raises(WireError, match="class_counts"):
        check_numbers("describe", {"class_counts": [5, 5, 4]}, 0)
    check_numbers("describe", {"class_counts": [5, 5, 4]}, 3)


class _Telling(FedAvg):
    """Declares a number, and says `said` at every site."""

    said: ClassVar[Mapping[str, float]] = {"overlap": 0.25}

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        return replace(super().learn(received, personal, training), numbers=self.said)


def test_a_strategys_own_numbers_are_declared_finite_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = _Telling(declares=Declaration(numbers={"overlap": "of two subspaces"}))
    settings = federation.configure(train=SHORT)
    outcome = federation.run(tmp_path / "run", settings, SITES, strategy=strategy)
    told = [event["sites"][site]["learned"] for event in outcome.events if event["event"] == "round" for site in SITES]
    assert told == [{"overlap": 0.25}] * len(told)
    assert told
    rows = {row["name"]: row["what"] for row in results.numbers(outcome.experiment)}
    assert rows["learned.overlap"] == "of two subspaces"
    for at, wrong in enumerate(({"overlap": math.nan}, {"other": 1.0}, {"overlap": "much"})):
        monkeypatch.setattr(_Telling, "said", wrong)
        with pytest.raises(TrainingError, match="refused"):
            federation.run(tmp_path / str(at), settings, SITES, strategy=strategy)


def test_numbers_that_are_not_finite_stop_the_run_with_the_sites_name(tmp_path: Path) -> None:
    name = "blocks.0.attn.qkv.lora.shared.a"
    reply = encode(Reply("a", 1, 9, {name: torch.ones(4, 64)}), _pieces(FedAvg(shares=below(None))).up(1))
    broken = bytearray(reply)
    one = torch.ones(64).numpy().tobytes()
    broken[broken.index(one) : broken.index(one) + 4] = torch.tensor([float("nan")]).numpy().tobytes()
    with pytest.raises(TrainingError, match="no whole message"):
        _coordinator(tmp_path, bytes(broken)).run()
    with pytest.raises(TrainingError, match=rf"non-finite numbers from site a in round 1(.|\n)*{name}"):
        _coordinator(tmp_path, _rehashed(bytes(broken))).run()


def _rehashed(data: bytes) -> bytes:
    return hashlib.sha256(data[32:]).digest() + data[32:]


def test_a_site_refuses_a_request_with_what_was_not_declared(tmp_path: Path) -> None:
    pieces = _pieces(FedAvg(shares=below(None)))
    leaking = Request("round", "a", 1, 0, pieces.handshake, {"head.weight": torch.ones(3, 64)})
    reply = decode_reply(_site(tmp_path, pieces).handle(encode(leaking, pieces.model.specs)), {})
    assert reply.failure is not None
    assert "receiving at site a, round 1" in reply.failure.message


# ------------------------------------------------------------------------------------------------ handshake
class _Untouchable:
    """Data that nobody may look at."""

    name = "a"

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the site's data were touched: {name}")


@pytest.mark.parametrize("kind", ["describe", "round", "evaluate", "finish"])
@pytest.mark.parametrize(
    "changed", [{"version": "0.0.1"}, {"agreement": "f" * 64}, {"backbone": "e" * 64}], ids=lambda c: next(iter(c))
)
def test_who_does_not_agree_is_refused_by_name_before_data_are_touched(
    tmp_path: Path, kind: RequestKind, changed: dict[str, str]
) -> None:
    pieces = _pieces()
    theirs = replace(pieces.handshake, **changed)
    site = _site(tmp_path, pieces, _Untouchable())  # type: ignore[arg-type]
    reply = decode_reply(site.handle(_request(pieces, kind, handshake=theirs)), {})
    key, value = next(iter(changed.items()))
    assert reply.failure is not None
    assert reply.failure.code == "refused"
    for part in (f"do not agree: {key}", value, getattr(pieces.handshake, key)):
        assert part in reply.failure.message
    assert not list(tmp_path.iterdir())


def test_a_request_for_another_site_is_refused(tmp_path: Path) -> None:
    pieces = _pieces()
    reply = decode_reply(_site(tmp_path, pieces).handle(_request(pieces, site="b")), {})
    assert reply.failure is not None
    assert "for another site" in reply.failure.message


@pytest.mark.parametrize("cut", [0, 5, 40, 100, -1, -5000])
def test_a_site_answers_garbage_with_a_failure_and_never_crashes(tmp_path: Path, cut: int) -> None:
    pieces = _pieces()
    reply = decode_reply(_site(tmp_path, pieces).handle(_request(pieces)[:cut]), {})
    assert reply.failure is not None
    assert reply.failure.code == "refused"


def test_a_request_that_comes_twice_gets_the_same_update(tmp_path: Path) -> None:
    pieces = _pieces()
    site = _site(tmp_path, pieces)
    first, second = (decode_reply(site.handle(_request(pieces)), pieces.up(1)) for _ in range(2))
    assert federation.bits(first.tensors) == federation.bits(second.tensors)


def test_a_state_that_is_gone_is_named(tmp_path: Path) -> None:
    pieces = _pieces()
    reply = decode_reply(_site(tmp_path, pieces).handle(_request(pieces, builds_on=1)), {})
    assert reply.failure is not None
    text = failures.unseal(tmp_path, reply.failure.message)
    assert "lacks the state" in text
    assert "round 1" in text
    with pytest.raises(StateError):
        StateFolder(tmp_path, pieces.handshake.agreement).load(7)


def _round_after_round(folder: Path, pieces: Experiment, rounds: int) -> tuple[Site, list[bytes]]:
    site = _site(folder, pieces)
    asked = [_request(pieces, round=number, builds_on=number - 1) for number in range(1, rounds + 1)]
    assert all(decode_reply(site.handle(data), pieces.up(1)).failure is None for data in asked)
    return site, asked


def test_an_old_request_destroys_no_newer_state(tmp_path: Path) -> None:
    pieces = _pieces(train={**SHORT, "rounds": 4})
    site, asked = _round_after_round(tmp_path, pieces, 3)
    before = (tmp_path / "state-00003.safetensors").read_bytes()
    for data, code in ((asked[0], "stale"), (asked[2], None)):
        reply = decode_reply(site.handle(data), pieces.up(1))
        assert (reply.failure and reply.failure.code) == code
    assert decode_reply(site.handle(asked[1]), pieces.up(1)).failure is not None, "the state before it is gone"
    assert StateFolder(tmp_path, pieces.handshake.agreement).rounds() == [2, 3]
    assert (tmp_path / "state-00003.safetensors").read_bytes() == before


def test_the_last_round_but_one_may_be_repeated(tmp_path: Path) -> None:
    pieces = _pieces()
    site, asked = _round_after_round(tmp_path, pieces, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert decode_reply(site.handle(asked[0]), pieces.up(1)).failure is None
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_agreement_covers_what_all_must_share() -> None:
    same = _pieces().handshake
    assert same == _pieces().handshake
    assert isinstance(same, Handshake)
    for table in ({"strategy": {"name": "fedper"}}, {"seed": 9}, {"tuner": [{"name": "lora", "rank": 2}]}):
        assert _pieces(**table).handshake.agreement != same.agreement
    assert _pieces(backbone={"image_size": 48}).handshake.agreement != same.agreement


# ------------------------------------------------------------------------------------------------ the ledger
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_ledger_is_the_length_of_what_was_recorded(tmp_path: Path, name: str) -> None:
    settings = variants.settings(name, evaluation={"serve": "best"})
    outcome = federation.run(tmp_path, settings, SITES)
    for way in ("up", "down"):
        for site in SITES:
            recorded = [data for w, s, data in outcome.wire if (w, s) == (way, site)]
            assert outcome.progress.ledger.payload[way][site] == sum(size(data).payload for data in recorded)
    total = sum(len(data) for _, _, data in outcome.wire)
    summary = outcome.progress.ledger.summary()
    assert total == sum(summary[way]["total"] + summary["control"][way] for way in ("up", "down"))
