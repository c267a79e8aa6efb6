"""Common: images and where they come from. In: nothing. Out: the types of a split, a site, a batch, a source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Split = Literal["train", "val", "test"]
UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
StringArray = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Examples:
    """One split at one site. `images`: uint8 [rows of the store, H, W, 3], memory-mapped; `rows` [n] picks from it."""

    images: UInt8Array
    rows: IntArray  # [n] index into images
    labels: IntArray  # [n] class index
    ids: StringArray  # [n] image id
    groups: StringArray  # [n] patient or lesion
    origins: StringArray  # [n] name of the site the row came from (differs from the site's own name when pooled)

    def __len__(self) -> int:
        return len(self.rows)

    def shares(self, other: Examples) -> bool:
        """Whether both pick from the same store."""
        mine, theirs = ((getattr(e.images, "filename", id(e.images)), e.images.shape) for e in (self, other))
        return mine == theirs

    def at(self, positions: IntArray) -> Examples:
        """Some of the images."""
        keys = ("rows", "labels", "ids", "groups", "origins")
        return Examples(self.images, *(getattr(self, key)[positions] for key in keys))

    def and_(self, other: Examples) -> Examples:
        """The images of both, which must share a store."""
        keys = ("rows", "labels", "ids", "groups", "origins")
        return Examples(self.images, *(np.concatenate([getattr(self, key), getattr(other, key)]) for key in keys))


@dataclass(frozen=True)
class SiteData:
    """A hospital's three splits."""

    name: str
    train: Examples
    val: Examples
    test: Examples


@dataclass(frozen=True)
class Batch:
    """`labels` int64 [B]; `rows` int64 [B], positions in the split; `given`: the images, or what loads them."""

    given: Tensor | Callable[[], Tensor]
    labels: Tensor
    rows: Tensor

    @cached_property
    def images(self) -> Tensor:
        """float32 [B, 3, H, W], normalised."""
        return self.given if isinstance(self.given, Tensor) else self.given()


class Source(Protocol):
    """Where images and their table come from.

    An optional attribute `identity` is a text that, with an id, decides an image's bytes (of drawn images, never of
    files): their hashes are then kept in the cache, and nothing is drawn again only to be hashed.
    """

    def records(self) -> Any:
        """A pandas DataFrame with string columns id, label, site, group and, if given by the data, split."""

    def content(self, id: str) -> bytes:
        """The stored bytes of one image; their hash is the image's identity."""

    def decode(self, content: bytes) -> UInt8Array:
        """RGB pixels uint8 [H, W, 3]; DataError where the bytes are no readable image."""


@dataclass(frozen=True)
class Preprocessing:
    """How the weights want their images: pixels / 255, minus mean, over std."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_fraction: float = 1.0
    crop_mode: Literal["center", "squash", "border"] = "center"
