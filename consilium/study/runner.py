"""Composition: the runs of a study, one after the other or beside one another. In: jobs. Out: how each ended.

A run starts as soon as its cores and memory are free. Runs that would train the same reference are kept apart where
others can go first, so that the second finds it done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch

from consilium.study.file import ResourcesConfig
from consilium.study.local_pool import Pool
from consilium.study.prepare import Job
from consilium.study.work import Task

Status = Literal["waiting", "running", "done", "failed", "refused"]
TICK_SECONDS = 0.5
SPARE = 0.9  # share of the free memory that runs may take


@dataclass(frozen=True)
class Room:
    """What all runs may take together."""

    runs: int
    cores: int
    memory_bytes: int
    gpu_bytes: int = 0

    def fits(self, job: Job, running: Sequence[Job]) -> bool:
        """Whether there is room for one more; a run that is alone always has it."""
        if not running:
            return True
        jobs = [*running, job]
        return (
            len(jobs) <= self.runs
            and sum(each.cores for each in jobs) <= self.cores
            and sum(each.memory_bytes for each in jobs) <= self.memory_bytes
            and sum(each.memory_bytes for each in jobs if each.device != "cpu") <= self.gpu_bytes
        )

    def within(self, resources: ResourcesConfig) -> Room:
        """No more than the study may take."""
        runs = min(self.runs, resources.workers or self.runs)
        return replace(self, runs=runs, memory_bytes=min(self.memory_bytes, resources.memory or self.memory_bytes))


class Watch(Protocol):
    """Is told what happens."""

    def started(self, job: Job) -> None: ...

    def ended(self, job: Job, error: str | None) -> None: ...


def carry_out(jobs: Sequence[Job], out: Path, room: Room, pool: Pool, watch: Watch) -> None:
    """Run all jobs; however this ends, no process is left behind."""
    waiting, running = list(jobs), dict[str, Job]()
    try:
        while waiting or running:
            for job in _admitted(waiting, running, room):
                pool.submit(task(job, out))
                watch.started(job)
            for run, error in pool.wait(TICK_SECONDS):
                watch.ended(running.pop(run), error)
    finally:
        pool.stop()


def task(job: Job, out: Path) -> Task:
    """What a process needs to know of a job."""
    assert job.config is not None
    log = out / "logs" / f"{job.run}.log"
    return Task(job.run, job.config, job.folder(out), log, job.identity, job.cores, job.memory_bytes, job.device)


def _admitted(waiting: list[Job], running: dict[str, Job], room: Room) -> Iterator[Job]:
    """Take from `waiting` what may start now."""
    while True:
        fitting = [job for job in waiting if room.fits(job, [*running.values()])]
        if not fitting:
            return
        trained = {name for job in running.values() for name in job.references}
        job = next((job for job in fitting if not job.references & trained), fitting[0])
        waiting.remove(job)
        running[job.run] = job
        yield job


# ------------------------------------------------------------------------------------------------ this machine
def room_here(resources: ResourcesConfig, jobs: Sequence[Job]) -> Room:
    """The cores this process may use and the memory that is free, unless the study says how much."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_gpu = any(job.device != "cpu" for job in jobs)
    gpu = round(SPARE * torch.cuda.mem_get_info()[0]) if on_gpu else 0
    memory = round(SPARE * free_memory()) if resources.memory is None else int(resources.memory)
    if resources.workers is None:
        return Room(len(jobs) or 1, cores, memory, gpu)
    return Room(
        resources.workers, max(cores, sum(sorted(job.cores for job in jobs)[-resources.workers :])), memory, gpu
    )


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without paging, within the limit of the container, if there is one."""
    found = [_available(root / "proc/meminfo"), *_limits(root / "sys/fs/cgroup")]
    known = [value for value in found if value is not None]
    return min(known) if known else _physical()


def _available(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        rows = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        return int(rows["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in rows else None
    return None


_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def _limits(folder: Path) -> Iterator[int]:
    """What the container's limit leaves; cached files count as used there, though they make room when it is needed."""
    for limit, used, details, cached in _CGROUPS:
        with suppress(OSError, ValueError):  # "max" is no limit
            rows = dict(line.split() for line in (folder / details).read_text().splitlines())
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            yield left + int(rows.get(cached, 0))


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
