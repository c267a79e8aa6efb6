"""Common: files that are whole or absent. In: bytes, tensors, JSON. Out: files, replaced in one step.

Every write goes to a temporary file in the same folder, is flushed to the disk and renamed, so that a killed process or
a full disk leaves the earlier file intact.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from consilium.errors import StateError
from consilium.tensors import Tensors, digest_all, dumps, loads, read_meta


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; StateError where the disk is full or not writable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            _sync(file)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StateError(
            "a file could not be written",
            where=str(path),
            received=str(error),
            remedy="free disk space or mend the permissions, then run again with --resume",
        ) from error


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    """Replace `path` by readable JSON; NaN is not JSON and must be None by now."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file; StateError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError("this file cannot be read", where=str(path), received=str(error)) from error


def save(path: Path, tensors: Tensors, meta: Mapping[str, object]) -> None:
    """Write tensors and JSON meta as one safetensors file with a checksum over both."""
    write_bytes(path, dumps(tensors, {"meta": dict(meta), "checksum": _checksum(tensors, meta)}))


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, meta) of `save`; StateError where the file is missing or its checksum does not match."""
    try:
        tensors, stored = loads(path.read_bytes()), read_meta(str(path))
    except Exception as error:
        raise StateError("this checkpoint cannot be read", where=str(path), received=str(error)) from error
    meta: Any = stored.get("meta", {})
    if stored.get("checksum") != _checksum(tensors, meta):
        raise StateError("this checkpoint is damaged: its checksum does not match", where=str(path))
    return tensors, meta


def _checksum(tensors: Tensors, meta: Mapping[str, object]) -> str:
    text = digest_all(tensors) + json.dumps(meta, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; StateError where another living process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = "wait for it, or choose another --out"
            raise StateError("another process works in this run folder", where=str(folder), remedy=remedy) from error
        yield
