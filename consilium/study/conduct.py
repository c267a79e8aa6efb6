"""Composition: a whole study. In: a study file and a folder. Out: the folder, with runs, tables, figures and a page.

study file -> plan -> prepare -> runs, beside one another -> tidy tables -> selection -> page
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from consilium import checkpoint
from consilium.errors import StateError
from consilium.study import board
from consilium.study.collect import STUDY, Collection
from consilium.study.file import ResourcesConfig
from consilium.study.local_pool import LocalPool, Pool
from consilium.study.plan import Plan, plan
from consilium.study.prepare import Job, prepare
from consilium.study.runner import Room, carry_out, room_here

LOCK = ".lock"
SAME = ("config_hash", "data_digest", "split_hash")  # what a run of an older version shares with one of this version


@dataclass(frozen=True)
class Options:
    """How a study is carried out; changes no result."""

    out: Path | None = None  # None: studies/<name>
    workers: int | None = None  # None: as the study says
    ray: str | None = None  # address of a Ray cluster, or "local"
    keep_old: bool = False  # take finished runs of other versions as they are
    quiet: bool = False


def conduct(path: Path, overrides: Sequence[str] = (), options: Options | None = None) -> Collection:
    """Carry out a study, or on from where it stopped. Raises what a run would raise before training, and StateError
    where the folder is not this study's; runs that fail are in the outcome."""
    options = options or Options()
    planned = plan(path, overrides)
    out = (options.out or Path("studies") / planned.study.name).resolve()
    with _claimed(out, planned.study.name), _pool(options.ray) as (pool, room):
        jobs, warnings = examine(planned, options.quiet)
        folders, old = _folders(jobs, out, options.keep_old)
        collection = Collection(planned, out, jobs, folders, [*warnings, *old])
        todo = _begin(collection)
        allowed = resources(planned, options)
        room = room_here(allowed, todo) if room is None else room.within(allowed)
        with board.shown(len(todo), out, options.quiet) as shown:
            try:
                carry_out(todo, out, room, pool, _Watch(collection, shown))
            except BaseException:  # nothing runs any more
                collection.stopped()
                raise
        collection.select()
        page = importlib.import_module("consilium.study.page")
        page.write(out)
    return collection


def examine(planned: Plan, quiet: bool) -> tuple[list[Job], list[str]]:
    """The jobs of a plan, and what is odd about their data, each said once."""
    warnings: dict[str, None] = {}

    with board.preparing(quiet) as display:

        def show(event: Mapping[str, Any]) -> None:
            if event["event"] != "warning" or event["text"] not in warnings:
                display(event)
            if event["event"] == "warning":
                warnings[event["text"]] = None

        jobs = prepare(planned, show)
    return jobs, list(warnings)


def resources(planned: Plan, options: Options) -> ResourcesConfig:
    """What the study may take here."""
    if options.workers is None:
        return planned.study.resources
    return planned.study.resources.model_copy(update={"workers": options.workers})


@dataclass(frozen=True)
class _Watch:
    """Keeps the files and the view up to date."""

    collection: Collection
    shown: board.Board

    def started(self, job: Job) -> None:
        self.collection.mark(job.run, "running")
        self.shown.started(job)

    def ended(self, job: Job, error: str | None) -> None:
        self.collection.mark(job.run, "done" if error is None else "failed", error or "")
        self.collection.write()
        self.shown.ended(job, error)


def _begin(collection: Collection) -> list[Job]:
    """Write down the plan and what is finished already; the jobs that are left."""
    todo = []
    for job in collection.jobs:
        if job.refused:
            continue
        if (collection.folders[job.run] / "result.json").is_file():
            collection.mark(job.run, "done")
        else:
            todo.append(job)
    collection.write()
    return todo


def _folders(jobs: Sequence[Job], out: Path, keep_old: bool) -> tuple[dict[str, Path], list[str]]:
    """The folder of each run, and a sentence where finished runs of another version are there."""
    own = {job.run: job.folder(out) for job in jobs}
    missing = [job for job in jobs if not job.refused and not (own[job.run] / "result.json").is_file()]
    old = _finished(out) if missing else {}
    found = {job.run: old[key] for job in missing if (key := _key(job.identity)) in old}
    if not found:
        return own, []
    if keep_old:
        return {**own, **found}, [f"{len(found)} runs were finished by another version of the software"]
    return own, [f"{len(found)} runs finished by another version of the software are made again"]


def _finished(out: Path) -> dict[tuple[Any, ...], Path]:
    """Finished runs in the folder by what does not depend on the version."""
    folders = [path.parent for path in sorted(out.glob("runs/*/result.json"))]
    return {_key(checkpoint.read_json(folder / "config.json")): folder for folder in folders}


def _key(identity: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(identity.get(key) for key in SAME)


@contextmanager
def _claimed(out: Path, name: str) -> Iterator[None]:
    """Hold a study's folder for this process; StateError where it is something else's."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / STUDY).is_file() and not _begun(out))):
        raise StateError("this is not the folder of a study", where=str(out), remedy="choose another --out")
    if (out / STUDY).is_file() and (found := checkpoint.read_json(out / STUDY).get("name")) != name:
        raise StateError(
            "the folder holds another study", where=str(out), received=found, remedy="choose another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / LOCK, timeout=0):
            try:
                yield
            finally:
                _leave(out)
    except Timeout as error:
        raise StateError("another process works on this study", where=str(out), remedy="wait for it") from error
    except OSError as error:
        raise checkpoint.not_written(out, error) from error


def _leave(out: Path) -> None:
    """Nothing is left of a study that never began."""
    if _begun(out):
        (out / LOCK).unlink(missing_ok=True)
        out.rmdir()


def _begun(out: Path) -> bool:
    """Whether a study was claimed there and wrote nothing yet."""
    return {path.name for path in out.iterdir()} <= {LOCK}


@contextmanager
def _pool(address: str | None) -> Iterator[tuple[Pool, Room | None]]:
    """Where runs take place, and the room there; None: this machine's."""
    if address is None:
        yield LocalPool(), None
        return
    from consilium.study.ray_pool import connected

    with connected(address) as (pool, room):
        yield pool, room
