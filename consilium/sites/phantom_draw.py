"""Stage 1, sites. In: what a lesion, its patient and a camera are like. Out: a drawn picture, uint8 [S, S, 3].

Light falls on skin and is absorbed by two pigments: picture = skin * exp(-melanin - blood), then white and blue-white
structures are laid over it. Every sign of a lesion is a field on a plane that turns with the lesion, so that two
photographs of one lesion show the same signs. Lengths: the picture spans -1..1, whatever its size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from consilium.sites.phantom_camera import Camera, Field, Random, UInt8Array, grid, photograph

MELANIN = np.array([0.55, 1.0, 1.35])  # absorption in red, green and blue
BLOOD = np.array([0.12, 1.0, 0.85])
FAIR, DARK = np.array([0.93, 0.76, 0.68]), np.array([0.47, 0.32, 0.25])
VEIL, NEST, WHITE = np.array([0.52, 0.58, 0.70]), np.array([0.33, 0.38, 0.55]), np.array([0.97, 0.93, 0.86])
HAIR, INK = np.array([0.14, 0.10, 0.08]), np.array([0.30, 0.18, 0.52])


@dataclass(frozen=True)
class Lesion:
    """Amount of each sign; 0 is absent."""

    melanin: float
    blood: float
    irregularity: float  # of the border
    softness: float  # of the border
    variegation: float  # unevenness of the pigment
    network: float  # regular pigment network
    broken_network: float
    globules: float
    streaks: float
    veil: float
    milia: float  # white cysts
    nests: float  # blue-grey ovoids
    fissures: float
    vessels: float


@dataclass(frozen=True)
class Patient:
    """What all pictures of one patient share."""

    tone: float  # 0 fair to 1 dark
    hairs: float  # expected number in one picture


@dataclass(frozen=True)
class Plane:
    """Where the lesion's own coordinates u, v lie in the picture's x, y."""

    x: Field
    y: Field
    u: Field
    v: Field
    angle: float
    zoom: float
    shift: tuple[float, float]

    def place(self, points: Field) -> Field:
        """Points [n, 2] of the lesion as points of the picture."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        turned = np.stack([cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]], 1)
        placed: Field = turned * self.zoom + np.array(self.shift)
        return placed


def _plane(shot: Random, size: int) -> Plane:
    x, y = grid(size)
    angle, zoom = float(shot.uniform(0, 2 * np.pi)), float(shot.uniform(0.8, 1.15))
    shift = (float(shot.uniform(-0.18, 0.18)), float(shot.uniform(-0.18, 0.18)))
    dx, dy = (x - shift[0]) / zoom, (y - shift[1]) / zoom
    cos, sin = np.cos(angle), np.sin(angle)
    return Plane(x, y, cos * dx + sin * dy, cos * dy - sin * dx, angle, zoom, shift)


def _noise(random: Random, x: Field, y: Field, cells: float) -> Field:
    """Smooth noise in -1..1, `cells` grid cells to one unit of length; repeats after 16 cells."""
    values = random.uniform(-1, 1, (16, 16)).ravel()
    px, py = x * cells + 32, y * cells + 32
    ix, iy = px.astype(np.int64), py.astype(np.int64)
    fx, fy = px - ix, py - iy
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    left, right = ix & 15, (ix + 1) & 15
    above, below = (iy & 15) * 16, ((iy + 1) & 15) * 16
    top = values[above + left] * (1 - fx) + values[above + right] * fx
    bottom = values[below + left] * (1 - fx) + values[below + right] * fx
    return top * (1 - fy) + bottom * fy


def _dots(points: Field, radius: float, size: int) -> Field:
    """Sum of round soft dots at the points [n, 2] of the picture."""
    line = (np.arange(size) + 0.5) * (2 / size) - 1
    across = np.exp(-(((line[:, None] - points[:, 0]) / radius) ** 2))
    down = np.exp(-(((line[:, None] - points[:, 1]) / radius) ** 2))
    total: Field = np.einsum("in,jn->ij", down, across)
    return total


