"""Stage 4 and 9: the only inference loop. In: variables and a split. Out: outputs or features, one row per image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from consilium.data import Examples, Preprocessing
from consilium.local.augment import normalise, to_float
from consilium.protocols import Model
from consilium.tensors import Tensors

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
        pixels = np.ascontiguousarray(examples.images[examples.rows[start : start + BATCH_SIZE]])
        images = normalise(to_float(torch.from_numpy(pixels).to(device)), preprocessing)
        parts.append(function(images).float().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, 0)
