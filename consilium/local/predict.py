"""Stage 4 and 9: the only inference loop. In: variables and a split. Out: outputs or features, one row per image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from consilium.data import Examples, IntArray, Preprocessing
from consilium.local.augment import normalise, to_float
from consilium.protocols import Model
from consilium.tensors import Tensors, onto

BATCH_SIZE = 128


def autocast(device: str, precision: str) -> torch.autocast:
    """Mixed precision for the block; full precision where float32 is asked for."""
    wanted = getattr(torch, precision)
    return torch.autocast(device.split(":")[0], dtype=wanted, enabled=precision != "float32")


def outputs(
    model: Model, variables: Tensors, examples: Examples, preprocessing: Preprocessing, device: str, precision: str
) -> Tensor:
    """Head outputs float32 [n, num_outputs] on the CPU, without augmentation; [0, 0] for an empty split."""
    here = {name: value.to(device) for name, value in variables.items()}

    def function(images: Tensor) -> Tensor:
        with autocast(device, precision):
            return model.forward(here, images)

    return _rows(function, examples, preprocessing, device)


def pooled_features(
    model: Model, variables: Tensors, examples: Examples, preprocessing: Preprocessing, device: str
) -> Tensor:
    """Features float32 [n, num_features] on the CPU, without augmentation."""
    here = {name: value.to(device) for name, value in variables.items()}
    return _rows(lambda images: model.features(here, images), examples, preprocessing, device)


@torch.inference_mode()
def _rows(
    function: Callable[[Tensor], Tensor], examples: Examples, preprocessing: Preprocessing, device: str
) -> Tensor:
    parts = []
    for start in range(0, len(examples), BATCH_SIZE):
        pixels = onto(device, read(examples, examples.rows[start : start + BATCH_SIZE], device))
        parts.append(function(normalise(to_float(pixels), preprocessing)).float())
    return torch.cat(parts).cpu() if parts else torch.zeros(0, 0)


def read(examples: Examples, rows: IntArray, device: str) -> Tensor:
    """Pixels uint8 [B, H, W, 3] of these rows of the store, in memory that `device` can fetch them from."""
    shape, pinned = (len(rows), *examples.images.shape[1:]), device.startswith("cuda")
    pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
    np.take(examples.images, rows, axis=0, out=pixels.numpy(), mode="clip")  # the other modes copy once more
    return pixels
