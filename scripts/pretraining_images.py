"""Images for the pre-training of the embedded backbone. In: a seed and a step. Out: a batch of scenes and their labels.

Every scene is a background with one to four equal figures. Figures are regular (polygons, stars, rings, spirals ...),
fillings are periodic (gratings, checks, rings ...) or noise: nothing here resembles skin, hair, a lesion or the marks
of a dermatoscope, so that the phantom data set stays new to the backbone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Labels = dict[str, npt.NDArray[np.int64]]

TAU = np.float32(2 * np.pi)
MAX_FIGURES = 4
UNKNOWN = -100
TASKS = {
    "figure": 12,
    "filling": 10,
    "ground": 10,
    "hue": 8,
    "ground_hue": 8,
    "count": MAX_FIGURES,
    "size": 4,
    "edge": 3,
}
TASKS |= {"angle": 6, "scale": 4, "contrast": 4, "order": 2}


# ---------------------------------------------------------------------------------- figures: signed extent, > 0 inside
def _polygon(corners: int) -> Callable[[Array, Array], Array]:
    half = np.float32(np.pi / corners)

    def extent(radius: Array, angle: Array) -> Array:
        return np.cos(half) / np.cos(np.mod(angle, 2 * half) - half) - radius

    return extent


def _petals(count: int, depth: float) -> Callable[[Array, Array], Array]:
    return lambda radius, angle: 1 - depth + depth * np.cos(count * angle) - radius


def _cross(radius: Array, angle: Array) -> Array:
    x, y = np.abs(radius * np.cos(angle)), np.abs(radius * np.sin(angle))
    return np.maximum(np.minimum(1 - x, 0.3 - y), np.minimum(1 - y, 0.3 - x))


def _spiral(radius: Array, angle: Array) -> Array:
    return np.minimum(0.25 - np.abs(np.mod(2.5 * radius - angle / TAU, 1) - 0.5), 1 - radius)


def _crescent(radius: Array, angle: Array) -> Array:
    x, y = radius * np.cos(angle) - 0.45, radius * np.sin(angle)
    return np.minimum(1 - radius, np.sqrt(x * x + y * y) - 0.8)


def _bar(radius: Array, angle: Array) -> Array:
    return np.minimum(1 - np.abs(radius * np.cos(angle)), 0.28 - np.abs(radius * np.sin(angle)))


FIGURES: tuple[Callable[[Array, Array], Array], ...] = (
    lambda radius, angle: 1 - radius + 0 * angle,
    _polygon(3),
    _polygon(4),
    _polygon(6),
    _petals(5, 0.25),
    _petals(3, 0.3),
    lambda radius, angle: 0.2 - np.abs(radius - 0.75) + 0 * angle,
    _cross,
    _spiral,
    _crescent,
    _bar,
    _petals(9, 0.12),
)


# ------------------------------------------------------------------------- fillings: brightness -1..1 over (u, v) and w
def _wave(phase: Array) -> Array:
    return np.sin(TAU * phase)


FILLINGS: tuple[Callable[[Array, Array, Array], Array], ...] = (
    lambda u, _v, _w: 0 * u,
    lambda u, _v, _w: _wave(u),
    lambda u, _v, _w: np.sign(_wave(u)),
    lambda u, v, _w: np.sign(_wave(u / 2) * _wave(v / 2)),
    lambda u, v, _w: _wave(u) * _wave(v),
    lambda u, v, _w: _wave(np.sqrt(u * u + v * v)),
    lambda u, _v, _w: 2 * np.mod(u, 1) - 1,
    lambda u, v, _w: np.sign(np.mod(v + np.abs(np.mod(u, 1) - 0.5), 1) - 0.5),
    lambda _u, _v, w: 1.6 * w,
    lambda u, v, _w: np.sign(np.mod(u, 1) - 0.8) * np.sign(np.mod(v + 0.5 * np.floor(u), 1) - 0.8),
)


def _noise(rng: np.random.Generator, count: int, size: int, cells: npt.NDArray[np.int64]) -> Array:
    """Smooth noise [count, size, size] in about -1..1 with `cells` [count] grid cells along a side."""
    grid = rng.uniform(-1, 1, (count, 18, 18)).astype(np.float32)
    place = np.arange(size, dtype=np.float32)[None] * (cells[:, None] / np.float32(size))
    low = place.astype(np.int64)
    part = (place - low) ** 2 * (3 - 2 * (place - low))
    rows = np.take_along_axis(grid, low[:, :, None], 1) * (1 - part[:, :, None])
    rows += np.take_along_axis(grid, low[:, :, None] + 1, 1) * part[:, :, None]
    columns = np.take_along_axis(rows, low[:, None], 2) * (1 - part[:, None])
    return columns + np.take_along_axis(rows, low[:, None] + 1, 2) * part[:, None]


def _colour(hue: Array, saturation: Array, value: Array) -> Array:
    """Colours [n, 3] from hue, saturation and value [n] in 0..1."""
    ramp = np.abs(np.mod(hue[:, None] + np.array([0, 2 / 3, 1 / 3], np.float32), 1) * 6 - 3) - 1
    return value[:, None] * (1 - saturation[:, None] * (1 - np.clip(ramp, 0, 1)))


def _column(values: npt.ArrayLike) -> Array:
    return np.asarray(values, np.float32)[:, None, None]


def _choose(functions: tuple[Callable[..., Array], ...], which: npt.NDArray[np.int64], *fields: Array) -> Array:
    """Row i of the result is `functions[which[i]]` of row i of the fields."""
    result = np.empty_like(fields[0])
    for index, function in enumerate(functions):
        rows = np.flatnonzero(which == index)
        if len(rows):
            result[rows] = function(*(field[rows] for field in fields))
    return result


def _filled(rng: np.random.Generator, kind: npt.NDArray[np.int64], angle: Array, scale: Array, size: int) -> Array:
    """One filling per scene [n, size, size]: its kind, direction (radians) and number of periods across the image."""
    y, x = np.meshgrid(*(np.linspace(-0.5, 0.5, size, dtype=np.float32),) * 2, indexing="ij")
    shift = rng.uniform(0, 1, (2, len(kind))).astype(np.float32)
    u = _column(scale) * (np.cos(_column(angle)) * x + np.sin(_column(angle)) * y) + _column(shift[0])
    v = _column(scale) * (np.cos(_column(angle)) * y - np.sin(_column(angle)) * x) + _column(shift[1])
    w = _noise(rng, len(kind), size, np.clip(np.round(1.5 * scale), 2, 16).astype(np.int64))
    return _choose(FILLINGS, kind, u, v, w)


def _place(rng: np.random.Generator, labels: Labels, size: int) -> Array:
    """Cover [n, size, size] in 0..1 of all figures of a scene: the union of `count` copies in four quadrants."""
    count = len(labels["count"])
    y, x = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32),) * 2, indexing="ij")
    radius = (0.18 + 0.09 * labels["size"] + rng.uniform(0, 0.09, count)).astype(np.float32)
    alone = labels["count"] == 0
    radius = np.where(alone, 1.5 * radius, radius)
    quadrants = rng.permuted(np.tile(np.arange(MAX_FIGURES), (count, 1)), axis=1)
    best = np.full((count, size, size), -np.inf, np.float32)
    for copy in range(MAX_FIGURES):
        spread = np.where(alone, 0.35, 0.12)[None] * rng.uniform(-1, 1, (2, count))
        home = np.where(alone, 0, 0.48) * (2 * np.stack([quadrants[:, copy] // 2, quadrants[:, copy] % 2]) - 1)
        dx, dy = x - _column(home[1] + spread[1]), y - _column(home[0] + spread[0])
        angle = np.arctan2(dy, dx) + _column(rng.uniform(0, TAU, count))
        extent = _choose(FIGURES, labels["figure"], np.hypot(dx, dy) / _column(radius), angle)
        best = np.where(_column(labels["count"]) >= copy, np.maximum(best, extent), best)
    width = np.array([0.04, 0.25, 0.7], np.float32)[labels["edge"]] + 2 / (size * radius)
    return np.clip(best / _column(width) + 0.5, 0, 1)


def _labels(rng: np.random.Generator, count: int) -> Labels:
    return {task: rng.integers(0, number, count) for task, number in TASKS.items()}


def _visible(labels: Labels) -> Labels:
    """Labels, UNKNOWN where the picture cannot show them: a plain filling has no contrast, rings have no direction."""
    without = {"angle": (0, 3, 4, 5, 8), "scale": (0,), "contrast": (0,)}
    hidden = {task: np.isin(labels["filling"], fillings) for task, fillings in without.items()}
    return {task: np.where(hidden.get(task, False), UNKNOWN, label) for task, label in labels.items()}


def _paint(rng: np.random.Generator, labels: Labels, hue: str, field: Array, contrast: Array) -> Array:
    """Colour a field of brightness [n, H, W] with two tones of one hue: [n, H, W, 3]."""
    count = len(field)
    tone = ((labels[hue] + rng.uniform(-0.3, 0.3, count)) / TASKS[hue]).astype(np.float32)
    saturation = rng.uniform(0.35, 0.95, count).astype(np.float32)
    value = rng.uniform(0.45, 0.9, count).astype(np.float32)
    colour = _colour(tone, saturation, value)[:, None, None]
    return colour * (1 + _column(contrast)[..., None] * field[..., None])


def draw(seed: int, step: int, count: int, size: int) -> tuple[npt.NDArray[np.uint8], Labels]:
    """`count` scenes uint8 [count, size, size, 3] and, per task of TASKS, int64 labels [count]."""
    rng = np.random.default_rng([seed, step])
    labels = _labels(rng, count)
    angle = (labels["angle"] + rng.uniform(-0.4, 0.4, count)) * np.pi / TASKS["angle"]
    scale = 3 * 1.55 ** (labels["scale"] + rng.uniform(-0.4, 0.4, count))
    contrast = 0.12 + 0.13 * labels["contrast"] + rng.uniform(0, 0.1, count)
    inside = _filled(rng, labels["filling"], angle, scale, size)
    ground = _filled(rng, labels["ground"], rng.uniform(0, np.pi, count), rng.uniform(3, 12, count), size)
    figure = _paint(rng, labels, "hue", inside, contrast)
    paper = _paint(rng, labels, "ground_hue", ground, rng.uniform(0.05, 0.4, count))
    darker, lighter = np.minimum(figure.mean((1, 2, 3)), 0.45), np.maximum(figure.mean((1, 2, 3)), 0.55)
    goal = np.where(labels["order"] == 0, lighter + 0.1, darker - 0.1)
    paper *= (goal / paper.mean((1, 2, 3)))[:, None, None, None].astype(np.float32)
    cover = _place(rng, labels, size)[..., None]
    image = _camera(rng, cover * figure + (1 - cover) * paper)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), _visible(labels)


def _camera(rng: np.random.Generator, image: Array) -> Array:
    """Exposure, a colour cast, a slope of light and pixel noise, so that features do not hang on absolute values."""
    count, size = len(image), image.shape[1]
    gain = rng.uniform(0.8, 1.2, (count, 1, 1, 1)) * rng.uniform(0.9, 1.1, (count, 1, 1, 3))
    y, x = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32),) * 2, indexing="ij")
    slope = rng.uniform(-0.15, 0.15, (2, count))
    light = 1 + _column(slope[0]) * x + _column(slope[1]) * y
    noise = rng.standard_normal(image.shape, np.float32) * rng.uniform(0, 0.06, (count, 1, 1, 1)).astype(np.float32)
    return (image * gain.astype(np.float32) * light[..., None] + noise).astype(np.float32)
