"""Encoded messages: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium import payload
from consilium.errors import TrainingError, WireError
from consilium.messages import (
    Handshake,
    Reply,
    Request,
    check,
    decode_reply,
    decode_request,
    encode,
    envelope_of,
    open_message,
    rows,
    size,
)
from consilium.protocols import Failure, Spec, Tag
from consilium.tensors import equal

TAG = Tag("head", "head")
SPECS = {"w": Spec((2, 3), TAG), "stack": Spec((None, 2), TAG, torch.float64)}
TENSORS = {"w": torch.arange(6.0).view(2, 3), "stack": torch.ones(5, 2, dtype=torch.float64)}
REQUEST = Request("round", "a", 4, 2, Handshake("agreed", "digest"), TENSORS, {"validate": True, "keep": [1, 2]})
REPLY = Reply("a", 4, 17, TENSORS, {"loss": 0.25, "val": {"incoming": {"accuracy": None}}})


def test_a_request_comes_out_as_it_went_in() -> None:
    found = decode_request(encode(REQUEST, SPECS), SPECS)
    assert equal(found.tensors, TENSORS)
    assert {**vars(found), "tensors": 0} == {**vars(REQUEST), "tensors": 0}


@pytest.mark.parametrize("failure", [None, Failure("a", "lost", "gone")])
def test_a_reply_comes_out_as_it_went_in(failure: Failure | None) -> None:
    reply = Reply("a", 4, 17, TENSORS, REPLY.numbers, failure)
    found = decode_reply(encode(reply, SPECS), SPECS)
    assert equal(found.tensors, TENSORS)
    assert {**vars(found), "tensors": 0} == {**vars(reply), "tensors": 0}


def test_a_message_without_tensors_has_no_payload() -> None:
    data = encode(Reply("a", 1, 0), {})
    assert size(data).payload == 0
    assert decode_reply(data, {}).tensors == {}


def test_the_sizes_add_up_and_the_payload_comes_last() -> None:
    data, held = encode(REPLY, SPECS), b"".join(payload.chunks(TENSORS, SPECS))
    assert size(data).payload == len(held)
    assert size(data).payload + size(data).envelope == len(data)
    assert data.endswith(held)
    assert envelope_of(data)["round"] == 4


def test_a_recorded_message_can_be_listed() -> None:
    stack = {"name": "stack", "shape": [5, 2], "dtype": "float64", "bytes": 80}
    w = {"name": "w", "shape": [2, 3], "dtype": "float32", "bytes": 24}
    reply, request, empty = (open_message(encode(each, SPECS)) for each in (REPLY, REQUEST, Reply("a", 4, 17)))
    assert rows(reply, SPECS) == rows(request, SPECS) == [stack, w]
    assert rows(empty, SPECS) == []
    with pytest.raises(WireError, match=r"declare other tensors(.|\n)*site a, round 4"):
        rows(reply, {"w": SPECS["w"]})


def test_equal_messages_are_equal_bytes_whatever_the_order_of_names() -> None:
    turned = {name: TENSORS[name] for name in reversed(list(TENSORS))}
    assert encode(Reply("a", 4, 17, turned, REPLY.numbers), SPECS) == encode(REPLY, SPECS)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("v", torch.ones(2, 3), "'v' is not declared to travel"),
        ("w", torch.ones(3, 2), "another form"),
        ("w", torch.ones(6), "another form"),
        ("w", torch.ones(2, 3, dtype=torch.float64), "another form"),
        ("stack", torch.ones(4, 3, dtype=torch.float64), "another form"),
        ("stack", torch.ones(4, 2), "another form"),
    ],
)
def test_what_was_not_declared_is_refused_at_both_ends(name: str, tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(WireError, match=f"{reason}(.|\n)*sending, site a, round 1"):
        encode(Reply("a", 1, 1, {name: tensor}), SPECS)
    own = {name: Spec(tuple(tensor.shape), TAG, tensor.dtype)}
    data = encode(Reply("a", 1, 1, {name: tensor}), own)
    with pytest.raises(WireError, match=r"declare other tensors(.|\n)*receiving from site a, round 1"):
        decode_reply(data, SPECS)
    request = encode(Request("round", "a", 1, 0, REQUEST.handshake, {name: tensor}), own)
    with pytest.raises(WireError, match=r"declare other tensors(.|\n)*receiving at site a, round 1"):
        decode_request(request, SPECS)


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_a_free_dimension_takes_any_size(rows: int) -> None:
    check({"stack": torch.ones(rows, 2, dtype=torch.float64)}, SPECS, "here")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_no_wire_error_but_a_training_error(value: float) -> None:
    broken = TENSORS["w"].clone()
    broken[1, 2] = value
    with pytest.raises(TrainingError, match=r"NaN or infinity(.|\n)*w"):
        encode(Reply("a", 1, 1, {"w": broken}), SPECS)


WHOLE = encode(REQUEST, SPECS)


@given(st.integers(0, len(WHOLE) - 1))
def test_a_message_that_was_cut_is_refused(length: int) -> None:
    for read in (size, envelope_of, lambda data: decode_request(data, SPECS), lambda data: decode_reply(data, SPECS)):
        with pytest.raises(WireError):
            read(WHOLE[:length])


@given(st.integers(0, len(WHOLE) * 8 - 1))
def test_one_flipped_bit_anywhere_is_noticed(bit: int) -> None:
    broken = bytearray(WHOLE)
    broken[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        decode_request(bytes(broken), SPECS)


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_reply(data, SPECS)
    with pytest.raises(WireError):
        decode_request(data, SPECS)


def test_a_message_with_more_behind_it_is_refused() -> None:
    with pytest.raises(WireError):
        decode_request(WHOLE + b"x", SPECS)


def test_a_request_is_no_reply_and_a_reply_is_no_request() -> None:
    with pytest.raises(WireError, match="other fields"):
        decode_reply(WHOLE, SPECS)
    with pytest.raises(WireError, match="other fields"):
        decode_request(encode(REPLY, SPECS), SPECS)
