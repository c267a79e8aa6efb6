"""Common: what crosses the wire. In: a request or a reply. Out: bytes, and back; both ends check every tensor.

A message is a checksum, an envelope (JSON: who, which round, what it builds on, digests, numbers) and a payload
(`payload.py`). Only tensors that the strategy declared for this direction and round can be put in or are accepted.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeGuard

import consilium
from consilium import payload
from consilium.errors import TrainingError, WireError
from consilium.protocols import Failure, Spec, Specs
from consilium.tensors import Tensors, non_finite

RequestKind = Literal["describe", "round", "evaluate", "finish"]


@dataclass(frozen=True)
class Handshake:
    """What both ends must share before a site touches its data."""

    agreement: str
    backbone: str
    version: str = consilium.__version__
    run: str = (
        ""  # names one run of an agreement across hospitals, so that a second one does not meet the first one's state
    )


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

    @classmethod
    def of(cls, whole: bytes) -> Size:
        """The same of a message that is known to be whole, without reading it."""
        start = _CHECKSUM + _LENGTH + int(struct.unpack("<Q", whole[_CHECKSUM : _CHECKSUM + _LENGTH])[0])
        return cls(payload=len(whole) - start, envelope=start)


def check(tensors: Tensors, allowed: Specs, where: str) -> None:
    """WireError unless every tensor is declared and has the declared shape and type, TrainingError unless finite."""
    for name, tensor in tensors.items():
        if name not in allowed:
            raise WireError(
                f"tensor {name!r} is not declared to travel",
                where=where,
                allowed=f"{len(allowed)} tensors: {', '.join(sorted(allowed)[:4])} ...",
                remedy="the strategy's up() and down() declare what leaves and what arrives",
            )
        _check_form(name, tensor.shape, str(tensor.dtype), allowed[name], where)
    _check_ranks(tensors, allowed, where)
    broken = non_finite(tensors)
    if broken:
        raise TrainingError(f"{len(broken)} tensors hold NaN or infinity", where=where, received=", ".join(broken[:4]))


def _check_form(name: str, shape: tuple[int, ...], dtype: str, spec: Spec, where: str) -> None:
    fits = len(shape) == len(spec.shape) and all(
        want in (None, have) or (at == spec.shrinks and 0 < have < want)
        for at, (want, have) in enumerate(zip(spec.shape, shape, strict=True))
    )
    if not fits or dtype != str(spec.dtype):
        allowed, received = f"{spec.shape} {spec.dtype}", f"{tuple(shape)} {dtype}"
        raise WireError(
            f"tensor {name!r} has another form than declared", where=where, allowed=allowed, received=received
        )


def _check_ranks(tensors: Tensors, allowed: Specs, where: str) -> None:
    """WireError where factors that may come at a smaller rank come at several."""
    along = {name: allowed[name].shrinks for name in tensors}
    sizes = sorted({tensors[name].shape[at] for name, at in along.items() if at is not None})
    if len(sizes) > 1:
        what = "factors of one site come at several ranks"
        raise WireError(what, where=where, allowed="one rank in a message", received=sizes)


def pack(message: Request | Reply, allowed: Specs) -> bytes:
    """The payload of a message, after checking its tensors against what may travel in this direction."""
    check(message.tensors, allowed, where=f"sending, site {message.site}, round {message.round}")
    return b"".join(payload.chunks(message.tensors, allowed))


def encode(message: Request | Reply, allowed: Specs, packed: bytes | None = None) -> bytes:
    """Serialise. `packed`: what `pack` gave for the same tensors, where several messages share them."""
    pieces = [pack(message, allowed) if packed is None else packed]
    envelope = {key: value for key, value in vars(message).items() if key != "tensors"}
    text = json.dumps(envelope, default=asdict, sort_keys=True).encode()
    body = [struct.pack("<Q", len(text)), text, *pieces]
    checksum = hashlib.sha256()
    for piece in body:
        checksum.update(piece)
    return b"".join([checksum.digest(), *body])


@dataclass(frozen=True)
class Opened:
    """A message that arrived as it was sent: its envelope, and its payload as it lies in the message."""

    fields: dict[str, Any]
    payload: memoryview
    size: Size


def open_message(data: bytes) -> Opened:
    """Check the bytes of a message, once; WireError where they are no whole message."""
    body = memoryview(data)[_CHECKSUM:]
    if len(body) < _LENGTH or hashlib.sha256(body).digest() != data[:_CHECKSUM]:
        raise WireError("these bytes are no whole message", received=f"{len(data)} bytes", remedy="send it again")
    end = _LENGTH + int(struct.unpack("<Q", body[:_LENGTH])[0])
    try:
        fields = json.loads(bytes(body[_LENGTH:end]))
    except (ValueError, RecursionError) as error:  # also text that is no UTF-8, and lists in lists without end
        raise WireError("the envelope of this message is not JSON", received=str(error)) from error
    if end > len(body) or not isinstance(fields, dict):
        raise WireError("this message has no envelope", received=f"{len(data)} bytes")
    return Opened(fields, body[end:], Size.of(data))


def size(data: bytes) -> Size:
    """Bytes of payload and envelope of an encoded message; WireError where the bytes are no whole message."""
    return open_message(data).size


def envelope_of(data: bytes) -> dict[str, Any]:
    """The JSON part of an encoded message; WireError where the bytes are no whole message."""
    return open_message(data).fields


def check_request(fields: Mapping[str, Any], rounds: int) -> None:
    """WireError unless the envelope of a request is one of a run of so many rounds: an agreement is for its rounds, and
    not for as many questions as somebody likes."""
    number, builds_on, kind = (fields.get(key) for key in ("round", "builds_on", "kind"))
    texts = fields.get("handshake"), fields.get("context")
    first = 1 if kind == "round" else 0
    fits = (
        kind in ("describe", "round", "evaluate", "finish")
        and all(isinstance(each, Mapping) for each in texts)
        and is_count(number)
        and is_count(builds_on)
        and first <= number <= rounds
        and builds_on <= number
    )
    if not fits:
        received = f"kind {kind!r:.40}, round {number!r:.40}, builds on {builds_on!r:.40}"
        allowed = f"a round of 1 to {rounds}, on a state of at most that round; a handshake and a context"
        raise WireError("this is no request of a run", allowed=allowed, received=received)


def decode_request(data: bytes | Opened, allowed: Specs) -> Request:
    """A request whose tensors are all declared."""
    opened = data if isinstance(data, Opened) else open_message(data)
    fields = opened.fields
    where = f"receiving at site {fields.get('site')}, round {fields.get('round')}"
    handshake = _build(Handshake, fields.get("handshake"))
    request: Request = _build(
        Request, {**fields, "handshake": handshake}, payload.loads(opened.payload, allowed, where)
    )
    check(request.tensors, allowed, where)
    return request


def decode_reply(data: bytes | Opened, allowed: Specs) -> Reply:
    """A reply whose tensors are all declared."""
    opened = data if isinstance(data, Opened) else open_message(data)
    fields, failure = opened.fields, opened.fields.get("failure")
    where = f"receiving from site {fields.get('site')}, round {fields.get('round')}"
    tensors = payload.loads(opened.payload, allowed, where)
    told = None if failure is None else _build(Failure, failure)
    reply: Reply = _build(Reply, {**fields, "failure": told}, tensors)
    _check_envelope(reply)
    check(reply.tensors, allowed, where)
    return reply


def rows(opened: Opened, allowed: Specs) -> list[dict[str, Any]]:
    """One row per tensor in a message: name, shape, dtype, bytes. `allowed`: as for decoding it."""
    where = f"site {opened.fields.get('site')}, round {opened.fields.get('round')}"
    return payload.rows(opened.payload, allowed, where)


def _check_envelope(reply: Reply) -> None:
    texts = [reply.site, *(vars(reply.failure).values() if reply.failure else ())]
    counts = [reply.round, reply.num_examples]
    fits = all(isinstance(text, str) for text in texts) and all(map(is_count, counts))
    if not fits or not isinstance(reply.numbers, Mapping):
        received = f"site {reply.site!r:.80}, round {reply.round!r:.80}, num_examples {reply.num_examples!r:.80}"
        raise WireError("the envelope of this reply holds what it must not", received=received)


def check_numbers(kind: RequestKind, numbers: Mapping[str, Any], class_counts: int) -> None:
    """WireError unless the numbers of a reply are what the coordinator reckons with, and nothing beside: what is not
    known here goes nowhere, not into events, files or pages. `class_counts`: how many come."""
    counts = numbers.get("class_counts")
    fits = {
        "class_counts": isinstance(counts, list) and len(counts) == class_counts and all(map(is_count, counts)),
        "image_passes": is_count(numbers.get("image_passes")),
        "num_steps": is_count(numbers.get("num_steps")),
        "loss": _is_loss(numbers.get("loss")),
        "seconds": _is_finite(numbers.get("seconds")),
        "val": _is_validation(numbers.get("val")),
        "metrics": _is_tested(numbers.get("metrics", {})),
        "models": _is_names(numbers.get("models", [])),
        "learned": True,  # `check_learned` knows what a strategy declares
    }
    work = {"image_passes", "seconds"}
    described = {"class_counts"} if class_counts else {"class_counts"} & numbers.keys()
    needed = {
        "describe": described,
        "round": {*work, "num_steps", "loss", "val"},
        "evaluate": {"val"},
        "finish": {*work, "metrics", "models"},
    }[kind]
    foreign = numbers.keys() - needed - ({"learned"} if kind == "round" else set())
    broken = [*(key for key in sorted(needed) if not fits[key]), *sorted(foreign)]
    if broken:
        received = ", ".join(f"{plain(str(key), 60)} {numbers.get(key)!r:.60}" for key in broken[:8])
        raise WireError(f"numbers in the reply to '{kind}' are missing or of another kind", received=received)


def check_learned(numbers: Mapping[str, Any], declared: Collection[str]) -> None:
    """WireError unless a strategy's own numbers (`Learned.numbers`) are finite and declared; both ends ask."""
    found = numbers.get("learned", {})
    fits = isinstance(found, Mapping) and found.keys() <= set(declared) and all(map(_is_finite, found.values()))
    if not fits:
        allowed = f"finite numbers called {', '.join(sorted(declared))}" if declared else "none"
        raise WireError("numbers that the strategy did not declare", allowed=allowed, received=f"{found!r:.200}")


