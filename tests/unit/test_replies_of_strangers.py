"""Replies that a hospital with a registered key made up: it is refused by its name, and nothing else happens."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from consilium.deployment import board, files, office
from consilium.engines import flower
from consilium.errors import ConfigError, WireError
from consilium.messages import check_numbers, decode_reply, envelope_of, open_message, plain
from consilium.protocols import Failure
from tests.flower_double import LocalGrid, Node
from tests.hospitals_apart import FEDERATION, Apart, made

_nested = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)  # noqa: E731
ROUND = {"loss": 1.0, "num_steps": 2, "image_passes": 9, "seconds": 0.5, "val": {"incoming": {}, "outgoing": {}}}
FINISH = {"image_passes": 0, "seconds": 0.0, "models": ["personal"], "metrics": {"val": {}, "test": {}}}
VALUE = {"value": 0.5, "low": None, "high": None, "n": 9}


def _tested(value: object, split: str = "test", metric: str = "accuracy") -> dict[str, Any]:
    return {"metrics": {"val": {}, "test": {}, split: {"personal": {metric: value}}}}


def test_what_an_honest_site_says_passes() -> None:
    check_numbers("round", ROUND, 0)
    check_numbers("round", {**ROUND, "loss": math.nan, "learned": {}}, 0)
    check_numbers("finish", {**FINISH, **_tested(VALUE)}, 0)
    check_numbers("finish", {**FINISH, **_tested({**VALUE, "value": None, "n": 0})}, 0)


@pytest.mark.parametrize(
    "lie",
    [
        {"event": "start"},  # the coordinator's own events are told in these words
        {"site": "alpine"},
        {"status": "refused"},
        {"seconds": 1e308},  # two of them are infinity, which is no JSON
        {"seconds": 10**400},  # and no float64
        {"image_passes": 10**400},
        {"num_steps": 2**53 + 1},
        {"loss": 1e308},
        {"val": {"incoming": {"accuracy": 10**400}}},
        {"val": {"incoming": {"accuracy": 1e308}}},
        {"val": {"incoming": {}, "outgoing": {"x": "text"}}},
        {"val": {"incoming": {"\x1b[2J": 0.5}}},
        {"val": {"incoming": {"x" * 1000: 0.5}}},
        {"val": {"incoming": {}, "more": {}}},
        {"val": {"incoming": {f"m{number}": 0.5 for number in range(1001)}}},
    ],
    ids=lambda lie: str(lie)[:60],
)
def test_numbers_of_a_round_that_are_none_of_ours(lie: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="missing or of another kind"):
        check_numbers("round", {**ROUND, **lie}, 0)


@pytest.mark.parametrize(
    "lie",
    [
        {"metrics": ["x"]},
        {"metrics": {"val": {}}},
        {"metrics": {"val": [], "test": {"personal": []}}},
        _tested("x"),
        _tested({**VALUE, "value": 1e308}),
        _tested({**VALUE, "n": 10**30}),
        _tested({**VALUE, "n": -1}),
        _tested({**VALUE, "note": "anything"}),
        _tested({"value": 0.5}),
        _tested(VALUE, metric="a\nb"),
        _tested(VALUE, split="train"),
        {"models": "personal"},
        {"models": [3]},
        {"loss": 1.0},
    ],
    ids=str,
)
def test_numbers_of_the_end_that_are_none_of_ours(lie: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="missing or of another kind"):
        check_numbers("finish", {**FINISH, **lie}, 0)


def test_words_of_a_stranger_are_one_plain_line() -> None:
    said = "fine\nalpine done\r\x1b[2J\x00 \u202etxt \ud800"
    assert plain(said) == "fine alpine done [2J txt"
    assert len(plain("x" * 5000)) == 1000
    assert plain("naïve Bayes, für alle: 3 % < 4") == "naïve Bayes, für alle: 3 % < 4"


@pytest.mark.parametrize("failure", [0, 0.0, "", [], {}, False, True, "text", ["site"], {"site": "a"}], ids=str)
def test_a_failure_is_whole_or_there_is_none(failure: object) -> None:
    with pytest.raises(WireError, match="other fields than expected"):
        decode_reply(_message({"site": "a", "round": 1, "num_examples": 1, "numbers": {}, "failure": failure}), {})


def _message(fields: object, rest: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    body = struct.pack("<Q", len(text)) + text + rest
    return hashlib.sha256(body).digest() + body


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), _nested, max_leaves=4)
)
def test_whatever_stands_in_a_field_is_read_or_refused(value: object) -> None:
    whole = {"site": "a", "round": 1, "num_examples": 1, "numbers": {}, "failure": None}
    for key in whole:
        with suppress(WireError):
            reply = decode_reply(_message({**whole, key: value}), {})
            assert reply.failure is None or isinstance(reply.failure, Failure)
            for kind, numbers in (("round", ROUND), ("finish", FINISH)):
                for name in numbers:
                    with suppress(WireError):
                        check_numbers(kind, {**numbers, name: value}, 0)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ a whole run of it
Lie = Callable[[dict[str, Any], bytes], tuple[bytes, bytes]]
LAST: dict[str, Any] = {
    "site": "harbour",
    "code": "refused",
    "message": "sorry\n  alpine  done\x1b[2J \ud800 " + "x" * 9999,
}


def _said(**numbers: Any) -> Lie:
    return lambda fields, rest: (_text({**fields, "numbers": {**fields["numbers"], **numbers}}), rest)


def _text(fields: object) -> bytes:
    return json.dumps(fields).encode()


LIES: dict[tuple[str, int], tuple[Lie, str]] = {
    ("round", 1): (lambda *_: (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), "is not JSON"),
    ("round", 2): (_said(event="start", site="alpine"), "missing or of another kind"),
    ("round", 3): (lambda fields, _: (_text(fields), b""), "harbour leaves tensors out"),
    ("round", 4): (lambda fields, rest: (_text({**fields, "num_examples": 10**400}), rest), "holds what it must not"),
    ("round", 5): (
        lambda fields, _: (_text({**fields, "failure": {**LAST, "code": "ok"}}), b""),
        "sorry alpine done [2J x",
    ),
    ("round", 6): (lambda fields, _: (_text({**fields, "failure": LAST}), b""), "sorry alpine done [2J"),
    ("round", 7): (lambda fields, rest: (_text({**fields, "site": "\ud800\n"}), rest), "an answer of for round 7"),
    ("finish", 7): (_said(metrics=["x"]), "missing or of another kind"),
}


def _hostile(apart: Apart) -> None:
    """From now on the node of harbour sends, in place of what its service says, what it likes."""
    honest = apart._handler

    def handler(site: str) -> Callable[[RecordDict], RecordDict]:
        answers = honest(site)

        def handle(content: RecordDict) -> RecordDict:
            asked, reply = envelope_of(flower.unpack(content)), answers(content)
            lie = LIES.get((asked["kind"], asked["round"])) if site == "harbour" else None
            if lie is None:
                return reply
            opened = open_message(flower.unpack(reply))
            text, rest = lie[0](opened.fields, bytes(opened.payload))
            body = struct.pack("<Q", len(text)) + text + rest
            return flower.pack(hashlib.sha256(body).digest() + body)

        return handle

    apart._handler = handler  # type: ignore[method-assign]


def test_a_run_outlasts_whatever_one_hospital_makes_up(tmp_path: Path) -> None:
    apart = made(tmp_path, FEDERATION.replace("rounds = 3", "rounds = 7"))
    _hostile(apart)
    apart.conduct()
    table = json.loads((apart.at(files.COORDINATOR) / board.STATUS).read_text())
    assert (table["state"], table["closed"]) == ("finished", 7)
    assert sorted(table["sites"]) == ["alpine", "harbour", "prairie"]
    said = {("finish", 7): table["sites"]["harbour"]["message"]}
    for line in (apart.run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        assert event["sites"]["alpine"]["status"] == event["sites"]["prairie"]["status"] == "ok"
        assert event["sites"]["harbour"]["status"] in ("refused", "stale", "error")
        said["round", event["round"]] = event["sites"]["harbour"]["message"]
    assert said.keys() == LIES.keys()
    for asked, (_, why) in LIES.items():
        assert why in said[asked], asked
        assert len(said[asked]) <= 1000
        assert plain(said[asked]) == said[asked]
    result = json.loads((apart.run / "result.json").read_text())
    assert result["untested"] == ["harbour"]
    assert (apart.run / "report.html").is_file()


# ------------------------------------------------------------------------------------------------ beside the bytes
ODD = [RecordDict({"message": ConfigRecord({"x": 1})}), RecordDict({"message": ArrayRecord({})})]


@pytest.mark.parametrize("odd", ODD, ids=["another record", "no bytes"])
def test_a_late_reply_that_is_none_ends_no_run(tmp_path: Path, odd: RecordDict) -> None:
    apart = made(tmp_path)
    grid = apart.grid(harbour={"takes": 70})  # one look per second: after deadline and grace of its first round
    next(node for node in grid.nodes.values() if node.takes).handler = lambda _: odd
    next(node for node in grid.nodes.values() if not node.takes).takes = 40  # else the rounds were over too soon
    apart.conduct(grid)
    assert json.loads((apart.at(files.COORDINATOR) / board.STATUS).read_text())["state"] == "finished"


@pytest.mark.parametrize("key", [b"", b"ssh-rsa AAAA", b"-----BEGIN PUBLIC KEY-----"])
def test_a_node_whose_key_is_none_is_no_site(tmp_path: Path, key: bytes) -> None:
    apart = made(tmp_path)
    grid = apart.grid()
    apart.conduct(LocalGrid({key: Node(lambda content: content), **grid.nodes}))
    assert json.loads((apart.at(files.COORDINATOR) / board.STATUS).read_text())["state"] == "finished"


def test_two_sites_with_one_key_are_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    apart = made(tmp_path)
    nodes = apart.at(files.COORDINATOR) / files.NODES
    (nodes / "harbour.pub").write_bytes((nodes / "alpine.pub").read_bytes())
    with pytest.raises(ConfigError, match=r"two sites have the same node key(.|\n)*alpine, harbour"):
        office.submit(apart.at(files.COORDINATOR))
