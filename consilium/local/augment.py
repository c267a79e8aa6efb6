"""Stage 4, local training: augmentation and normalisation. In: uint8 images. Out: normalised float images.

Every draw is per image and comes from the generator given. Images are square after the decoded-image store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Generator, Tensor

from consilium.data import Preprocessing
from consilium.tensors import onto

Augmentation = Callable[[Tensor, Generator], Tensor]


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Float images [B, 3, H, W] in [0, 1], minus mean, over std."""
    mean, std = _constants(preprocessing.mean, preprocessing.std, images.device)
    return (images - mean) / std


@lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once per device: numbers that become a tensor in every step make the program wait for a GPU."""
    with torch.inference_mode(False):
        return (
            torch.tensor(mean, device=device).view(1, 3, 1, 1),
            torch.tensor(std, device=device).view(1, 3, 1, 1),
        )


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def none(images: Tensor, generator: Generator) -> Tensor:  # noqa: ARG001
    """Leave the images as they are."""
    return images


def dermoscopy(images: Tensor, generator: Generator) -> Tensor:
    """A lesion has no up and no left: one of the eight flips and quarter turns, mild colour and contrast changes."""
    return colour(dihedral(images, generator), generator, contrast=0.1, brightness=0.1, gain=0.05)


def radiograph(images: Tensor, generator: Generator) -> Tensor:
    """Patients are never mirrored: turns within 7 degrees, shifts and sizes within 5 %, mild contrast changes."""
    return colour(affine(images, generator, degrees=7, shift=0.05, scale=0.05), generator, 0.1, 0.1, gain=0)


PRESETS: Mapping[str, Augmentation] = {"none": none, "dermoscopy": dermoscopy, "radiograph": radiograph}


def dihedral(images: Tensor, generator: Generator) -> Tensor:
    """One of the eight symmetries of the square for each image."""
    draws = onto(images.device, torch.randint(0, 2, (3, len(images)), generator=generator).bool())
    across, down, turn = draws.view(3, -1, 1, 1, 1)
    images = torch.where(across, torch.flip(images, [-1]), images)
    images = torch.where(down, torch.flip(images, [-2]), images)
    return torch.where(turn, images.transpose(-1, -2), images)


def colour(images: Tensor, generator: Generator, contrast: float, brightness: float, gain: float) -> Tensor:
    """Contrast about the image's mean, brightness, and a gain per channel, each uniform within its share; clipped."""
    uniform = onto(images.device, torch.rand(len(images), 5, generator=generator)) * 2 - 1
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    stretch = 1 + contrast * uniform[:, 0].view(-1, 1, 1, 1)
    shift = brightness * uniform[:, 1].view(-1, 1, 1, 1)
    gains = 1 + gain * uniform[:, 2:].view(-1, 3, 1, 1)
    return (((images - mean) * stretch + mean + shift) * gains).clamp(0, 1)


def affine(images: Tensor, generator: Generator, degrees: float, shift: float, scale: float) -> Tensor:
    """A small turn, shift and change of size for each image, bilinear, edges repeated."""
    uniform = onto(images.device, torch.rand(len(images), 4, generator=generator) * 2 - 1)
    angle, size = uniform[:, 0] * math.radians(degrees), 1 + scale * uniform[:, 1]
    cosine, sine = angle.cos() * size, angle.sin() * size
    moves = uniform[:, 2:] * 2 * shift  # the grid runs from -1 to 1
    rows = [torch.stack([cosine, -sine, moves[:, 0]], 1), torch.stack([sine, cosine, moves[:, 1]], 1)]
    grid: Tensor = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
