"""A reply that was cut in the midst of its sending: Flower waits for the rest of it, and nobody else does."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Message

from consilium.engines import flower
from consilium.protocols import Failure
from tests.flower_double import LocalGrid
from tests.unit.test_flower import echoing, key, transport

UNAVAILABLE = 4  # Flower's code, or near it, of a reply of which a part never came


@dataclass
class Half(LocalGrid):
    """Of the first reply of b half is there; the call that meets it comes back when the test says so."""

    met: bool = False
    calls: int = 0  # for the reply that is half there
    rest: threading.Event = field(default_factory=threading.Event)
    back: threading.Event = field(default_factory=threading.Event)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = [*message_ids]
        self.calls += any(self.to[each] is self.nodes[key("b")] for each in ids)
        found = [*super().pull_messages(ids)]
        half = [each for each in found if self.to[each.metadata.reply_to_message_id] is self.nodes[key("b")]]
        if half and not self.met:
            self.met = True
            assert self.rest.wait(60)
            lost = self._error(half[0].metadata.reply_to_message_id, UNAVAILABLE)
            found = [lost if each is half[0] else each for each in found]
            self.back.set()
        return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "MOMENT", 0.05)


def statuses(told: list[Mapping[str, Any]], site: str) -> list[str]:
    return [each["status"] for each in told if each["event"] == "link" and each["site"] == site]


def test_the_others_are_counted_and_the_round_is_closed_in_time() -> None:
    told: list[Mapping[str, Any]] = []
    grid = Half(echoing(a={"takes": 3}, b={}, c={"takes": 20}).nodes)
    wire = transport(grid, told, deadline=40.0, grace=5.0)
    found = dict(wire.round(dict.fromkeys("abc", b"1")))
    assert (found["a"], found["c"]) == (b"1a", b"1c")
    assert isinstance(found["b"], Failure)
    assert found["b"].code == "late"
    assert grid.calls == 1, "one that is on its way is not asked for again"
    assert wire.clock() == pytest.approx(45.0, abs=1.0)
    grid.rest.set()
    assert grid.back.wait(60)


def test_when_flower_gives_the_reply_up_the_site_is_asked_again() -> None:
    told: list[Mapping[str, Any]] = []
    grid = Half(echoing(a={}, b={}).nodes)
    wire = transport(grid, told)
    replies: Iterator[tuple[str, bytes | Failure]] = wire.round({"a": b"1", "b": b"1"})
    found = []
    for site, reply in replies:
        found.append((site, reply))
        grid.rest.set()
    assert sorted(found) == [("a", b"1a"), ("b", b"1b")]
    assert statuses(told, "b") == ["asked", "lost", "back"]


def test_a_pull_that_ends_after_the_round_is_of_a_late_reply() -> None:
    told: list[Mapping[str, Any]] = []
    grid = Half(echoing(a={}, b={}).nodes)
    wire = transport(grid, told, deadline=10.0, grace=0.0)
    assert isinstance(dict(wire.round({"a": b"1", "b": b"1"}))["b"], Failure)
    grid.rest.set()
    assert grid.back.wait(60)
    for pull in wire.pulls:
        pull.join(60)
    assert dict(wire.round({"a": b"2", "b": b"2"}))["b"] == b"2b"
    late = [each for each in told if each["event"] == "late"]
    assert [(each["site"], each["policy"]) for each in late] == [("b", "given up")]
    assert not wire.pulls
