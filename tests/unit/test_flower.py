"""Flower as the wire: the same bits as in one process, and every way in which a node can stay away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from consilium.engines import flower, relay
from consilium.errors import TrainingError
from consilium.exchange import Transport
from consilium.protocols import Failure
from tests import federation
from tests.flower_double import NODE_UNAVAILABLE, LocalGrid, Node, echoing, key, transport

SITES = {"a": 8, "b": 12, "c": 6}


@dataclass
class OverFlower:
    """Sites of a simulation behind nodes of their own."""

    inner: Transport
    wire: flower.Transport | None = None

    def sites(self) -> tuple[str, ...]:
        return self.inner.sites()

    def _over(self) -> flower.Transport:
        if self.wire is None:
            nodes = {key(site): Node(self._handler(site)) for site in self.sites()}
            self.wire = transport(LocalGrid(nodes), [])
        return self.wire

    def _handler(self, site: str) -> Any:
        def handle(content: RecordDict) -> RecordDict:
            ((_, reply),) = self.inner.round({site: flower.unpack(content)})
            assert isinstance(reply, bytes)
            return flower.pack(reply)

        return handle

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        yield from self._over().round(requests)


PARITY = {
    "fedavg": {},
    "fedopal": {"strategy": {"name": "fedopal_weights"}},
    "scaffold": {"strategy": {"name": "scaffold"}, "train": federation.SGD},
    "flora": {"strategy": {"name": "flora"}},
    "stochastic_block": {"tuner": [{"name": "stochastic_block"}]},
}


@pytest.mark.parametrize("case", PARITY)
def test_flower_and_one_process_give_the_same_bits(case: str, tmp_path: Path) -> None:
    settings = federation.configure(**{"strategy": {"name": "fedavg"}, **PARITY[case]})
    sites = federation.hospitals(*SITES.values())
    here = federation.run(tmp_path / "here", settings, sites)
    there = federation.run(tmp_path / "there", settings, sites, wrap=OverFlower)
    assert here.shared.keys() == there.shared.keys()
    assert all(torch.equal(here.shared[name], there.shared[name]) for name in here.shared)
    assert here.progress.ledger.payload == there.progress.ledger.payload
    for site in SITES:
        mine, theirs = here.served(site), there.served(site)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_every_site_gets_its_own_request() -> None:
    told: list[Mapping[str, Any]] = []
    found = dict(transport(echoing(a={}, b={}, c={}), told).round({"a": b"1", "b": b"2", "c": b"3"}))
    assert found == {"a": b"1a", "b": b"2b", "c": b"3c"}
    assert [(each["site"], each["status"]) for each in told] == [("a", "asked"), ("b", "asked"), ("c", "asked")]


def test_a_key_that_nobody_named_speaks_for_no_site() -> None:
    grid = echoing(a={}, b={})
    grid.nodes[key("stranger")] = grid.nodes.pop(key("a"))
    found = dict(transport(grid, []).round({"a": b"1", "b": b"2"}))
    assert found["b"] == b"2b"
    assert isinstance(found["a"], Failure)
    assert (found["a"].code, grid.pushed[0].metadata.dst_node_id, len(grid.pushed)) == ("absent", 1, 1)


def test_the_round_closes_at_deadline_and_grace() -> None:
    grid = echoing(a={}, b={"takes": 10_000})
    wire = transport(grid, [], deadline=30.0, grace=5.0)
    found = dict(wire.round({"a": b"1", "b": b"2"}))
    assert found["a"] == b"1a"
    assert isinstance(found["b"], Failure)
    assert (found["b"].code, found["b"].message) == ("late", "no reply within 30 s and 5 s of grace")
    assert wire.clock() == pytest.approx(35.0)


def test_nobody_waits_once_all_have_replied() -> None:
    wire = transport(echoing(a={}, b={"takes": 3}), [])
    assert len(dict(wire.round({"a": b"1", "b": b"2"}))) == 2
    assert wire.clock() < 5


def test_who_answers_twice_is_counted_once() -> None:
    class Twice(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = [*super().pull_messages(message_ids)]
            return [*found, *found]

    grid = echoing(a={}, b={"takes": 20})
    wire = transport(Twice(grid.nodes), [], deadline=10.0, grace=0.0)
    assert [site for site, _ in wire.round({"a": b"1", "b": b"1"})] == ["a", "b"]
    assert [site for site, _ in wire.round({"a": b"2", "b": b"2"})] == ["a", "b"]


def test_a_node_that_dies_is_asked_again_when_it_is_back() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"dies": 2})
    wire = transport(grid, told)
    assert dict(wire.round({"a": b"1", "b": b"2"})) == {"a": b"1a", "b": b"2b"}
    assert [each["status"] for each in told if each["site"] == "b"] == ["asked", "lost", "back", "lost", "back"]
    assert wire.clock() >= 2 * flower.AGAIN


def test_a_node_that_stays_away_is_named_with_its_reason() -> None:
    grid = echoing(a={}, b={"online": False}, c={"dies": 1_000})
    found = dict(transport(grid, []).round({"a": b"1", "b": b"2", "c": b"3"}))
    assert found["b"] == Failure("b", "absent", "its node is not connected")
    assert found["c"] == Failure("c", "lost", f"its node went away (Flower's code {NODE_UNAVAILABLE})")
    assert len(grid.pushed) < 12  # it is not asked in every second


def test_a_quorum_that_is_not_reached_stops_with_names_and_can_be_resumed(tmp_path: Path) -> None:
    settings = federation.configure(strategy={"name": "fedavg"}, train={"quorum": 0.7})
    sites = federation.hospitals(*SITES.values())
    away = {"b": False, "c": False}

    @dataclass
    class Leaving(OverFlower):
        def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
            wire = self._over()
            assert isinstance(wire.grid, LocalGrid)
            gone = b'"round": 2' in requests["a"] and any(away.values())
            for site, leaves in away.items():
                wire.grid.nodes[key(site)].online = not (leaves and gone)
            yield from wire.round(requests)

    whole = federation.run(tmp_path / "whole", settings, sites, wrap=Leaving)
    away.update(b=True, c=True)
    with pytest.raises(TrainingError, match="too few sites") as caught:
        federation.run(tmp_path / "stopped", settings, sites, wrap=Leaving)
    assert "b: absent, its node is not connected; c: absent" in str(caught.value)
    away.update(b=False, c=False)
    again = federation.run(tmp_path / "stopped", settings, sites, wrap=Leaving)
    assert all(torch.equal(whole.shared[name], again.shared[name]) for name in whole.shared)


# ------------------------------------------------------------------------------------------------ the hospital's end
def test_the_client_hands_bytes_to_the_service(tmp_path: Path) -> None:
    with relay.Listener(tmp_path / "s" / "relay", lambda data: data[::-1]) as listener:
        reply = flower.answered(flower.pack(b"abc"), {flower.SOCKET: str(listener.path)})
    assert flower.unpack(reply) == b"cba"


def test_of_a_fault_at_the_hospital_only_a_code_leaves(tmp_path: Path) -> None:
    missing = tmp_path / "patient_JOHN_DOE" / "relay"
    for content, node, code in [
        (flower.pack(b"abc"), {flower.SOCKET: str(missing)}, "unreachable"),
        (flower.pack(b"abc"), {}, "error"),
        (RecordDict({"other": ConfigRecord({"text": "patient_JOHN_DOE"})}), {flower.SOCKET: str(missing)}, "error"),
    ]:
        reply = flower.answered(content, node)
        assert dict(reply.config_records) == {"code": ConfigRecord({"code": code})}
        assert list(reply) == ["code"]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"message": ConfigRecord({"bytes": b"1"})}),
        RecordDict({"message": ArrayRecord({})}),
        RecordDict({**flower.pack(b"1"), "more": ConfigRecord({})}),
    ],
)
def test_other_records_of_flower_are_refused_by_name(content: RecordDict) -> None:
    grid = echoing(a={})
    grid.nodes[key("a")].handler = lambda _: content
    ((site, answer),) = transport(grid, []).round({"a": b"1"})
    assert answer == Failure(site, "refused", "this is no message of Consilium")


def test_a_key_has_one_fingerprint_in_every_form() -> None:
    ssh = load_pem_public_key(key("a")).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert flower.fingerprint(key("a")) == flower.fingerprint(ssh) == flower.fingerprint(ssh + b" me@here\n")
    assert flower.fingerprint(key("a")) != flower.fingerprint(key("b"))


@pytest.mark.parametrize("doing", ["push_messages", "pull_messages", "get_nodes"])
def test_a_fault_of_flowers_ends_no_run(doing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under load: "database is locked"."""
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={})
    wire, works, count = transport(grid, told), getattr(grid, doing), [0]

    def stumbling(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] <= 2:
            raise RuntimeError("database is locked")
        return works(*arguments)

    monkeypatch.setattr(grid, doing, stumbling)
    assert dict(wire.round({"a": b"1", "b": b"2"})) == {"a": b"1a", "b": b"2b"}
    assert sum("database is locked" in str(event.get("message")) for event in told) == 2


def test_a_flower_that_stays_broken_leaves_a_round_without_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = echoing(a={})

    def broken(*_: Any) -> Any:
        raise RuntimeError("database is locked")

    monkeypatch.setattr(grid, "push_messages", broken)
    ((site, answer),) = transport(grid, []).round({"a": b"1"})
    assert isinstance(answer, Failure)
    assert (site, answer.code) == ("a", "lost")
