"""Stage 6, filters: fewer bytes per number. In: a float32 tensor. Out: narrower tensors, and what these stand for.

bfloat16   sign, exponent and 8 of 24 significant bits of every number: relative error at most 2^-8
int8       x = q * scale with whole |q| <= 127: error at most scale / 2. A tensor is read as a matrix, its first
           dimension by all others, with one float32 scale per row or per column, whichever are fewer; a vector has one.
           For low-rank factors that is a scale per component: 4 bytes for as many numbers as the model is wide.

What they stand for is a function of the narrow tensors alone and has the same bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from consilium.errors import TrainingError, WireError

Width = Literal["bfloat16", "int8"]
Form = tuple[tuple[int | None, ...], torch.dtype]
_LARGEST = torch.finfo(torch.bfloat16).max  # rounding must not make infinity of a finite number


def forms(shape: tuple[int | None, ...], width: Width) -> dict[str, Form]:
    """Shape and type of each narrow tensor that stands for one of this shape, by what is added to its name."""
    if width == "bfloat16":
        return {"bfloat16": (shape, torch.bfloat16)}
    known = [size for size in shape if size is not None]
    scales = _num_scales(tuple(known)) if len(known) == len(shape) else None
    return {"int8": (shape, torch.int8), "scale": ((scales,), torch.float32)}


def narrowed(value: Tensor, width: Width) -> dict[str, Tensor]:
    """The narrow tensors that stand for a float32 tensor; TrainingError where it holds NaN or infinity."""
    if not bool(value.isfinite().all()):
        raise TrainingError("NaN or infinity cannot be coded")
    if width == "bfloat16":
        return {"bfloat16": value.clamp(-_LARGEST, _LARGEST).bfloat16()}
    matrix, axis = _matrix(value)
    scale = matrix.abs().amax(dim=axis) / 127 if value.numel() else torch.zeros(min(matrix.shape))
    steps = matrix / torch.where(scale > 0, scale, 1).unsqueeze(axis)
    return {"int8": steps.round().clamp(-127, 127).to(torch.int8).reshape(value.shape), "scale": scale}


def widened(parts: Mapping[str, Tensor], width: Width) -> Tensor:
    """What narrow tensors stand for, float32 and finite; WireError where they do not belong together."""
    if width == "bfloat16":
        return parts["bfloat16"].float()
    (matrix, axis), scale = _matrix(parts["int8"]), parts["scale"]
    if tuple(scale.shape) != (min(matrix.shape),):
        allowed, received = f"{min(matrix.shape)} of them", f"{tuple(scale.shape)}"
        raise WireError("these scales belong to another tensor", allowed=allowed, received=received)
    found = matrix.float() * scale.unsqueeze(axis)
    return found.clamp(-_LARGEST, _LARGEST).reshape(parts["int8"].shape)


def num_bytes(shape: tuple[int | None, ...], width: Width) -> int:
    """Bytes of the narrow tensors; a free dimension counts as 0."""
    found = forms(shape, width).values()
    return sum(math.prod(size or 0 for size in sizes) * dtype.itemsize for sizes, dtype in found)


def _matrix(value: Tensor) -> tuple[Tensor, int]:
    """The tensor as a matrix, and the dimension along which numbers share a scale."""
    rows, columns = _sides(tuple(value.shape))
    return value.reshape(rows, columns), 1 if rows <= columns else 0


def _num_scales(shape: tuple[int, ...]) -> int:
    return min(_sides(shape))


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
