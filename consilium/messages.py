"""Common: what crosses the wire. In: a request or a reply. Out: bytes, and back; both ends check every tensor.

A message is an envelope (JSON: who, which round, what it builds on, digests, numbers) and a payload (safetensors). Only
tensors that the strategy declared for this direction and round can be put in or are accepted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import consilium
from consilium.errors import WireError
from consilium.protocols import Failure, Spec, Specs
from consilium.tensors import Tensors, dumps, loads, non_finite

RequestKind = Literal["describe", "round", "evaluate", "finish"]


@dataclass(frozen=True)
class Handshake:
    """What both ends must share before a site touches its data."""

    agreement: str
    backbone: str
    version: str = consilium.__version__


@dataclass(frozen=True)
class Request:
    """From the coordinator to one site. `builds_on`: round of the site's state that this request continues, or 0."""

    kind: RequestKind
    site: str
    round: int
    builds_on: int
    handshake: Handshake
    tensors: Tensors = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """From one site to the coordinator. `numbers`: losses, counts and metrics, plain JSON."""

    site: str
    round: int
    num_examples: int
    tensors: Tensors = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


@dataclass(frozen=True)
class Size:
    """Bytes of one message: the serialised tensors, and the envelope around them."""

    payload: int
    envelope: int


def check(tensors: Tensors, allowed: Specs, where: str) -> None:
    """WireError unless every tensor is declared, has the declared shape and type, and is finite."""
    for name, tensor in tensors.items():
        if name not in allowed:
            raise WireError(
                f"tensor {name!r} is not declared to travel",
                where=where,
                allowed=f"{len(allowed)} tensors: {', '.join(sorted(allowed)[:4])} ...",
                remedy="the strategy's up() and down() declare what leaves and what arrives",
            )
        _check_form(name, tensor.shape, str(tensor.dtype), allowed[name], where)
    broken = non_finite(tensors)
    if broken:
        raise WireError(f"{len(broken)} tensors hold NaN or infinity", where=where, received=", ".join(broken[:4]))


def _check_form(name: str, shape: tuple[int, ...], dtype: str, spec: Spec, where: str) -> None:
    fits = len(shape) == len(spec.shape) and all(
        want in (None, have) for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits or dtype != str(spec.dtype):
        allowed, received = f"{spec.shape} {spec.dtype}", f"{tuple(shape)} {dtype}"
        raise WireError(
            f"tensor {name!r} has another form than declared", where=where, allowed=allowed, received=received
        )


def encode(message: Request | Reply, allowed: Specs) -> bytes:
    """Serialise after checking the tensors against what may travel in this direction."""
    check(message.tensors, allowed, where=f"sending, site {message.site}, round {message.round}")
    envelope = {key: value for key, value in vars(message).items() if key != "tensors"}
    text = json.dumps(envelope, default=asdict, sort_keys=True).encode()
    return struct.pack("<Q", len(text)) + text + payload(message.tensors)


def payload(tensors: Tensors) -> bytes:
    """The serialised tensors; nothing at all where there are none."""
    return dumps(tensors) if tensors else b""


def size(data: bytes) -> Size:
    """Bytes of payload and envelope of an encoded message."""
    envelope = 8 + int(struct.unpack("<Q", data[:8])[0])
    return Size(payload=len(data) - envelope, envelope=envelope)


def envelope_of(data: bytes) -> dict[str, Any]:
    """The JSON part of an encoded message; WireError where the bytes are no message."""
    try:
        length = struct.unpack("<Q", data[:8])[0]
        found: dict[str, Any] = json.loads(data[8 : 8 + length])
        return found
    except (struct.error, ValueError) as error:
        raise WireError("these bytes are not a message", received=f"{len(data)} bytes") from error


def decode_request(data: bytes, allowed: Specs) -> Request:
    """A request whose tensors are all declared."""
    fields = envelope_of(data)
    fields["handshake"] = Handshake(**fields["handshake"])
    request = Request(**fields, tensors=_tensors_of(data))
    check(request.tensors, allowed, where=f"receiving at site {request.site}, round {request.round}")
    return request


def decode_reply(data: bytes, allowed: Specs) -> Reply:
    """A reply whose tensors are all declared."""
    fields = envelope_of(data)
    if fields["failure"] is not None:
        fields["failure"] = Failure(**fields["failure"])
    reply = Reply(**fields, tensors=_tensors_of(data))
    check(reply.tensors, allowed, where=f"receiving from site {reply.site}, round {reply.round}")
    return reply


def _tensors_of(data: bytes) -> Tensors:
    start = size(data).envelope
    return loads(data[start:]) if len(data) > start else {}
