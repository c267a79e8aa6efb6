"""Common: files that are whole or absent. In: bytes, tensors, JSON. Out: files, replaced in one step.

Every write goes to a temporary file in the same folder, is flushed to the disk and renamed, so that a killed process or
a full disk leaves the earlier file intact.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from consilium.errors import StateError

if TYPE_CHECKING:  # imported where they are used: who writes JSON alone waits for neither torch nor pandas
    import pandas as pd

    from consilium.sealing import Seal
    from consilium.tensors import Tensors

LOST = "restore this file from a backup, or start again with another --out"


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; StateError where the disk is full or not writable."""
    _write(path, [data])


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(pieces)
            _sync(file)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def not_written(path: Path, error: OSError) -> StateError:
    """What to say where the disk is full or must not be written to."""
    remedy = (
        "free disk space, mend the permissions or choose another --out; an interrupted run goes on with --resume, "
        "across hospitals with `consilium coordinator resume`, where a site is asked again by itself"
    )
    return StateError("a file could not be written", where=str(path), received=str(error), remedy=remedy)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a loss of power; not every file system knows how."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def append_line(path: Path, text: str) -> None:
    """Add a line to a file that only grows, whole or not at all; StateError where the disk is full or not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            _append(file.fileno(), f"{text}\n".encode())
    except OSError as error:
        raise not_written(path, error) from error


def _append(file: int, data: bytes) -> None:
    start = os.fstat(file).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except BaseException:
        os.ftruncate(file, start)
        raise


def cut(path: Path, size: int) -> None:
    """Leave the first bytes of a file; StateError where it cannot be written."""
    try:
        with path.open("r+b") as file:
            file.truncate(size)
            _sync(file)
    except OSError as error:
        raise not_written(path, error) from error


def write_json(path: Path, value: object) -> None:
    """Replace `path` by readable JSON; NaN is not JSON and must be None by now."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file; StateError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError("this file cannot be read", where=str(path), received=str(error), remedy=LOST) from error


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a Parquet file; StateError where it is missing or damaged."""
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors of format are ValueErrors
        raise StateError("this file cannot be read", where=str(path), received=str(error), remedy=LOST) from error


def save(path: Path, tensors: Tensors, meta: Mapping[str, object], seal: Seal | None = None) -> None:
    """Write tensors and JSON meta as one safetensors file with a checksum over both, encrypted where there is a seal:
    nothing of it ever lies on the disk in clear."""
    from consilium.tensors import pieces

    plain = pieces(tensors, {"meta": dict(meta), "checksum": _checksum(tensors, meta)})
    _write(path, seal.close(plain) if seal else plain)


def load(path: Path, seal: Seal | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, meta) of `save`; StateError where the file is missing, its checksum does not match, or it is not
    encrypted as `seal` says."""
    from consilium.sealing import opened
    from consilium.tensors import loads, meta_of

    try:
        data = opened(path.read_bytes(), seal, str(path))
        tensors, stored = loads(data), meta_of(data)
    except StateError:
        raise
    except Exception as error:
        raise StateError("this checkpoint cannot be read", where=str(path), received=str(error), remedy=LOST) from error
    meta: Any = stored.get("meta", {})
    if stored.get("checksum") != _checksum(tensors, meta):
        raise StateError("this checkpoint is damaged: its checksum does not match", where=str(path), remedy=LOST)
    return tensors, meta


def _checksum(tensors: Tensors, meta: Mapping[str, object]) -> str:
    from consilium.tensors import digest_all

    text = digest_all(tensors) + json.dumps(meta, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