def _step(values: Field, width: float) -> Field:
    """0 to 1 as the values rise through nothing, smoothly over `width`."""
    ramp = np.clip(values / width + 0.5, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _extent(random: Random, plane: Plane, irregularity: float) -> Field:
    """1 in the lesion's middle, 0 at its border, below 0 outside."""
    radius = random.uniform(0.52, 0.74)
    stretch = random.uniform(0.8, 1.25)
    angle = np.arctan2(plane.v, plane.u)
    border = np.ones_like(angle)
    for order in range(2, 9):
        amount = irregularity * random.standard_normal() / np.sqrt(order - 1)
        border += amount * np.cos(order * angle + random.uniform(0, 2 * np.pi))
    return 1 - np.hypot(plane.u * stretch, plane.v / stretch) / (radius * np.clip(border, 0.4, 1.7))


def _scatter(random: Random, number: int) -> Field:
    """Points [number, 2] spread evenly over a disc about as large as a lesion."""
    angle, distance = random.uniform(0, 2 * np.pi, number), 0.6 * np.sqrt(random.uniform(0, 1, number))
    return np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)


# ------------------------------------------------------------ signs: (random, plane, extent) -> field of about 0..1
def _mesh(random: Random, plane: Plane, warp: float) -> Field:
    pitch = random.uniform(3.8, 5.0)
    bend = warp * _noise(random, plane.u, plane.v, 4)
    u, v = plane.u * pitch + bend, plane.v * pitch - bend
    away = np.minimum(np.abs(np.mod(u + 0.5 * v, 1) - 0.5), np.abs(np.mod(0.87 * v, 1) - 0.5))
    return np.exp(-((away / 0.18) ** 2))


def _network(random: Random, plane: Plane, extent: Field) -> Field:
    return _mesh(random, plane, 0.15) * _step(extent - 0.08, 0.3)


def _broken_network(random: Random, plane: Plane, extent: Field) -> Field:
    patches = _step(_noise(random, plane.u, plane.v, 2.5) + 0.1, 0.4)
    return 1.3 * _mesh(random, plane, 1.1) * patches * _step(extent, 0.2)


def _spots(random: Random, plane: Plane, extent: Field, radius: float) -> Field:
    points = plane.place(_scatter(random, int(random.integers(6, 10))))
    return np.minimum(1.3 * _dots(points, radius * plane.zoom, len(extent)), 1) * _step(extent, 0.2)


def _globules(random: Random, plane: Plane, extent: Field) -> Field:
    return _spots(random, plane, extent, 0.08)


def _streaks(random: Random, plane: Plane, extent: Field) -> Field:
    number = int(random.integers(14, 22))
    sector = _step(_noise(random, plane.u, plane.v, 1.2) + 0.3, 0.5)
    rays = np.maximum(np.cos(number * np.arctan2(plane.v, plane.u) + random.uniform(0, 2 * np.pi)), 0) ** 2
    return rays * sector * np.exp(-(((extent + 0.08) / 0.2) ** 2))


def _veil(random: Random, plane: Plane, extent: Field) -> Field:
    return _step(_noise(random, plane.u, plane.v, 2) + 0.05, 0.6) * _step(extent - 0.25, 0.4)


def _milia(random: Random, plane: Plane, extent: Field) -> Field:
    return _spots(random, plane, extent, 0.075)


def _nests(random: Random, plane: Plane, extent: Field) -> Field:
    return _spots(random, plane, extent, 0.09)


def _fissures(random: Random, plane: Plane, extent: Field) -> Field:
    folds = np.cos(9 * _noise(random, plane.u, plane.v, 3.5) + random.uniform(0, 2 * np.pi))
    return np.maximum(folds, 0) ** 2 * _step(extent, 0.15)


def _vessels(random: Random, plane: Plane, extent: Field) -> Field:
    tree = np.minimum(np.abs(_noise(random, plane.u, plane.v, 3)), 1.3 * np.abs(_noise(random, plane.u, plane.v, 5)))
    return np.exp(-((tree / 0.09) ** 2)) * _step(extent + 0.1, 0.3)


Sign = Callable[[Random, Plane, Field], Field]
PIGMENT: tuple[tuple[str, Sign, float], ...] = (  # sign, how it is drawn, melanin at full strength
    ("network", _network, 1.1),
    ("broken_network", _broken_network, 1.2),
    ("globules", _globules, 1.6),
    ("streaks", _streaks, 1.2),
    ("fissures", _fissures, 1.0),
)
OVERLAY: tuple[tuple[str, Sign, Field], ...] = (
    ("veil", _veil, VEIL),
    ("nests", _nests, NEST),
    ("milia", _milia, WHITE),
)


