"""Stage 1, sites. In: a folder or zip of PNG, JPEG or TIFF files. Out: bytes by image id, and RGB uint8 [H, W, 3].

How pixels become RGB, never by a contrast that depends on the image: grey is repeated three times; palettes are looked
up; transparent images are laid on black; of a 16-bit value the high byte is kept, of a camera with fewer significant
bits (12, say) the highest eight of those; white-is-zero TIFFs are inverted; the camera's orientation tag is applied; of
a colour TIFF with extra channels the first three count. Floating-point, signed, 16-bit planar and multi-page files are
refused, since any choice of window or page would be a guess.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from consilium.data import UInt8Array
from consilium.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


class Archive:
    """The image files below a folder or inside a zip, by path relative to it; hidden files are passed over."""

    def __init__(self, location: Path) -> None:
        self.location = location
        self._zip: zipfile.ZipFile | None = None
        if location.is_dir():
            found = [path.relative_to(location).as_posix() for path in _walk(location)]
        elif zipfile.is_zipfile(location):
            self._zip = zipfile.ZipFile(location)
            found = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        else:
            remedy = "give the path of a folder or of a zip file"
            raise DataError("there is no folder or zip of images here", received=str(location), remedy=remedy)
        self.paths = tuple(sorted(path for path in found if _is_image(path)))

    def read(self, path: str) -> bytes:
        """The bytes of one file."""
        try:
            return self._zip.read(path) if self._zip else (self.location / path).read_bytes()
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            where = f"{self.location}: {path}"
            raise DataError("this image file cannot be read", where=where, received=str(error)) from error

    def resolve(self, ids: Sequence[str]) -> dict[str, str]:
        """The path of each id; DataError where an id fits no file, several files, or the file of another id.

        An id fits a file whose path, with or without extension, is the id or ends with `/id`. A whole path wins.
        """
        index = _by_stem(self.paths)
        matches = {id: _matches(id, index) for id in ids}
        self._complain("image files are missing", [id for id, paths in matches.items() if not paths])
        several = [f"{id} ({', '.join(paths[:3])})" for id, paths in matches.items() if len(paths) > 1]
        self._complain("image ids fit several files", several, "write the whole path inside the folder or zip")
        chosen = {id: paths[0] for id, paths in matches.items()}
        self._complain("several ids mean the same image file", _shared(chosen))
        return chosen

    def _complain(self, what: str, items: Sequence[str], remedy: str | None = None) -> None:
        if items:
            raise DataError(f"{len(items)} {what}", where=str(self.location), received=first_few(items), remedy=remedy)


def first_few(items: Iterable[object], count: int = 5) -> str:
    """The first items as text, and how many more there are."""
    texts = [str(item) for item in items]
    more = f" ... and {len(texts) - count} more" if len(texts) > count else ""
    return ", ".join(texts[:count]) + more


_UNREADABLE = "this is not a readable PNG, JPEG or TIFF image"


def decode(content: bytes, bits: int = 16) -> UInt8Array:
    """RGB pixels uint8 [H, W, 3]; DataError where the bytes are no readable image of a supported kind.

    `bits`: how many bits of 16-bit grey pixels are significant, 8 to 16; larger values are cut off at white.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_supported(image, bits)
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image), bits, _is_inverted(image)), dtype=np.uint8)
    except UnidentifiedImageError as error:  # its own text names an object in memory
        raise DataError(_UNREADABLE) from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(_UNREADABLE, received=str(error)) from error


def _walk(root: Path) -> Iterable[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder) / name for name in names)


def _is_image(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return path.lower().endswith(SUFFIXES) and not any(part.startswith((".", "__MACOSX")) for part in parts)


def _by_stem(paths: Sequence[str]) -> Mapping[str, list[str]]:
    index: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        for key in {PurePosixPath(path).name, PurePosixPath(path).stem}:
            index[key].append(path)
    return index


def _matches(id: str, index: Mapping[str, list[str]]) -> list[str]:
    candidates = index.get(id.rsplit("/", 1)[-1], [])
    if id in candidates:
        return [id]
    return [path for path in candidates if f"/{path}".endswith(f"/{id}") or f"/{_bare(path)}".endswith(f"/{id}")]


def _bare(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _shared(chosen: Mapping[str, str]) -> list[str]:
    ids: dict[str, list[str]] = defaultdict(list)
    for id, path in chosen.items():
        ids[path].append(id)
    return [f"{path} ({', '.join(names)})" for path, names in ids.items() if len(names) > 1]


def _check_supported(image: Image.Image, bits: int) -> None:
    if image.format not in ("PNG", "JPEG", "MPO", "TIFF"):
        raise ValueError(f"the format is {image.format}")
    if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"the file has {getattr(image, 'n_frames', 1)} pages")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"floating-point, signed and 32-bit pixels have no agreed scale (mode {image.mode})")
    if not image.mode.startswith("I"):
        _check_colour(image, bits)


def _check_colour(image: Image.Image, bits: int) -> None:
    is_deep = ";16" in str(getattr(image, "tile", ""))
    depth = _tag(image, _BITS_PER_SAMPLE)
    if depth is not None and max(depth) > 8 and not is_deep:
        raise ValueError("16-bit colours lie in planes one after the other; save the file with interleaved channels")
    if is_deep and bits != 16:
        raise ValueError(f"{bits} significant bits can be chosen for grey images only, this one has colours of 16 bits")


def _tag(image: Image.Image, number: int) -> tuple[int, ...] | None:
    value = image.tag_v2.get(number) if image.format == "TIFF" else None  # type: ignore[attr-defined]
    return value if value is None or isinstance(value, tuple) else (value,)


def _is_inverted(image: Image.Image) -> bool:
    return image.mode.startswith("I") and _tag(image, _PHOTOMETRIC) == (_WHITE_IS_ZERO,)  # Pillow inverts 8 bits itself


def _to_rgb(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    if image.mode.startswith("I"):
        high = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        return Image.fromarray(255 - high if inverted else high).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, (0, 0, 0, 255)), colour).convert("RGB")
    return image.convert("RGB")
