"""Common: the algebra of named tensors. In: mappings from name to tensor. Out: mappings from name to tensor, or bytes.

Sums run in float64 over terms in the order given (callers sort by site), so that the order of arrival changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from safetensors.torch import load
from torch import Tensor

from consilium.errors import WireError

Tensors = Mapping[str, Tensor]


def map_tensors(function: Callable[..., Tensor], first: Tensors, *others: Tensors) -> dict[str, Tensor]:
    """Apply `function` name by name; all mappings must have the same names."""
    for other in others:
        if other.keys() != first.keys():
            difference = sorted(first.keys() ^ other.keys())[:3]
            raise WireError("two sets of tensors have different names", received=f"not in both: {difference}")
    return {name: function(first[name], *(other[name] for other in others)) for name in sorted(first)}


def under(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors, called `prefix/name`."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def within(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """Of `tensors`, those called `prefix/name`, by name."""
    return {n.removeprefix(f"{prefix}/"): v for n, v in tensors.items() if n.startswith(f"{prefix}/")}


def detach(tensors: Tensors) -> dict[str, Tensor]:
    """Contiguous CPU copies without a gradient, sorted by name: the form in which tensors travel and rest."""
    return {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in sorted(tensors)}


def onto(device: torch.device | str, tensor: Tensor) -> Tensor:
    """A tensor of the CPU on a device. A GPU fetches it from pinned memory by itself; the program does not wait."""
    source = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def fetched(tensors: Tensors) -> Callable[[torch.device], Tensors]:
    """The same tensors on a device, copied there when first asked for."""
    return cache(lambda device: {name: value.to(device) for name, value in tensors.items()})


def weighted_mean(terms: Iterable[tuple[float, Tensors]]) -> dict[str, Tensor]:
    """Mean by weight, name by name over the terms that hold the name; float64 inside, the first term's dtype out.

    Terms are read once and not kept. Raises WireError where the weights of a name add up to nothing.
    """
    sums: dict[str, _Sum] = {}
    joint: dict[tuple[str, ...], _Sum] = {}  # of tensors that lie behind one another: `sums` are parts of it
    for weight, tensors in terms:
        names, flat = tuple(tensors), _flat([*tensors.values()])
        if flat is not None and not any(name in sums for name in names):
            joint[names] = _Sum.of(flat)
            parts = torch.split(joint[names].total, [tensor.numel() for tensor in tensors.values()])
            for (name, tensor), part in zip(tensors.items(), parts, strict=True):
                sums[name] = _Sum(part.view(tensor.shape), tensor.dtype)
        together = joint.get(names)
        fits = together is not None and all(sums[name].total.shape == tensor.shape for name, tensor in tensors.items())
        if flat is not None and together is not None and fits:
            together.add(weight, flat)
            for name in names:
                sums[name].weights += weight
            continue
        for name, tensor in tensors.items():
            if name not in sums:
                sums[name] = _Sum.of(tensor)
            sums[name].add(weight, tensor)
    return {name: sums[name].mean(name) for name in sorted(sums)}


def _flat(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie behind one another in one piece of memory, as those of a message do, as one; None where they do
    not. A sum over few long tensors is faster than over many short ones."""
    if len(tensors) < 2:
        return None
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    storage = first.untyped_storage()
    if first.is_cuda or end > storage.data_ptr() + storage.nbytes():  # neighbours by chance
        return None
    return first.detach().as_strided(((end - first.data_ptr()) // first.itemsize,), (1,))


@dataclass
class _Sum:
    """sum w_k x_k and sum w_k."""

    total: Tensor  # float64
    dtype: torch.dtype
    weights: float = 0
    term: Tensor | None = None  # float64, memory for w_k x_k that is used again and again

    @staticmethod
    def of(tensor: Tensor) -> _Sum:
        """Of nothing yet."""
        return _Sum(torch.zeros_like(tensor, dtype=torch.float64), tensor.dtype)

    def add(self, weight: float, tensor: Tensor) -> None:
        self.weights += weight
        if self.term is None:
            self.term = torch.empty_like(self.total)
        self.total += self.term.copy_(tensor).mul_(weight)

    def mean(self, name: str) -> Tensor:
        if not self.weights > 0:
            what = "the weights of a mean must add up to more than nothing"
            raise WireError(what, where=name, received=float(self.weights))
        return (self.total / float(self.weights)).to(self.dtype)


def squared_distance(first: Tensors, second: Tensors) -> Tensor:
    """sum ||first - second||^2 over the names of `second`; differentiable, a zero-dimensional tensor."""
    terms = [(first[name] - second[name].to(first[name].device)).square().sum() for name in sorted(second)]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def non_finite(tensors: Tensors) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [name for name in sorted(tensors) if not bool(torch.isfinite(tensors[name]).all())]


def equal(first: Tensors, second: Tensors) -> bool:
    """Same names, shapes, types and bits."""
    if first.keys() != second.keys():
        return False
    return all(digest(first[name]) == digest(second[name]) for name in first)


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits of SHA-256 over type, shape and bytes: the version of one tensor."""
    total = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    total.update(raw(tensor))
    return total.hexdigest()[:16]


def digest_all(tensors: Tensors) -> str:
    """64 hexadecimal digits over all names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}|{tensor.dtype}{tuple(tensor.shape)}|".encode())
        total.update(raw(tensor))
    return total.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row; they share its memory where it lies so on the CPU already."""
    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def num_elements(tensors: Tensors) -> int:
    """Number of scalars."""
    return sum(tensor.numel() for tensor in tensors.values())


def pieces(tensors: Tensors, meta: Mapping[str, object] | None = None) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces that share memory with tensors that lie in one piece on the CPU: nothing is copied.

    `meta` is JSON and lands in the file's own header. Values lie widest types first, then by name, so that each begins
    at a multiple of its type's width. WireError for a type that the format has no name for.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise WireError("this type has no name in a safetensors file", where=name, received=str(tensor.dtype))
    order = sorted(tensors, key=lambda name: (_PLACE[tensors[name].dtype], name))
    header: dict[str, object] = {}
    if meta is not None:
        header["__metadata__"] = {"consilium": json.dumps(meta, sort_keys=True)}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    yield from (raw(tensors[name]) for name in order)


_TYPES = {  # in the order in which they lie in a file
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLACE = {dtype: place for place, dtype in enumerate(_TYPES)}


def dumps(tensors: Tensors, meta: Mapping[str, object] | None = None) -> bytes:
    """Serialise as safetensors: `pieces` in one."""
    return b"".join(pieces(tensors, meta))


def loads(data: bytes) -> dict[str, Tensor]:
    """The tensors of `dumps`; WireError where the bytes are not a whole safetensors file."""
    try:
        return load(data)
    except Exception as error:
        raise WireError("these bytes are not a whole safetensors payload", received=f"{len(data)} bytes") from error


def meta_of(data: bytes) -> dict[str, object]:
    """The `meta` given to `dumps`; ValueError, struct.error or KeyError where these bytes are no whole file."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    found: dict[str, object] = json.loads(header.get("__metadata__", {}).get("consilium", "{}"))
    return found


def select(tensors: Tensors, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors; a missing name is an error, not a gap."""
    wanted = sorted(names)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise WireError("tensors are missing", allowed=sorted(tensors)[:5], received=missing[:5])
    return {name: tensors[name] for name in wanted}
