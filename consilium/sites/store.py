"""Stage 1, sites. In: image bytes by id and the backbone's preprocessing. Out: all pixels, mapped uint8 [n, H, W, 3].

Each different image is decoded and resized once. A store is a pair of files in the cache folder, named by a hash over
the images' own hashes and all that shapes the pixels: `<key>.npy`, and `<key>.json` with checksum and unreadable rows.
Only one process builds a store; it writes beside the final name and renames when all is on disk, the JSON last, so that
a crash leaves nothing that could be mistaken for a store. The system frees the lock of a process that dies.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from PIL import Image

from consilium.data import Preprocessing, Source, UInt8Array
from consilium.errors import DataError

Progress = Callable[[int, int], None]  # (images done, images in all)
FORMAT = 1
_KEPT_BYTES = 256 * 1024**2
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Store:
    """Pixels, and where to find those of an id."""

    images: UInt8Array  # [n, H, W, 3]
    rows: Mapping[str, int]  # id -> row of images
    hashes: Mapping[str, str]  # id -> SHA-256 of the stored bytes
    corrupt: tuple[str, ...]  # ids without readable pixels, sorted


def default_folder() -> Path:
    """The user's cache folder for decoded images."""
    home = Path.home()
    if "XDG_CACHE_HOME" in os.environ:
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    else:
        base = home / ".cache"
    return base / "consilium" / "images"


class _Reader:
    """The source, with the first bytes read kept for a second look: they are hashed first and decoded afterwards."""

    def __init__(self, source: Source) -> None:
        self.decode = source.decode
        self._source, self._kept, self._room = source, dict[str, bytes](), _KEPT_BYTES

    def content(self, id: str) -> bytes:
        """The stored bytes of one image."""
        if id in self._kept:
            return self._kept[id]
        content = self._source.content(id)
        self._room -= len(content)
        if self._room >= 0:
            self._kept[id] = content
        return content


def _hash_contents(content: Callable[[str], bytes], ids: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the stored bytes of each id; ids whose bytes cannot be read are left out."""
    hashes = {}
    for id in ids:
        try:
            hashes[id] = hashlib.sha256(content(id)).hexdigest()
        except DataError:
            continue
    return hashes


def _hashes(identity: str | None, read: _Reader, ids: Sequence[str], folder: Path) -> dict[str, str]:
    """Hashes of the images' bytes; those of a source with an identity are computed once and lie in the folder."""
    if identity is None:
        return _hash_contents(read.content, ids)
    path = folder / f"{_digest_of(identity)}.hashes.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        kept = json.loads(path.read_text())
        if kept["sha256"] == _digest_of(kept["hashes"]):
            return {id: str(kept["hashes"][id]) for id in ids}
    hashes = _hash_contents(read.content, ids)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):  # they only save time
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"sha256": _digest_of(hashes), "hashes": hashes}))
        partial.replace(path)
    return hashes


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def open_store(
    source: Source,
    ids: Sequence[str],
    preprocessing: Preprocessing,
    *,
    decoding: str = "",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Store:
    """The pixels of `ids`, from the cache where they are there, else decoded now.

    `decoding` names all options of the source that change what its `decode` makes of the same bytes. Raises DataError
    where the cache cannot be written.
    """
    read, folder = _Reader(source), folder or default_folder()
    hashes = _hashes(getattr(source, "identity", None), read, ids, folder)
    id_of = {content_hash: id for id, content_hash in sorted(hashes.items(), reverse=True)}
    order = sorted(id_of)
    path = folder / f"{_key(order, preprocessing, decoding)}.npy"
    try:
        corrupt = _ready(path, lambda: _build(path, read, [id_of[one] for one in order], preprocessing, progress))
    except (OSError, NotImplementedError) as error:
        what = "the store of decoded images cannot be written"
        raise DataError(what, where=str(path.parent), received=str(error), remedy=_remedy(error)) from error
    bad = {order[row] for row in corrupt}
    row_of = {content_hash: row for row, content_hash in enumerate(order) if content_hash not in bad}
    rows = {id: row_of[hashes[id]] for id in ids if hashes.get(id) in row_of}
    return Store(np.load(path, mmap_mode="r"), rows, hashes, tuple(sorted(set(ids) - rows.keys())))


def _remedy(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else 0
    if number in (errno.EEXIST, errno.ENOTDIR):
        return "a file stands where a folder is needed: name another folder in engine.cache"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make this folder writable, or name another in engine.cache"
    full = number in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free some space, or name another folder in engine.cache" if full else "name another folder in engine.cache"


def _ready(path: Path, build: Callable[[], list[int]]) -> list[int]:
    """Rows without readable pixels of the store at `path`, built where it is not there; a read-only cache will do."""
    found = _read_index(path)
    if found is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        found = _read_index(path)
        return build() if found is None else found


def transform_pixels(pixels: UInt8Array, preprocessing: Preprocessing) -> UInt8Array:
    """RGB uint8 [H, W, 3] resized and cropped to [S, S, 3], as timm's evaluation transform does (antialiased).

    center: shorter side to floor(S / crop_fraction), then the middle. squash: both sides to it, then the middle.
    border: longer side to it, then the middle, missing borders filled with the mean colour.
    """
    image, size = Image.fromarray(pixels), preprocessing.image_size
    goal = math.floor(size / preprocessing.crop_fraction)
    resized = image.resize(
        _resized_size(image.size, goal, preprocessing.crop_mode), _FILTERS[preprocessing.interpolation]
    )
    return _crop_or_pad(np.asarray(resized), size, [round(255 * value) for value in preprocessing.mean])


def _resized_size(size: tuple[int, int], goal: int, mode: str) -> tuple[int, int]:
    """Width and height after resizing; the longer side is truncated as torchvision does, or rounded as timm does."""
    if mode == "squash":
        return goal, goal
    if mode == "border":
        ratio = max(size) / goal
        return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))
    width, height = size
    return (goal, int(goal * height / width)) if width <= height else (int(goal * width / height), goal)


