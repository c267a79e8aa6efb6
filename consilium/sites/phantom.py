"""Stage 1, sites. In: a few numbers. Out: a drawn, dermoscopy-like data set of hospitals, without files or network.

As physicists test a scanner with a phantom, so a federation can be tested with images of which everything is known.
Four classes of lesion differ in how often they show a sign (`SIGNS`), none in one sign alone. Sites differ in camera,
light, skin, class mix and size. Ink dots at the edge are a sign of carcinoma at one site (`MARKED_SITE`) and mean
nothing elsewhere.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from consilium import registry, seeds
from consilium.data import UInt8Array
from consilium.errors import DataError
from consilium.sites import phantom_camera, phantom_draw
from consilium.sites.phantom_camera import Camera
from consilium.sites.phantom_draw import Lesion, Patient, draw

CLASSES = ("carcinoma", "keratosis", "melanoma", "naevus")
MARKED_SITE = "harbour"

# how often a lesion of each class shows a sign
SIGNS: Mapping[str, tuple[float, float, float, float]] = {
    "network": (0.10, 0.15, 0.25, 0.80),
    "broken_network": (0.05, 0.05, 0.45, 0.10),
    "globules": (0.10, 0.10, 0.80, 0.20),
    "streaks": (0.05, 0.05, 0.45, 0.05),
    "veil": (0.20, 0.05, 0.40, 0.05),
    "milia": (0.05, 0.90, 0.05, 0.05),
    "nests": (0.90, 0.05, 0.10, 0.05),
    "fissures": (0.05, 0.40, 0.10, 0.05),
    "vessels": (0.60, 0.05, 0.10, 0.10),
}
# mean of each class and spread within a class
AMOUNTS: Mapping[str, tuple[tuple[float, float, float, float], float]] = {
    "melanin": ((0.65, 0.70, 0.75, 0.70), 0.25),
    "blood": ((0.25, 0.20, 0.20, 0.20), 0.15),
    "irregularity": ((0.10, 0.09, 0.12, 0.08), 0.04),
    "softness": ((0.22, 0.18, 0.22, 0.22), 0.10),
    "variegation": ((0.35, 0.35, 0.45, 0.35), 0.15),
}


class PhantomOptions(registry.Options):
    """How many pictures of how many sites. `difficulty` moves the classes' signs to their mean; at 1 none differ."""

    num_images: int = Field(default=1600, ge=1)  # in total
    num_sites: int = Field(default=4, ge=1)
    image_size: int = Field(default=64, ge=16)  # pixels; 64 is what the embedded backbone takes
    difficulty: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=0, ge=0)  # of the pictures; the run's own seed changes none of them

    @model_validator(mode="after")
    def _enough(self) -> PhantomOptions:
        if self.num_images < self.num_sites:
            raise ValueError("num_images must be at least num_sites")
        return self


@dataclass(frozen=True)
class PhantomSite:
    """A drawn hospital."""

    name: str
    weight: float  # share of the images, up to a common factor
    mix: tuple[float, ...]  # share of each class
    tone: tuple[float, float]  # mean and spread of the patients' skin, 0 fair to 1 dark
    hairs: float  # expected number in one picture
    camera: Camera
    marks: tuple[float, ...]  # how often a lesion of each class has ink dots beside it


EVERYWHERE = (0.3, 0.3, 0.3, 0.3)
CAMERAS = (  # gain, blur, vignette, slope, gamma, noise, quality
    Camera((1.00, 0.99, 0.97), 0.008, 0.25, 0.10, 1.00, 0.010, 0),
    Camera((1.06, 0.95, 0.84), 0.014, 0.55, 0.15, 0.90, 0.020, 3),
    Camera((0.86, 0.95, 1.05), 0.018, 0.10, 0.25, 1.15, 0.025, 5),
    Camera((0.95, 1.02, 0.92), 0.012, 0.70, 0.05, 0.80, 0.040, 2),
)
FOUR = (
    PhantomSite("alpine", 0.34, (0.15, 0.25, 0.20, 0.40), (0.15, 0.10), 1.0, CAMERAS[0], EVERYWHERE),
    PhantomSite(MARKED_SITE, 0.28, (0.35, 0.20, 0.20, 0.25), (0.35, 0.15), 1.0, CAMERAS[1], (0.9, 0.1, 0.1, 0.1)),
    PhantomSite("prairie", 0.22, (0.20, 0.35, 0.15, 0.30), (0.60, 0.15), 1.5, CAMERAS[2], EVERYWHERE),
    PhantomSite("summit", 0.16, (0.20, 0.15, 0.45, 0.20), (0.25, 0.20), 0.5, CAMERAS[3], EVERYWHERE),
)


def site_list(num_sites: int, seed: int) -> tuple[PhantomSite, ...]:
    """The first sites are `FOUR`; further ones are drawn from the seed and their own name."""
    return (*FOUR, *(_further(number, seed) for number in range(len(FOUR), num_sites)))[:num_sites]


def _further(number: int, seed: int) -> PhantomSite:
    name = f"site-{number + 1:02d}"
    random = seeds.numpy_generator(seed, site=name, purpose="phantom site")
    gain = random.uniform(0.85, 1.08, 3)
    camera = Camera(
        gain=(float(gain[0]), float(gain[1]), float(gain[2])),
        blur=float(random.uniform(0.006, 0.018)),
        vignette=float(random.uniform(0, 0.7)),
        slope=float(random.uniform(0, 0.25)),
        gamma=float(random.uniform(0.8, 1.2)),
        noise=float(random.uniform(0.005, 0.04)),
        quality=int(random.integers(0, 6)),
    )
    mix = tuple(float(share) for share in random.dirichlet(np.full(len(CLASSES), 5.0)))
    tone = (float(random.uniform(0.1, 0.7)), float(random.uniform(0.05, 0.2)))
    weight, hairs = float(random.uniform(0.1, 0.35)), float(random.uniform(0, 3))
    return PhantomSite(name, weight, mix, tone, hairs, camera, EVERYWHERE)


