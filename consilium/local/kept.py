"""Stage 4, local training: prefixes on disk. In: tokens, chunk by chunk. Out: the same, mapped, in later rounds.

A pair of files named by a hash over all that the bits depend on: `<key>.bin`, and `<key>.json` with type, shape and
checksum, written last. Only a cache: what is missing, damaged or has no room is computed again, and nobody is told.
The folder holds at most `BUDGET` bytes and leaves `RESERVE` of the disk free; what no run read for a day goes first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BUDGET = 64 * 1024**3  # bytes
RESERVE = 4 * 1024**3
IDLE = 24 * 3600  # seconds
_whole: dict[Path, tuple[object, ...]] = {}  # files whose checksum this process has verified


def load(path: Path) -> Tensor | None:
    """The tensor at `path`, mapped; None where there is no whole, undamaged one."""
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        state = path.stat()
        mark = (state.st_ino, state.st_size, state.st_mtime_ns, index["sha256"], index["dtype"], tuple(index["shape"]))
        if _whole.get(path) != mark and _sealed(index, _checksum(path)) != index["sha256"]:
            return None
        _whole[path] = mark
        with suppress(OSError):
            os.utime(path.with_suffix(".json"))
        return _mapped(path, index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None


def _mapped(path: Path, index: dict[str, Any]) -> Tensor:
    raw = np.memmap(path, dtype=np.uint8, mode="c")  # "c": a write would stay in memory, and torch does not warn
    return torch.from_numpy(raw).view(getattr(torch, index["dtype"])).view(index["shape"])


def write(path: Path, chunks: Iterable[Tensor], size: int) -> Tensor | None:
    """Write rows as they come, about `size` bytes in all, and give them back mapped; None where there is no room."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _make_room(path.parent, size):
            return None
        index = _write(partial, chunks)
        partial.replace(path)
        partial.write_text(json.dumps(index))
        partial.replace(path.with_suffix(".json"))
    except OSError:
        return None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return load(path)


def _write(path: Path, chunks: Iterable[Tensor]) -> dict[str, Any]:
    total, rows, shape, dtype = hashlib.sha256(), 0, list[int](), ""
    with path.open("wb") as file:
        for chunk in chunks:
            data = chunk.contiguous().view(-1).view(torch.uint8).numpy().data
            file.write(data)
            total.update(data)
            rows, shape, dtype = rows + len(chunk), list(chunk.shape[1:]), str(chunk.dtype).removeprefix("torch.")
    index = {"dtype": dtype, "shape": [rows, *shape]}
    return {**index, "sha256": _sealed(index, total.hexdigest())}


def _sealed(index: Mapping[str, Any], checksum: str) -> str:
    """Covers type and shape beside the bytes."""
    return hashlib.sha256(json.dumps([index["dtype"], index["shape"], checksum]).encode()).hexdigest()


def _make_room(folder: Path, size: int) -> bool:
    """Whether so many bytes may be written now, once what is old has gone."""
    files = {path: path.stat() for path in folder.glob("*.bin")}
    used = sum(state.st_size for state in files.values()) + _unfinished(folder)
    last = {path: _last_use(path, state.st_mtime) for path, state in files.items()}
    for path in sorted(files, key=lambda each: last[each]):
        if _fits(folder, used, size) or last[path] > time.time() - IDLE:
            break
        for each in (path.with_suffix(".json"), path):
            each.unlink(missing_ok=True)
        used -= files[path].st_size
    return _fits(folder, used, size)


def _unfinished(folder: Path) -> int:
    """Bytes that others are writing; what nobody has written to for a day is of a process that died, and goes."""
    used = 0
    for path in folder.glob(".*.partial"):
        with suppress(OSError):  # it may have been finished meanwhile
            state = path.stat()
            if state.st_mtime < time.time() - IDLE:
                path.unlink()
            else:
                used += state.st_size
    return used


def _last_use(path: Path, otherwise: float) -> float:
    try:
        return path.with_suffix(".json").stat().st_mtime
    except OSError:
        return otherwise


def _fits(folder: Path, used: int, size: int) -> bool:
    return used + size <= BUDGET and size + RESERVE <= shutil.disk_usage(folder).free


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