def _crop_or_pad(pixels: UInt8Array, size: int, fill: Sequence[int]) -> UInt8Array:
    height, width = pixels.shape[:2]
    result = np.empty((size, size, 3), dtype=np.uint8)
    result[:] = np.asarray(fill, dtype=np.uint8)
    (top, from_top, rows), (left, from_left, columns) = _window(height, size), _window(width, size)
    result[top : top + rows, left : left + columns] = pixels[
        from_top : from_top + rows, from_left : from_left + columns
    ]
    return result


def _window(have: int, want: int) -> tuple[int, int, int]:
    """Where to put, where to take from, and how many."""
    return (0, round((have - want) / 2.0), want) if have >= want else ((want - have) // 2, 0, have)


def _key(order: Sequence[str], preprocessing: Preprocessing, decoding: str) -> str:
    shape = asdict(preprocessing)
    if preprocessing.crop_mode != "border":
        shape.pop("mean")  # only borders are filled with it
    shape.pop("std")
    return _digest_of([FORMAT, shape, decoding, list(order)])


def _read_index(path: Path) -> list[int] | None:
    """Rows without readable pixels; None where there is no whole, undamaged store."""
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        return [int(row) for row in index["corrupt"]] if _checksum(path) == index["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(
    path: Path, source: _Reader, ids: Sequence[str], preprocessing: Preprocessing, progress: Progress | None
) -> list[int]:
    size = preprocessing.image_size
    needed, free = len(ids) * size * size * 3, shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f"{needed:,} bytes are needed, {free:,} are free")
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            corrupt = _write_rows(file, _decoded(source, ids, preprocessing), (len(ids), size, size, 3), progress)
            file.flush()
            os.fsync(file.fileno())
        index = {"sha256": _checksum(partial), "corrupt": corrupt}
        partial.replace(path)
        partial.write_text(json.dumps(index))
        partial.replace(path.with_suffix(".json"))
    finally:
        partial.unlink(missing_ok=True)
    return corrupt


def _write_rows(
    file: BinaryIO, rows: Iterator[UInt8Array | None], shape: tuple[int, ...], progress: Progress | None
) -> list[int]:
    """Write a .npy file row by row (a full disk is then an error, not a signal as with a mapped file)."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    corrupt = []
    for number, pixels in enumerate(rows):
        if pixels is None:
            corrupt.append(number)
        file.write(bytes(math.prod(shape[1:])) if pixels is None else pixels.tobytes())
        if progress is not None:
            progress(number + 1, shape[0])
    return corrupt


def _decoded(source: _Reader, ids: Sequence[str], preprocessing: Preprocessing) -> Iterator[UInt8Array | None]:
    """Pixels in the order of `ids`, None where unreadable; bytes are read here, decoded by a few threads."""

    def decode(content: bytes) -> UInt8Array | None:
        try:
            return transform_pixels(source.decode(content), preprocessing)
        except DataError:
            return None

    num_threads = min(4, os.cpu_count() or 1)
    pending: deque[Future[UInt8Array | None]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for id in ids:
            pending.append(pool.submit(decode, source.content(id)))
            if len(pending) > 4 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
