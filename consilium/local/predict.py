"""Stage 4 and 9: the only inference loop. In: variables and a split. Out: outputs or features, one row per image."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consilium import instances
from consilium.data import Examples, IntArray, Preprocessing
from consilium.local.augment import normalise, to_float
from consilium.protocols import Model
from consilium.tensors import Tensors, onto

BATCH_SIZE = 128


def autocast(device: str, precision: str) -> torch.autocast:
    """Mixed precision for the block; full precision where float32 is asked for."""
    wanted = getattr(torch, precision)
    return torch.autocast(device.split(":")[0], dtype=wanted, enabled=precision != "float32")


@dataclass(frozen=True)
class Prefix:
    """What the backbone made of images up to a depth [n, ...]; see `halves`. At depth 0: the images themselves."""

    tokens: Tensor
    depth: int

    def rows(self, positions: IntArray, device: str) -> Prefix:
        """Of some of the images, on a device."""
        return Prefix(onto(device, self.tokens[torch.from_numpy(positions)]), self.depth)


def load_images(examples: Examples, positions: IntArray, preprocessing: Preprocessing, device: str) -> Tensor:
    """Rows of the store, float32 [B, 3, H, W], normalised."""
    return normalise(to_float(onto(device, read(examples, examples.rows[positions], device))), preprocessing)


def outputs(
    model: Model,
    variables: Tensors,
    examples: Examples,
    preprocessing: Preprocessing,
    device: str,
    precision: str,
    prefix: Prefix | None = None,
) -> Tensor:
    """Head outputs float32 [n, num_outputs] on the CPU, without augmentation; [0, 0] for an empty split. `prefix`: of
    all its images, made with these variables."""
    here = {name: value.to(device) for name, value in variables.items()}

    def function(inputs: Prefix) -> Tensor:
        with autocast(device, precision):
            return instances.forward(model, here, inputs.tokens, inputs.depth)

    return _rows(function, examples, preprocessing, device, prefix)


def pooled_features(
    model: Model,
    variables: Tensors,
    examples: Examples,
    preprocessing: Preprocessing,
    device: str,
    prefix: Prefix | None = None,
) -> Tensor:
    """Features float32 [n, num_features] on the CPU, without augmentation."""
    here = {name: value.to(device) for name, value in variables.items()}

    def function(inputs: Prefix) -> Tensor:
        return model.features(here, inputs.tokens, inputs.depth)

    return _rows(function, examples, preprocessing, device, prefix)


@torch.inference_mode()
def moments_of_inputs(
    model: Model,
    variables: Tensors,
    modules: Collection[str],
    examples: Examples,
    preprocessing: Preprocessing,
    device: str,
) -> dict[str, Tensor]:
    """Mean of x x^T over all tokens x of all images that enter these modules, by module: float64 [in, in] on the CPU,
    without augmentation, products of a batch in float32; nothing for an empty split."""
    here = {name: value.to(device) for name, value in variables.items()}
    totals: dict[str, tuple[Tensor, int]] = {}
    for start in range(0, len(examples), BATCH_SIZE):
        rows = np.arange(start, min(start + BATCH_SIZE, len(examples)))
        with model.watch(modules) as seen:
            model.features(here, load_images(examples, rows, preprocessing, device))
        for name in sorted(modules):
            x = seen[name].flatten(0, -2).float()
            total, count = totals.get(name, (torch.zeros((), dtype=torch.float64), 0))
            totals[name] = total + (x.mT @ x).cpu().double(), count + len(x)
    return {name: total / count for name, (total, count) in totals.items()}


@torch.inference_mode()
def _rows(
    function: Callable[[Prefix], Tensor],
    examples: Examples,
    preprocessing: Preprocessing,
    device: str,
    prefix: Prefix | None,
) -> Tensor:
    parts = []
    for start in range(0, len(examples), BATCH_SIZE):
        rows = np.arange(start, min(start + BATCH_SIZE, len(examples)))
        if prefix is not None:
            inputs = prefix.rows(rows, device)
        else:
            inputs = Prefix(load_images(examples, rows, preprocessing, device), 0)
        parts.append(function(inputs).float())
    return torch.cat(parts).cpu() if parts else torch.zeros(0, 0)


def read(examples: Examples, rows: IntArray, device: str) -> Tensor:
    """Pixels uint8 [B, H, W, 3] of these rows of the store, in memory that `device` can fetch them from."""
    shape, pinned = (len(rows), *examples.images.shape[1:]), device.startswith("cuda")
    pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
    np.take(examples.images, rows, axis=0, out=pixels.numpy(), mode="clip")  # the other modes copy once more
    return pixels
