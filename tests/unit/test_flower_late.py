"""Replies to rounds that were closed: which are still awaited, until when, and that their sites are asked again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Message, RecordDict

from consilium.engines import flower
from consilium.protocols import Failure
from tests.flower_double import NODE_UNAVAILABLE, LocalGrid, echoing, key, transport


def test_a_late_reply_is_told_and_never_counted() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 40})
    wire = transport(grid, told, deadline=30.0, grace=0.0)
    first = dict(wire.round({"a": b"old", "b": b"old"}))
    assert isinstance(first["b"], Failure)
    grid.nodes[key("b")].takes = 12
    assert dict(wire.round({"a": b"new", "b": b"new"})) == {"a": b"newa", "b": b"newb"}
    assert [each for each in told if each["event"] != "link"] == [
        {"event": "late", "site": "b", "bytes": 4, "policy": "dropped"}
    ]


def test_a_site_that_is_behind_is_not_asked_for_one_round_after_the_other() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 90})
    wire = transport(grid, told, deadline=30.0, grace=0.0)
    for number in (b"1", b"2"):
        found = dict(wire.round({"a": number, "b": number}))
        assert isinstance(found["b"], Failure)
        assert found["b"].code == "late"
    assert isinstance(found["b"], Failure)
    assert found["b"].message == "it is still at work on an earlier request"
    grid.nodes[key("b")].takes = 0
    assert dict(wire.round({"a": b"3", "b": b"3"})) == {"a": b"3a", "b": b"3b"}
    assert grid.nodes[key("b")].handled == 2


def overdue(grid: LocalGrid, told: list[Mapping[str, Any]]) -> flower.Transport:
    """After a round of 30 seconds that was closed while b was at work."""
    wire = transport(grid, told, deadline=30.0, grace=0.0)
    (late,) = (each for _, each in wire.round({"a": b"1", "b": b"1"}) if isinstance(each, Failure))
    assert late == Failure("b", "late", "no reply within 30 s and 0 s of grace")
    return wire


def given_up(told: list[Mapping[str, Any]]) -> list[object]:
    return [each["message"] for each in told if each.get("policy") == "given up"]


ANSWERED = {"a": b"2a", "b": b"2b"}


def test_a_late_request_is_given_up_when_its_node_was_seen_gone() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 10_000})
    wire, node = overdue(grid, told), grid.nodes[key("b")]
    node.online, node.takes = False, 0
    assert isinstance(dict(wire.round({"a": b"2", "b": b"2"}))["b"], Failure)
    assert given_up(told) == [f"its node went away (Flower's code {NODE_UNAVAILABLE})"]
    node.restart()
    node.online = True
    assert dict(wire.round({"a": b"2", "b": b"2"})) == ANSWERED
    assert wire.clock() < 70


def test_a_late_request_is_given_up_when_its_node_came_back_between_two_looks() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 10_000})
    wire, node = overdue(grid, told), grid.nodes[key("b")]
    node.restart()
    node.takes = 0
    assert dict(wire.round({"a": b"2", "b": b"2"})) == ANSWERED
    assert given_up(told) == ["its node went away"]


def test_a_request_of_an_open_round_is_put_again_when_its_node_came_back_between_two_looks() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 10_000})
    wire, node, look = transport(grid, told), grid.nodes[key("b")], grid.get_nodes

    def restarting() -> Any:
        if grid.looks == 3:
            node.restart()
            node.takes = 0
        return look()

    grid.get_nodes = restarting  # type: ignore[method-assign]
    assert dict(wire.round({"a": b"2", "b": b"2"})) == ANSWERED
    assert [each["status"] for each in told if each["site"] == "b"] == ["asked", "lost", "back"]


def test_a_late_request_is_given_up_when_its_reply_is_an_error() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 40, "dies": 1})
    wire = overdue(grid, told)
    grid.nodes[key("b")].takes = 0
    assert dict(wire.round({"a": b"2", "b": b"2"})) == ANSWERED
    assert given_up(told) == [f"its node went away (Flower's code {NODE_UNAVAILABLE})"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (RecordDict({"code": ConfigRecord({"code": "unreachable"})}), flower._CODES["unreachable"]),
        (RecordDict({**flower.pack(b"1"), "more": ConfigRecord({})}), "this is no message of Consilium"),
    ],
)
def test_a_late_request_is_given_up_when_its_reply_is_none_of_ours(content: RecordDict, why: str) -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 40})
    node = grid.nodes[key("b")]
    handler, node.handler = node.handler, lambda _: content
    wire = overdue(grid, told)
    node.handler, node.takes = handler, 0
    assert dict(wire.round({"a": b"2", "b": b"2"})) == ANSWERED
    assert given_up(told) == [why]


def test_a_late_request_whose_reply_is_lost_is_given_up_after_one_further_round() -> None:
    """Flower hands a reply over once: in a call that fails afterwards it is gone, and nobody says so."""
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 40})
    wire, pull = overdue(grid, told), grid.pull_messages

    def failing(names: Iterable[str]) -> Iterable[Message]:
        found = [*pull(names)]
        if any(message.metadata.reply_to_message_id == "message-1" for message in found):
            raise RuntimeError("the connection broke")
        return found

    grid.pull_messages = failing  # type: ignore[method-assign,assignment]
    second = dict(wire.round({"a": b"2", "b": b"2"}))
    assert second["b"] == Failure("b", "late", "it is still at work on an earlier request")
    grid.nodes[key("b")].takes = 25  # most of a round: it is asked when one opens, not when one is about to close
    assert dict(wire.round({"a": b"2", "b": b"2"})) == ANSWERED
    assert given_up(told) == ["no reply within one further deadline and grace"]


def test_no_closed_rounds_queue_up_at_a_node_that_is_slower_by_far() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 20 * 100})
    wire, node, queues = transport(grid, told, deadline=100.0, grace=0.0), grid.nodes[key("b")], []
    for number in range(45):
        found = dict(wire.round({"a": b"%d" % number, "b": b"%d" % number}))
        assert isinstance(found["b"], Failure)
        alive = [each for each in node.waiting if not grid._is_over(each.metadata.message_id)]
        queues.append(len(alive))
    assert max(queues) == 1
    assert node.handled == 3
    node.takes, node.work = 0, None
    for _ in range(2):
        last = dict(wire.round({"a": b"2", "b": b"2"}))
    assert last == ANSWERED


# ------------------------------------------------------------------------------------------------ expected ones
def policies(told: list[Mapping[str, Any]]) -> list[object]:
    return [(each["site"], each["policy"]) for each in told if each["event"] == "late"]


def test_an_expected_late_reply_stands_for_that_to_the_next_question() -> None:
    """The site is not asked that one, and the round ends when the others have replied."""
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 40})
    wire = overdue(grid, told)
    wire.expect(["b"])
    assert dict(wire.round({"a": b"2", "b": b"2"})) == {"a": b"2a", "b": b"1b"}
    assert policies(told) == [("b", "next_round")]
    assert grid.nodes[key("b")].handled == 1
    assert wire.clock() < 45
    grid.nodes[key("b")].takes = 0
    assert dict(wire.round({"a": b"2", "b": b"2"})) == ANSWERED


def test_a_late_reply_is_expected_for_one_question_and_of_a_site_that_is_asked() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={"takes": 5}, b={"takes": 33})
    wire = overdue(grid, told)
    wire.expect(["b"])
    assert dict(wire.round({"a": b"2"})) == {"a": b"2a"}
    assert policies(told) == [("b", "dropped")]
    wire = overdue(echoing(a={"takes": 5}, b={"takes": 40}), told)
    wire.expect(["b"])
    assert dict(wire.round({"a": b"2"})) == {"a": b"2a"}
    wire.grid.nodes[key("b")].takes = 0  # type: ignore[attr-defined]
    assert dict(wire.round({"a": b"2", "b": b"2"})) == ANSWERED
    assert policies(told) == [("b", "dropped")] * 2


def test_where_an_expected_reply_is_lost_the_site_is_asked_afresh_and_counts_once() -> None:
    told: list[Mapping[str, Any]] = []
    grid = echoing(a={}, b={"takes": 40})
    wire, node = overdue(grid, told), grid.nodes[key("b")]
    wire.expect(["b"])
    node.restart()
    node.takes = 0
    assert list(wire.round({"a": b"2", "b": b"2"})) == list(ANSWERED.items())
    assert policies(told) == [("b", "given up")]