def _is_finite(value: object) -> bool:
    """Whether a number is one that sums of many stay finite with; NaN and integers of any length are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def _is_loss(value: object) -> bool:
    """NaN stands where nothing was trained, infinity where it came to no good."""
    return isinstance(value, float) and (not math.isfinite(value) or _is_finite(value))


def _is_validation(value: object) -> bool:
    if not isinstance(value, Mapping) or not {"incoming"} <= value.keys() <= {"incoming", "outgoing"}:
        return False
    return all(
        isinstance(table, Mapping)
        and _is_names(list(table))
        and all(number is None or _is_finite(number) for number in table.values())
        for table in value.values()
    )


def _is_tested(value: object) -> bool:
    """{split: {model: {metric: value}}} of both splits, or nothing."""
    if not isinstance(value, Mapping) or value.keys() not in ({"val", "test"}, set()):
        return False
    return all(isinstance(models, Mapping) and _is_names(list(models)) for models in value.values()) and all(
        isinstance(tree, Mapping) and _is_names(list(tree)) and all(map(_is_value, tree.values()))
        for models in value.values()
        for tree in models.values()
    )


def _is_value(value: object) -> bool:
    """Of a metric, with its interval, and of how many images."""
    if not isinstance(value, Mapping) or value.keys() != {"value", "low", "high", "n"}:
        return False
    return is_count(value["n"]) and all(value[k] is None or _is_finite(value[k]) for k in ("value", "low", "high"))


def _is_names(values: object) -> bool:
    """Whether these are not too many short words of one line, as metrics and models are called."""
    return (
        isinstance(values, list)
        and len(values) <= _MOST_NAMES
        and all(isinstance(each, str) and len(each) <= _LONGEST_NAME and plain(each) == each for each in values)
    )


def plain(text: str, longest: int = 1000) -> str:
    """Words of somebody else for a log, a terminal or a page: one line, without signs that command a terminal, hide
    what stands beside them, or are no text; cut where they are too long."""
    found = " ".join("".join(" " if unicodedata.category(sign)[0] in "CZ" else sign for sign in text).split())
    return found if len(found) <= longest else f"{found[: longest - 4]} ..."


def is_count(value: object) -> TypeGuard[int]:
    """Whether a plain value is a whole number, not negative, that a float64 can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_COUNT


_CHECKSUM, _LENGTH = 32, 8  # bytes: SHA-256 of all that follows, then the length of the envelope
_LARGEST_COUNT, _LARGEST_NUMBER = 2**53, 1e30
_LONGEST_NAME, _MOST_NAMES = 200, 1000  # of metrics and models; of a class there are two
CODES = ("refused", "non_finite", "stale", "error")  # of a site's own failures


def _build(kind: Callable[..., Any], fields: Any, tensors: Tensors | None = None) -> Any:
    try:
        return kind(**fields) if tensors is None else kind(**fields, tensors=tensors)
    except TypeError as error:
        remedy = "sender and receiver need the same version of the package"
        raise WireError("this message has other fields than expected", received=str(error), remedy=remedy) from error