def _moved(sign: Field, cover: Field) -> Field:
    """The sign less its mean over the lesion: it moves pigment and adds none, so that the mean colour tells little."""
    moved: Field = sign - cover * (float(sign.sum()) / max(float(cover.sum()), 1e-9))
    return moved


def _pigments(random: Random, lesion: Lesion, plane: Plane, extent: Field) -> tuple[Field, Field]:
    """Fields of melanin and blood. Signs that are absent are drawn too, so that one changes no other."""
    cover = _step(extent, 0.08 + lesion.softness)
    uneven = 1 + lesion.variegation * (_noise(random, plane.u, plane.v, 2) + 0.5 * _noise(random, plane.u, plane.v, 5))
    melanin = lesion.melanin * cover * np.clip(uneven, 0.1, 2.5)
    for name, draw, strength in PIGMENT:
        melanin = melanin + strength * getattr(lesion, name) * _moved(draw(random, plane, extent), cover)
    vessels = lesion.vessels * _vessels(random, plane, extent)
    blood = np.maximum(lesion.blood * cover + 1.4 * _moved(vessels, cover), 0)
    return np.maximum(melanin * (1 - 0.7 * np.clip(vessels, 0, 1)), 0), blood


def _with_lesion(random: Random, skin: Field, lesion: Lesion, plane: Plane) -> Field:
    """The skin with the lesion in it."""
    extent = _extent(random, plane, lesion.irregularity)
    melanin, blood = _pigments(random, lesion, plane, extent)
    picture: Field = skin * np.exp(-melanin[..., None] * MELANIN - blood[..., None] * BLOOD)
    shade = float(skin.mean() / FAIR.mean())
    for name, draw, colour in OVERLAY:
        picture = _over(picture, colour * shade, getattr(lesion, name) * draw(random, plane, extent))
    return picture


def _over(picture: Field, colour: Field, opacity: Field) -> Field:
    share = np.clip(opacity, 0, 1)[..., None]
    return picture * (1 - share) + colour * share


def _hairs(shot: Random, picture: Field, plane: Plane, expected: float) -> Field:
    cover = np.zeros_like(plane.x)
    for _ in range(int(shot.poisson(expected))):
        angle, offset, bend = shot.uniform(0, np.pi), shot.uniform(-0.9, 0.9), shot.uniform(-0.4, 0.4)
        along = np.cos(angle) * plane.x + np.sin(angle) * plane.y
        away = np.cos(angle) * plane.y - np.sin(angle) * plane.x - offset - bend * along * along
        cover = np.maximum(cover, np.exp(-((away / 0.022) ** 2)))
    return _over(picture, HAIR, 0.85 * cover)


def _mark(shot: Random, size: int) -> Field:
    """Opacity of a row of ink dots along one edge, as put on the skin before an operation."""
    number = int(shot.integers(4, 7))
    along = np.linspace(-0.6, 0.6, number) + shot.uniform(-0.2, 0.2)
    edge = np.full(number, shot.uniform(0.76, 0.9) * shot.choice([-1, 1]))
    points = np.stack([along, edge] if shot.random() < 0.5 else [edge, along], 1)
    return 0.9 * np.minimum(1.5 * _dots(points, 0.075, size), 1)


def draw(
    patient: Patient, lesion: Lesion, camera: Camera, *, marked: bool, size: int, randoms: tuple[Random, Random]
) -> UInt8Array:
    """One photograph, uint8 [size, size, 3]. `randoms`: the lesion's own generator and that of this shot."""
    own, shot = randoms
    plane = _plane(shot, size)
    texture = 1 + 0.05 * _noise(shot, plane.x, plane.y, 6) + 0.03 * _noise(shot, plane.x, plane.y, 14)
    skin = (FAIR + patient.tone * (DARK - FAIR)) * texture[..., None]
    picture = _with_lesion(own, skin, lesion, plane)
    picture = _hairs(shot, picture, plane, patient.hairs)
    return photograph(shot, _over(picture, INK, marked * _mark(shot, size)), camera)
