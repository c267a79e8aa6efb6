"""One question to many sites: what is alive at a time, what is shared, in which order replies are handed on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import payload
from consilium.coordinator import Coordinator
from consilium.errors import ConfigError, TrainingError
from consilium.exchange import LARGEST_ENVELOPE, Exchange, Partners, Updates
from consilium.messages import Reply, Request, decode_reply, decode_request, encode, pack
from consilium.protocols import Failure, ServerState, Specs, Update
from consilium.rounds import Progress
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import digest
from tests import federation

NUMBERS = {"loss": 0.5, "num_steps": 1, "image_passes": 2, "seconds": 0.25, "val": {"incoming": {}, "outgoing": {}}}
PIECES = federation.assemble(federation.configure(train={"quorum": 0.5, "rounds": 2}))
START = PIECES.initial(3)


class _Counted(bytes):
    """Bytes that know how many of them are alive, and how many ever were at a time."""

    alive = most = 0

    def __new__(cls, data: bytes) -> _Counted:
        _Counted.alive += 1
        _Counted.most = max(_Counted.most, _Counted.alive)
        return super().__new__(cls, data)

    def __del__(self) -> None:
        _Counted.alive -= 1


@pytest.fixture(autouse=True)
def messages_alive(monkeypatch: pytest.MonkeyPatch) -> type[_Counted]:
    """Counts the requests and replies that are alive."""
    monkeypatch.setattr("consilium.exchange.encode", lambda *arguments: _Counted(encode(*arguments)))
    _Counted.alive = _Counted.most = 0
    return _Counted


@dataclass
class Fake:
    """Sites that answer at once with what they were sent, moved by their own number."""

    count: int
    failing: frozenset[str] = frozenset()
    turn: Callable[[Sequence[str]], Iterable[str]] = lambda names: names

    def sites(self) -> tuple[str, ...]:
        return tuple(f"s{number:05d}" for number in range(self.count))

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for site in self.turn(sorted(requests)):
            if site in self.failing:
                yield site, Failure(site, "lost", "the wire broke")
                continue
            asked = decode_request(requests[site], PIECES.down(1))
            yield site, _Counted(self._reply(site, asked.round, asked.kind))

    def _reply(self, site: str, number: int, kind: str) -> bytes:
        by = torch.tensor(float(site[1:]) + 1) / self.count
        tensors = {n: START[n] + by for n in PIECES.up(number)} if kind == "round" else {}
        numbers = NUMBERS if kind == "round" else {"image_passes": 2, "seconds": 0.25}
        return encode(Reply(site, number, int(site[1:]) % 7 + 1, tensors, numbers), PIECES.up(number))


def _exchange(fake: Fake, folder: Path = Path(), sites: Sequence[str] | None = None) -> Exchange:
    partners = Partners(PIECES, fake, folder, lambda _: None, lambda failure: failure.message)
    progress = Progress(PIECES.strategy.init_server(START, PIECES.model.specs, fake.sites()))
    return Exchange(partners, progress, "round", 1, fake.sites() if sites is None else sites)


# ------------------------------------------------------------------------------------------------ who lies
@dataclass
class Liar(Fake):
    """The first site sends other bytes."""

    change: Callable[[bytes], bytes] = lambda data: data

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for site, reply in super().round(requests):
            assert isinstance(reply, bytes)
            yield site, self.change(reply) if site == "s00000" else reply


def _with_nan(data: bytes) -> bytes:
    reply = decode_reply(data, PIECES.up(1))
    broken = {name: torch.full_like(value, float("nan")) for name, value in reply.tensors.items()}
    packed = b"".join(payload.chunks(broken, PIECES.up(1)))
    return encode(replace(reply, tensors=broken), PIECES.up(1), packed)


def test_a_reply_that_is_too_large_is_refused_by_name() -> None:
    exchange = _exchange(Liar(3, change=lambda data: data + bytes(LARGEST_ENVELOPE)))
    assert len(list(exchange)) == 2
    (failure,) = exchange.failures
    assert (failure.site, failure.code) == ("s00000", "refused")
    assert "the reply of s00000 is too large" in failure.message
    assert sorted(exchange.replied) == ["s00001", "s00002"]


def test_a_hospital_whose_numbers_are_not_finite_ends_a_simulation_and_no_federation() -> None:
    exchange = _exchange(Liar(8, change=_with_nan))
    with pytest.raises(TrainingError, match="non-finite numbers from site s00000"):
        list(exchange)
    exchange = _exchange(Liar(8, change=_with_nan))
    exchange.partners = replace(exchange.partners, remote=True)
    assert len(list(exchange)) == 7
    assert [(each.site, each.code) for each in exchange.failures] == [("s00000", "non_finite")]


# ------------------------------------------------------------------------------------------------ what is alive
def test_requests_and_replies_are_never_all_alive(messages_alive: type[_Counted]) -> None:
    tensors: list[weakref.ref[Tensor]] = []
    most = 0
    for reply in _exchange(Fake(40)):
        tensors.append(weakref.ref(reply.tensors["head.weight"]))
        most = max(most, sum(ref() is not None for ref in tensors))
    assert len(tensors) == 40
    assert messages_alive.most <= 3
    assert most <= 2


def test_what_all_lack_is_hashed_and_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, hashed, packed = _exchange(Fake(9)), [], []

    def counted_digest(tensor: Tensor) -> str:
        hashed.append(tensor)
        return digest(tensor)

    def counted_pack(message: Any, allowed: Specs) -> bytes:
        packed.extend([message] if isinstance(message, Request) else [])
        return pack(message, allowed)

    assert exchange.partners.common("a")
    monkeypatch.setattr("consilium.exchange.digest", counted_digest)
    monkeypatch.setattr("consilium.messages.pack", counted_pack)
    assert len(list(exchange)) == 9
    assert (len(hashed), len(packed)) == (len(exchange.progress.server.shared), 1)
    first = exchange.versions["s00000"]
    assert all(versions is first for versions in exchange.versions.values())


def test_a_request_that_is_looked_up_twice_is_the_same_and_counted_once() -> None:
    def twice(inner: Fake) -> Any:
        @dataclass
        class Twice:
            def sites(self) -> tuple[str, ...]:
                return inner.sites()

            def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
                assert len(requests) == 4
                assert "s00001" in requests
                assert "s00009" not in requests
                with pytest.raises(KeyError):
                    requests["s00009"]
                assert dict(requests) == dict(requests)
                yield from inner.round(requests)

        return Twice()

    plain, looked = _exchange(Fake(4)), _exchange(twice(Fake(4)))
    assert [reply.site for reply in plain] == [reply.site for reply in looked]
    assert plain.progress.ledger == looked.progress.ledger


# ------------------------------------------------------------------------------------------------ order and failures
@pytest.mark.parametrize("turn", [reversed, lambda names: [*names[3:], *names[:3]]])
def test_replies_are_handed_on_by_site_however_they_come(turn: Any) -> None:
    exchange = _exchange(Fake(8, failing=frozenset({"s00002", "s00007"}), turn=turn))
    assert [reply.site for reply in exchange] == [*exchange.replied] == [f"s{n:05d}" for n in (0, 1, 3, 4, 5, 6)]
    assert [failure.site for failure in exchange.failures] == ["s00002", "s00007"]


def test_an_answer_that_nobody_waits_for_counts_for_nothing() -> None:
    fake = Fake(3, turn=lambda names: [*names, names[0], names[2]])
    assert [reply.site for reply in _exchange(fake)] == ["s00000", "s00001", "s00002"]


def test_a_site_that_never_answers_is_missing() -> None:
    fake = Fake(6, turn=lambda names: names[:2])
    with pytest.raises(TrainingError, match="2 of 6"):
        list(_exchange(fake))
    fake = Fake(6, turn=lambda names: names[1:])
    assert [reply.site for reply in _exchange(fake)] == [f"s{n:05d}" for n in range(1, 6)]


def test_too_few_replies_raise_out_of_combine_and_change_nothing(tmp_path: Path) -> None:
    fake = Fake(6, failing=frozenset({"s00000", "s00003", "s00004", "s00005"}))
    coordinator = Coordinator(PIECES, fake, tmp_path, lambda _: None)
    with pytest.raises(TrainingError, match=r"2 of 6(.|\n)*s00003: lost"):
        coordinator.run()
    assert (tmp_path / "events.jsonl").read_bytes() == b""
    assert not (tmp_path / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------ combine
def _stream(updates: Sequence[Update]) -> Updates:
    return Updates(iter(updates))


def test_a_stream_gives_the_bits_of_a_list() -> None:
    replies = list(_exchange(Fake(23)))
    updates = [Update(reply.site, reply.tensors, reply.num_examples) for reply in replies]
    server, specs = _exchange(Fake(23)).progress.server, PIECES.model.specs
    for strategy in (FedAvg(), FedAvg("uniform")):
        whole, streamed = strategy.combine(server, updates, specs), strategy.combine(server, _stream(updates), specs)
        assert federation.bits(whole.shared) == federation.bits(streamed.shared)


def test_updates_can_be_read_once() -> None:
    updates = _stream([Update("a", {}, 1)])
    assert len(list(updates)) == 1
    with pytest.raises(ConfigError, match="needs_individual_updates"):
        list(updates)
    with pytest.raises(TypeError):
        len(updates)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Greedy(FedAvg):
    """A member that reads its updates twice, or not at all."""

    times: int = 2

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:  # noqa: ARG002
        assert all(len(list(updates)) == 6 for _ in range(self.times))
        return server


@pytest.mark.parametrize("individual", [False, True])
def test_a_strategy_that_reads_twice_must_say_so(tmp_path: Path, individual: bool) -> None:
    strategy = Greedy(declares=replace(FedAvg().declares, needs_individual_updates=individual))
    coordinator = Coordinator(replace(PIECES, strategy=strategy), Fake(6), tmp_path, lambda _: None)
    if individual:
        assert coordinator.run().server.round == 2
    else:
        with pytest.raises(ConfigError, match="a second time"):
            coordinator.run()


def test_a_strategy_that_reads_nothing_still_hears_of_a_failed_round(tmp_path: Path) -> None:
    pieces = replace(PIECES, strategy=Greedy(times=0))
    done = Coordinator(pieces, Fake(6), tmp_path / "whole", lambda _: None).run()
    assert done.passes == dict.fromkeys(Fake(6).sites(), 4)
    lost = Fake(6, failing=frozenset(Fake(6).sites()[:4]))
    with pytest.raises(TrainingError, match="too few"):
        Coordinator(pieces, lost, tmp_path / "lost", lambda _: None).run()


# ------------------------------------------------------------------------------------------------ many sites
def test_two_thousand_sites(tmp_path: Path, messages_alive: type[_Counted]) -> None:
    progress = Coordinator(PIECES, Fake(2000), tmp_path, lambda _: None).run()
    assert progress.server.round == 2
    assert messages_alive.most <= 3
    assert len({id(versions) for versions in progress.receipts.values()}) == 1
    weights = torch.tensor([number % 7 + 1 for number in range(2000)], dtype=torch.float64)
    by = (weights * (torch.arange(2000, dtype=torch.float64) + 1) / 2000).sum() / weights.sum()
    for name, value in progress.server.shared.items():
        torch.testing.assert_close(value.double(), START[name].double() + by, rtol=1e-5, atol=1e-6)
    size = (tmp_path / "checkpoints" / "round-00002.safetensors").stat().st_size
    tensors = sum(value.numel() * 4 for value in progress.server.shared.values())
    assert size - tensors < 2000 * 250, "what all sites hold is written once"
