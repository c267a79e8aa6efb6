"""What a coordinator holds after a closed round: nothing of the messages that came and went, and no free block."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Message

from consilium import exchange
from consilium.deployment import conduct
from consilium.deployment.board import Board
from consilium.engines import flower
from consilium.protocols import Failure
from tests.flower_double import LocalGrid
from tests.hospitals_apart import FEDERATION, Apart, made


@dataclass
class Seen:
    """What went through a coordinator; its bytes are held here, and should be held nowhere else."""

    living: list[weakref.ref[Any]] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=lambda: [bytes(bytearray(b"held by this list alone"))])
    found: list[tuple[list[str], set[int]]] = field(default_factory=list)  # after each round: what lives, references

    def note(self, *things: Any) -> None:
        self.living += map(weakref.ref, things)

    def message(self, message: Message) -> Message:
        record = message.content["message"]
        self.note(message, message.content, record, record["bytes"])
        return message

    def look(self) -> None:
        alive = [type(thing).__name__ for each in self.living if (thing := each()) is not None]
        self.found.append((alive, {sys.getrefcount(each) for each in self.replies}))


@dataclass
class Watched(LocalGrid):
    """The double, which takes note of all messages."""

    seen: Seen = field(default_factory=Seen)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return super().push_messages(map(self.seen.message, messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.seen.message(each) for each in super().pull_messages(message_ids)]


def watched(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A grid over the hospitals; decoded tensors and prepared requests are noted too, and looked for after a round."""
    grid = Watched(apart.grid().nodes)
    decode, news, asked, show = exchange.decode_reply, exchange._News, flower.Transport.round, Board.show

    def decoded(*arguments: Any) -> Any:
        reply = decode(*arguments)
        grid.seen.note(reply, *reply.tensors.values())
        return reply

    def prepared(each: exchange.Exchange) -> Any:
        found = news(each)
        grid.seen.note(found)
        return found

    def answered(self: flower.Transport, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for site, data in asked(self, requests):
            assert isinstance(data, bytes)
            grid.seen.replies.append(data)
            yield site, data

    def shown(self: Board, event: Mapping[str, object]) -> None:
        show(self, event)
        if event["event"] == "round":
            apart.seen.clear()  # the hospitals of the test remember what they said
            grid.seen.look()

    monkeypatch.setattr(exchange, "decode_reply", decoded)
    monkeypatch.setattr(exchange, "_News", prepared)
    monkeypatch.setattr(flower.Transport, "round", answered)
    monkeypatch.setattr(Board, "show", shown)
    return grid


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, whose moment nobody knows: what is over must be free at once."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "flora"])
def test_nothing_of_a_closed_round_is_held(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = 'optimizer = "sgd"\nmomentum = 0\nweight_decay = 0\nclip_norm = 0\n[evaluation]'
    text = FEDERATION.replace('"fedavg"', f'"{strategy}"')
    apart = made(tmp_path, text.replace("[evaluation]", sgd) if strategy == "scaffold" else text)
    grid = watched(apart, monkeypatch)
    apart.conduct(grid)
    assert len(grid.seen.replies) == 1 + 3 * (3 + 1)  # three rounds and the end
    assert len(grid.seen.living) > 8 * 3 * (3 + 1)
    for alive, references in grid.seen.found:
        assert alive == []
        assert len(references) == 1  # every reply is held as often as the bytes that only this list holds
    assert len(grid.seen.found) == 3


class Heap(ctypes.Structure):
    """What glibc's `mallinfo` says; `hblks`: blocks that are mappings of their own, and not pieces of the heap."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_int)]


def test_a_large_block_is_no_piece_of_the_heap() -> None:
    conduct.hold_no_free_memory()
    if conduct._TUNE is None:  # another C library, which may do as it likes
        return
    say = ctypes.CDLL(None).mallinfo
    say.restype = Heap
    for _ in range(2):  # those that are freed first would make those after them pieces
        before = say().hblks
        blocks = [bytes(1 << 24) for _ in range(8)]
        assert say().hblks > before + 4  # the heap may have room for some, from the tests before
        del blocks
        assert say().hblks <= before
