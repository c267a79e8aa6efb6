"""A hospital that does not keep to the rules: it works as it should, and sends something else past its own gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from consilium import payload
from consilium.deployment.guard import Guard
from consilium.engines.relay import Answer, Listener
from consilium.engines.site import Site
from consilium.messages import Reply, decode_reply, encode, envelope_of
from consilium.protocols import Specs

PATIENT = "MUELLER_Anna_1962-03-14.png"


def install(plan: Mapping[int, str]) -> None:
    """round -> lie, in this process from now on."""
    honest, learn, listen = Guard.answer, Site._learn, Listener.__init__
    sent: dict[int, bytes] = {}
    wires: dict[int, Specs] = {}
    failed = set[int]()

    def asked(data: bytes) -> tuple[int, str]:
        fields = envelope_of(data)
        return fields["round"], plan.get(fields["round"], "") if fields["kind"] == "round" else ""

    def answer(self: Guard, data: bytes) -> bytes:
        number, kind = asked(data)
        if kind == "fault" and number not in failed:
            failed.add(number)
            raise RuntimeError(f"cannot read /data/patients/{PATIENT}")
        wires[number] = self.resident.site.experiment.wire("up", number)
        return honest(self, data)

    def listening(self: Listener, path: Path, whole: Answer, *others: Any) -> None:
        """Past all that the hospital's own service does."""

        def lie(data: bytes) -> bytes:
            reply, (number, kind) = whole(data), asked(data)
            sent[number] = sent.get(number, reply)
            if kind == "old":
                return sent[min(sent)]
            return LIES[kind](reply, wires[number]) if kind in LIES else reply

        listen(self, path, lie, *others)

    def learning(self: Site, request: Any, *others: Any) -> Any:
        if plan.get(request.round) == "exception":
            raise ValueError(f"cannot read /data/patients/{PATIENT}")
        return learn(self, request, *others)

    Guard.answer, Site._learn = answer, learning  # type: ignore[method-assign]
    Listener.__init__ = listening  # type: ignore[method-assign]


def _unchecked(reply: Reply, specs: Specs) -> bytes:
    return encode(reply, specs, b"".join(payload.chunks(reply.tensors, specs)))


def _with(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes, Specs], bytes]:
    """The first tensor is another one."""

    def lie(data: bytes, specs: Specs) -> bytes:
        reply = decode_reply(data, specs)
        name = min(reply.tensors)
        tensors = {**reply.tensors, name: change(reply.tensors[name].clone())}
        return _unchecked(
            replace(reply, tensors=tensors), {**specs, name: replace(specs[name], shape=tuple(tensors[name].shape))}
        )

    return lie


def _times(factor: float) -> Callable[[bytes, Specs], bytes]:
    """Everything that was learnt, so many times."""

    def lie(data: bytes, specs: Specs) -> bytes:
        reply = decode_reply(data, specs)
        return _unchecked(replace(reply, tensors={n: value * factor for n, value in reply.tensors.items()}), specs)

    return lie


def _renamed(data: bytes, specs: Specs) -> bytes:
    reply = decode_reply(data, specs)

    def other(name: str) -> str:
        return f"images.{name}" if name == min(specs) else name

    tensors = {other(name): value for name, value in reply.tensors.items()}
    return _unchecked(replace(reply, tensors=tensors), {other(name): spec for name, spec in specs.items()})


def _said(**fields: Any) -> Callable[[bytes, Specs], bytes]:
    """The envelope says something else."""
    return lambda data, specs: _unchecked(replace(decode_reply(data, specs), **fields), specs)


def _more_numbers(data: bytes, specs: Specs) -> bytes:
    reply = decode_reply(data, specs)
    return _unchecked(replace(reply, numbers={**reply.numbers, "more": "0" * 20_000_000}), specs)


def _number(value: float) -> Callable[[bytes, Specs], bytes]:
    def lie(data: bytes, specs: Specs) -> bytes:
        reply = decode_reply(data, specs)
        return _unchecked(replace(reply, numbers={**reply.numbers, "seconds": value}), specs)

    return lie


LIES: dict[str, Callable[[bytes, Specs], bytes]] = {
    "nan": _with(lambda value: value.fill_(float("nan"))),
    "inf": _with(lambda value: value.fill_(float("inf"))),
    "norm": _with(lambda value: value.fill_(1e6)),
    "times": _times(1e4),
    "absurd": _with(lambda value: value.fill_(1e9)),
    "shape": _with(lambda value: torch.cat([value, value])),
    "names": _renamed,
    "oversize": _more_numbers,
    "noise": lambda data, specs: bytes(30_000_000),  # noqa: ARG005
    "cut": lambda data, specs: data[:-100],  # noqa: ARG005
    "number": _number(float("nan")),
    "other": _said(site="harbour"),
    "images": _said(num_examples=10**6),
}
