"""Stage 1, sites. In: a picture as light would show it, [S, S, 3] in 0..1. Out: the pixels a camera stores, uint8."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float64]  # [S, S], or [S, S, 3] for a picture
UInt8Array = npt.NDArray[np.uint8]
Random = np.random.Generator


@dataclass(frozen=True)
class Camera:
    """How a site photographs: what stands between the skin and the stored pixels."""

    gain: tuple[float, float, float]  # of red, green and blue
    blur: float  # standard deviation as a share of the picture's width
    vignette: float  # share of light lost in the corners
    slope: float  # largest change of light across the picture
    gamma: float
    noise: float  # standard deviation, 1 is white
    quality: int  # quantisation step of the blocks' coefficients, in grey levels; 0: none


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[Field, Field]:
    line = (np.arange(size) + 0.5) * (2 / size) - 1
    x, y = np.meshgrid(line, line)
    return x, y


def _blurred(picture: Field, width: float) -> Field:
    """Gaussian blur of standard deviation `width` in pixels; sums in a fixed order, without a matrix library."""
    reach = int(np.ceil(3 * width))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(width, 1e-3)) ** 2)
    for axis in (0, 1):
        around = [(reach, reach) if axis == other else (0, 0) for other in range(3)]
        rows = np.moveaxis(np.pad(picture, around, mode="edge"), axis, 0)
        total = sum(weight * rows[start : start + len(picture)] for start, weight in enumerate(weights / weights.sum()))
        picture = np.moveaxis(np.asarray(total), 0, axis)
    return picture


@lru_cache(maxsize=1)
def _cosines() -> npt.NDArray[np.int64]:
    """The 8-point cosine transform as integers (times 4096), so that blocks are the same on every machine."""
    place = np.arange(8)
    rows = np.cos(np.pi * (2 * place + 1) * place[:, None] / 16) * np.where(place[:, None] == 0, np.sqrt(1 / 8), 0.5)
    return np.round(4096 * rows).astype(np.int64)


def _compressed(pixels: UInt8Array, step: int) -> UInt8Array:
    """Keep the 8 x 8 cosine coefficients of each channel in multiples of `step` (more for fine ones), as JPEG does."""
    size, base = len(pixels), _cosines()
    edge = -size % 8
    whole = np.pad(pixels, ((0, edge), (0, edge), (0, 0)), mode="edge").astype(np.int64)
    blocks = whole.reshape(len(whole) // 8, 8, -1, 8, 3).transpose(0, 2, 4, 1, 3)
    order = np.arange(8)
    steps = (step * (2 + order[:, None] + order)) << 23
    coefficients = base @ blocks @ base.T
    kept = (2 * coefficients + steps) // (2 * steps) * steps
    back = (base.T @ kept @ base + (1 << 47)) >> 48
    stored: UInt8Array = np.clip(back.transpose(0, 3, 1, 4, 2).reshape(whole.shape)[:size, :size], 0, 255).astype(
        np.uint8
    )
    return stored


def photograph(shot: Random, picture: Field, camera: Camera) -> UInt8Array:
    """Pixels uint8 [S, S, 3] that the camera stores of a picture [S, S, 3] in 0..1."""
    size = len(picture)
    x, y = grid(size)
    slope = shot.uniform(-camera.slope, camera.slope, 2)
    light = (1 + slope[0] * x + slope[1] * y) * (1 - camera.vignette * np.clip(x * x + y * y, 0, 2) / 2)
    seen = picture * light[..., None] * (np.array(camera.gain) * shot.uniform(0.88, 1.12))
    seen = _blurred(seen, camera.blur * size)
    seen = np.clip(seen, 0, 1) ** camera.gamma + camera.noise * shot.standard_normal(seen.shape)
    pixels: UInt8Array = np.clip(np.round(255 * seen), 0, 255).astype(np.uint8)
    return _compressed(pixels, camera.quality) if camera.quality else pixels
