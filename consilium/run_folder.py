"""Common: whose run folder it is. In: a folder and what identifies a run. Out: the folder, opened for it, or refused.

A folder belongs to a run from the moment its config.json lies there. What is refused is left as it was found.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from consilium import checkpoint
from consilium.errors import StateError

LOCK, CONFIG, SPLIT, DONE = ".lock", "config.json", "split.parquet", "summary.json"
OTHER = "choose another --out"
_ATTEMPTS = 5
Identity = Mapping[str, object]  # hashes and versions that two runs share only if they give the same bits


@contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Hold a run folder for this process. StateError where it is not this run's to use, before anything is prepared."""
    is_new = not folder.exists()
    if not is_new and not (folder / LOCK).exists():  # somebody else's folder does not even get a lock
        _admit(folder, resume)
    with locked(folder):
        try:
            _admit(folder, resume)
            yield
        finally:
            _leave(folder, is_new)


def _admit(folder: Path, resume: bool) -> None:
    if not folder.is_dir():
        raise StateError("this is a file, not a folder", where=str(folder), remedy=OTHER)
    if (folder / CONFIG).is_file():
        if not resume:
            remedy = f"add --resume to continue it, or {OTHER}"
            raise StateError("this run folder already holds a run", where=str(folder), remedy=remedy)
    elif any(child.name != LOCK and not _is_temporary(child) for child in folder.iterdir()):
        raise StateError("the folder is not empty and holds no run", where=str(folder), remedy=OTHER)


@contextmanager
def locked(folder: Path, remedy: str = f"wait for it, or {OTHER}") -> Iterator[None]:
    """Hold a folder, as long as this process lives; StateError where another one does."""
    with _lock_file(folder) as file:
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if attempt == _ATTEMPTS - 1:
                    what = "another process works in this run folder"
                    raise StateError(what, where=str(folder), remedy=remedy) from error
                time.sleep(0.05)  # it may be one that only looks: `is_held`
        yield


def is_held(folder: Path) -> bool:
    """Whether a living process works in this folder."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lock_file(folder: Path) -> IO[bytes]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("ab")
    except OSError as error:
        raise StateError(
            "no run folder can be made here", where=str(folder), received=str(error), remedy=OTHER
        ) from error


def _leave(folder: Path, is_new: bool) -> None:
    """Nothing is left of a run that never began."""
    if not (folder / CONFIG).is_file():
        (folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # there is something in it
            if is_new:
                folder.rmdir()


def open_run(folder: Path, identity: Identity, facts: Mapping[str, Any], split: bytes) -> None:
    """Write config.json (identity and facts) and split.parquet, or make sure that the ones there are of this run."""
    path = folder / CONFIG
    if path.is_file():
        _compare(checkpoint.read_json(path), identity, facts["config"], folder)
    else:
        checkpoint.write_json(path, {**identity, **facts})
    if not (folder / SPLIT).is_file():
        checkpoint.write_bytes(folder / SPLIT, split)
    clean(folder)


def clean(folder: Path) -> None:
    """Remove what a process that was killed while it wrote left in a folder that this one holds."""
    for left in filter(_is_temporary, folder.rglob("*.tmp")):
        left.unlink()


def _compare(stored: Any, identity: Identity, config: Mapping[str, Any], folder: Path) -> None:
    found = stored if isinstance(stored, dict) else {}
    _compare_keys(found.get("state_key"), identity.get("state_key"), folder)
    different = [key for key, value in identity.items() if found.get(key) != value]
    if "config_hash" in different:
        different += _different(found.get("config", {}), config)
    if different:
        raise StateError(
            "this run folder belongs to another configuration, other data or another version",
            where=str(folder),
            received=f"different: {', '.join(different)}",
            remedy=OTHER,
        )


def _compare_keys(began: object, given: object, folder: Path) -> None:
    """A folder whose sites' files are encrypted stays so, with one key."""
    if began == given:
        return
    whose = "the sites' files of this run are"
    remedy = "give the key that the run began with: engine.state_key_file or engine.state_key_variable"
    if not began:
        what, remedy = f"{whose} not encrypted, though a key is given", f"give no key to continue it, or {OTHER}"
    else:
        what = f"{whose} encrypted with another key" if given else f"{whose} encrypted, and no key is given"
    allowed, received = (f"key {key}" if key else "no key" for key in (began, given))
    raise StateError(what, where=str(folder), allowed=allowed, received=received, remedy=remedy)


def _different(first: Any, second: Any, name: str = "") -> list[str]:
    """Dotted names of the values that two plain tables do not share."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted(first.keys() | second.keys())
        return [one for key in keys for one in _different(first.get(key), second.get(key), f"{name}.{key}".strip("."))]
    return [] if first == second else [name]


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def is_done(folder: Path) -> bool:
    """Whether all rounds are closed and what sites left is gathered."""
    return (folder / DONE).is_file()


def is_encrypted(folder: Path) -> bool:
    """Whether the sites' files in a run folder are."""
    return bool((_identity(folder, {"state_key": None}) or {}).get("state_key"))


def take_over(folder: Path, identity: Identity) -> Path | None:
    """Copy a finished reference of the same identity from a neighbouring run into `folder`; where it came from.

    It is copied beside and then put in place, so that a crash leaves no half copy that looks finished.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for done in sorted(folder.parents[2].glob(f"*/references/{folder.name}/{DONE}")):
        if _identity(done.parent, identity) == identity:
            try:
                shutil.copytree(done.parent, partial)
                shutil.rmtree(folder)
                partial.rename(folder)
            except OSError:  # it went away meanwhile, or the disk is full: then training says so
                continue
            return done.parent
    return None


def _identity(folder: Path, keys: Identity) -> dict[str, Any] | None:
    try:
        stored = checkpoint.read_json(folder / CONFIG)
        return {key: stored.get(key) for key in keys}
    except (StateError, AttributeError):  # somebody else's folder, in whatever state
        return None