@dataclass(frozen=True)
class Shot:
    """One planned picture: everything that decides it, beside the options."""

    id: str
    group: str
    site: PhantomSite
    lesion: str  # name of the lesion, which several pictures may show
    label: int


def _sizes(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, at least 1 each, in about the given proportions."""
    shares = np.array(weights) / sum(weights) * (total - len(weights))
    sizes = np.floor(shares).astype(np.int64) + 1
    rest = np.argsort(sizes - 1 - shares, kind="stable")[: total - int(sizes.sum())]
    sizes[rest] += 1
    return [int(size) for size in sizes]


def _plan(site: PhantomSite, num_images: int, seed: int) -> list[Shot]:
    """The site's patients, each with one to three pictures; a second picture is often of the same lesion."""
    random = seeds.numpy_generator(seed, site=site.name, purpose="phantom plan")
    counts, shots, patient = np.zeros(len(CLASSES)), list[Shot](), 0
    while len(shots) < num_images:
        patient += 1
        for picture in range(min(int(random.integers(1, 4)), num_images - len(shots))):
            if picture == 0 or random.random() < 0.5:
                wanted = np.array(site.mix) * (len(shots) + 1) - counts + random.uniform(0, 1, len(CLASSES))
                lesion, label = f"{site.name}-{patient:04d}-{picture}", int(np.argmax(wanted))
            counts[label] += 1
            shots.append(Shot(f"{site.name}-{len(shots):05d}", f"{site.name}-p{patient:04d}", site, lesion, label))
    return shots


def lesion_signs(random: np.random.Generator, label: int, difficulty: float) -> Lesion:
    """Draw what a lesion of a class shows."""

    def of(values: Sequence[float]) -> float:
        mean = sum(values) / len(values)
        return values[label] + difficulty * (mean - values[label])

    shown = {sign: float(random.random() < of(often)) * random.uniform(0.6, 1.1) for sign, often in SIGNS.items()}
    drawn = {name: of(means) + spread * float(random.standard_normal()) for name, (means, spread) in AMOUNTS.items()}
    return Lesion(**shown, **{name: max(0.0, value) for name, value in drawn.items()})


@registry.register("sources", "phantom", options=PhantomOptions, summary="drawn lesions at drawn hospitals")
class Phantom:
    """The source `phantom`: a picture is a function of the options and its id."""

    def __init__(self, options: PhantomOptions) -> None:
        self._options = options

    @property
    def identity(self) -> str:
        """The options, and the code and the library that draw."""
        code = hashlib.sha256()
        for module in (phantom_camera, phantom_draw, seeds, sys.modules[__name__]):
            code.update(Path(str(module.__file__)).read_bytes())
        return f"phantom {self._options.model_dump_json()} {np.__version__} {code.hexdigest()}"

    @cached_property
    def _shots(self) -> dict[str, Shot]:
        sites = site_list(self._options.num_sites, self._options.seed)
        sizes = _sizes([site.weight for site in sites], self._options.num_images)
        plans = [_plan(site, size, self._options.seed) for site, size in zip(sites, sizes, strict=True)]
        return {shot.id: shot for plan in plans for shot in plan}

    def records(self) -> Any:
        """DataFrame of string columns id, label, site, group; one row a picture."""
        import pandas as pd

        rows = [(shot.id, CLASSES[shot.label], shot.site.name, shot.group) for shot in self._shots.values()]
        return pd.DataFrame(rows, columns=["id", "label", "site", "group"], dtype=str)

    def content(self, id: str) -> bytes:
        """One picture as binary PPM: lossless, the same bytes whatever the version of an image library."""
        if id not in self._shots:
            raise DataError("the phantom has no picture of this id", allowed="an id of its records", received=id)
        size = self._options.image_size
        return b"P6\n%d %d\n255\n" % (size, size) + self._draw(self._shots[id]).tobytes()

    def decode(self, content: bytes) -> UInt8Array:
        """Pixels uint8 [S, S, 3] of `content`; DataError for other bytes."""
        kind, _, rest = content.partition(b"\n")
        sides, _, rest = rest.partition(b"\n")
        depth, _, pixels = rest.partition(b"\n")
        width, height = (int(side) if side.isdigit() else 0 for side in [*sides.split(), b"", b""][:2])
        if (kind, depth) != (b"P6", b"255") or not pixels or len(pixels) != 3 * width * height:
            raise DataError("these bytes are no picture", allowed="binary PPM of 8 bit", received=repr(content[:16]))
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)

    def _draw(self, shot: Shot) -> UInt8Array:
        def random(name: str, what: str) -> np.random.Generator:
            return seeds.numpy_generator(self._options.seed, site=shot.site.name, purpose=f"phantom {what} {name}")

        site, patient = shot.site, random(shot.group, "patient")
        own, taken = random(shot.lesion, "lesion"), random(shot.id, "shot")
        skin = Patient(float(np.clip(patient.normal(*site.tone), 0, 1)), site.hairs * float(patient.uniform(0, 2)))
        lesion = lesion_signs(own, shot.label, self._options.difficulty)
        marked = bool(patient.random() < site.marks[shot.label])
        return draw(skin, lesion, site.camera, marked=marked, size=self._options.image_size, randoms=(own, taken))
