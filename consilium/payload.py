"""Common: how the tensors of a message lie in it. In: tensors and what may travel. Out: bytes, and the tensors again.

Both ends know what may travel in a direction and a round, so names, types and fixed sizes need not:

    format                1 byte
    digest                8 bytes: of the sorted names, shapes and types that may travel
    which of them are here   1 bit each, in sorted order, the lowest bit first
    free dimensions       4 bytes each, of the tensors that are here, in sorted order; so are those that may shrink
    values                little-endian, the widest types first, in sorted order within a width, nothing between

No tensors, no bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from consilium.errors import WireError
from consilium.protocols import Spec, Specs
from consilium.tensors import Tensors, raw

FORMAT = 1
_HEAD, _FREE = struct.Struct("<B8s"), struct.Struct("<I")
Shapes = Mapping[str, tuple[int, ...]]


def chunks(tensors: Tensors, declared: Specs) -> Iterator[bytes | memoryview]:
    """The payload in pieces that share memory with the tensors where these lie in one piece on the CPU.

    Every tensor must have the declared form (`messages.check`).
    """
    if tensors:
        order = sorted(declared)
        bits = sum(1 << at for at, name in enumerate(order) if name in tensors)
        free = [size for name in order if name in tensors for size in _free(declared, name, tensors[name].shape)]
        yield _HEAD.pack(FORMAT, _digest(declared)) + bits.to_bytes(_num_bytes(declared), "little")
        yield b"".join(map(_FREE.pack, free))
        yield from (raw(tensors[name]) for name in _laid_out(declared, tensors))


def loads(data: bytes | memoryview, declared: Specs, where: str = "") -> dict[str, Tensor]:
    """The tensors of a payload, in memory of their own and behind one another; WireError with `where` for anything but
    a whole payload."""
    shapes, start = _read_head(data, declared, where)
    if not shapes:
        return {}
    values = bytearray(memoryview(data)[start:])  # tensors must be writable, and lie where their type allows
    whole = torch.frombuffer(values, dtype=torch.uint8) if values else torch.empty(0, dtype=torch.uint8)
    found, at = {}, 0
    for name in _laid_out(declared, shapes):
        dtype, count = declared[name].dtype, math.prod(shapes[name])
        flat = torch.empty(0, dtype=dtype).set_(
            whole.untyped_storage(), at // dtype.itemsize, (count,), (1,)
        )  # no view of another
        found[name] = flat.reshape(shapes[name])
        at += count * dtype.itemsize
    return found


def num_bytes(declared: Specs, names: Iterable[str]) -> int:
    """Length of a payload of these of the declared tensors; free dimensions count as 0, one that may shrink in full."""
    here = {name: tuple(size or 0 for size in declared[name].shape) for name in names}
    if not here:
        return 0
    free = sum(len(_open(declared[name])) for name in here)
    return _HEAD.size + _num_bytes(declared) + free * _FREE.size + _num_values_bytes(declared, here)


def rows(data: bytes | memoryview, declared: Specs, where: str = "") -> list[dict[str, Any]]:
    """One row per tensor in a payload, sorted by name: name, shape, dtype, bytes."""
    shapes, _ = _read_head(data, declared, where)
    return [
        {
            "name": name,
            "shape": list(shape),
            "dtype": str(declared[name].dtype).removeprefix("torch."),
            "bytes": _num_values_bytes(declared, {name: shape}),
        }
        for name, shape in shapes.items()
    ]


def _read_head(data: bytes | memoryview, declared: Specs, where: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of the tensors that are here, sorted by name, and where values begin; the length is right, too."""
    if not len(data):
        return {}, 0
    order, view = sorted(declared), memoryview(data)
    start = _HEAD.size + _num_bytes(declared)
    if len(view) < start:
        raise _broken("this payload is cut off", where, f"at least {start} bytes", f"{len(view)} bytes")
    number, digest = _HEAD.unpack(view[: _HEAD.size])
    if number != FORMAT:
        raise _broken("this payload has another format", where, FORMAT, number)
    if digest != _digest(declared):
        raise _broken("sender and receiver declare other tensors", where, _digest(declared).hex(), digest.hex())
    bits = int.from_bytes(view[_HEAD.size : start], "little")
    if not 0 < bits < 1 << len(order):
        raise _broken("this payload names no tensor that is declared", where, f"{len(order)} tensors", f"{bits:b}")
    here = [name for at, name in enumerate(order) if bits >> at & 1]
    return _shapes(view, declared, here, start, where)


def _shapes(
    view: memoryview, declared: Specs, here: list[str], start: int, where: str
) -> tuple[dict[str, tuple[int, ...]], int]:
    count = sum(len(_open(declared[name])) for name in here)
    end = start + count * _FREE.size
    if len(view) < end:
        raise _broken("this payload is cut off", where, f"at least {end} bytes", f"{len(view)} bytes")
    free = iter([size for (size,) in _FREE.iter_unpack(view[start:end])])
    shapes = {name: _sizes(declared[name], free) for name in here}
    wanted = end + _num_values_bytes(declared, shapes)
    if len(view) != wanted:
        raise _broken(
            "this payload has another length than its tensors", where, f"{wanted} bytes", f"{len(view)} bytes"
        )
    return shapes, end


def _broken(what: str, where: str, allowed: object, received: object) -> WireError:
    return WireError(what, where=where or None, allowed=allowed, received=received)


def _free(declared: Specs, name: str, shape: tuple[int, ...]) -> list[int]:
    return [shape[at] for at in _open(declared[name])]


def _open(spec: Spec) -> list[int]:
    """The dimensions whose size a message has to say."""
    return [at for at, size in enumerate(spec.shape) if size is None or at == spec.shrinks]


def _sizes(spec: Spec, told: Iterator[int]) -> tuple[int, ...]:
    found = _open(spec)
    return tuple(next(told) if at in found else size or 0 for at, size in enumerate(spec.shape))


def _num_bytes(declared: Specs) -> int:
    """Of the bits that say which tensors are here."""
    return -(-len(declared) // 8)


def _num_values_bytes(declared: Specs, shapes: Shapes) -> int:
    return sum(math.prod(shape) * declared[name].dtype.itemsize for name, shape in shapes.items())


def _laid_out(declared: Specs, names: Iterable[str]) -> list[str]:
    """Widest types first, so that every tensor begins at a multiple of its type's width."""
    return sorted(names, key=lambda name: (-declared[name].dtype.itemsize, name))


def _digest(declared: Specs) -> bytes:
    forms = [[name, spec.shape, str(spec.dtype), *_shrinks(spec)] for name, spec in sorted(declared.items())]
    return hashlib.sha256(json.dumps(forms).encode()).digest()[:8]


def _shrinks(spec: Spec) -> list[int]:
    return [] if spec.shrinks is None else [spec.shrinks]
