"""Engine: the simulation. In: encoded requests for sites. Out: their encoded replies, from this machine.

Sites are answered in this process or by a pool of worker processes. A site's answer depends on the request and its own
folder alone, so neither the number of workers nor the order in which they finish changes a bit of any result.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any, Literal, cast

import numpy as np
import torch

from consilium import seeds
from consilium.config import Config
from consilium.data import Examples, SiteData, UInt8Array
from consilium.engines import failures, stacked
from consilium.engines.site import Site
from consilium.experiment import Experiment, assemble
from consilium.local.seats import Seat
from consilium.protocols import Failure

Recorder = Callable[[Literal["down", "up"], str, bytes], None]
Requests = Mapping[str, bytes]  # site -> request
Replies = dict[str, bytes]  # site -> reply
AHEAD = 4  # sites per worker that are asked before the first of them is due: nobody waits, and nothing piles up


@dataclass(frozen=True)
class Federation:
    """All a process needs to answer for the sites of one run. `folder`: where sites keep their state."""

    config: Config
    classes: tuple[str, ...]
    sites: Mapping[str, SiteData]
    folder: Path
    secrets: Mapping[str, int]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "sites": {name: _without_pixels(data) for name, data in self.sites.items()}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        object.__setattr__(self, "sites", {name: _with_pixels(data) for name, data in self.sites.items()})


def secrets_of(seed: int, sites: Mapping[str, SiteData]) -> dict[str, int]:
    """Seeds of the sites' personal tensors in a simulation; a deployment draws them at each hospital."""
    return {name: seeds.derive(seed, site=name, purpose="personal start") for name in sites}


class Answering:
    """Answers for any site of several federations, building each experiment once per process."""

    def __init__(self, federations: Mapping[str, Federation]) -> None:
        self.federations = federations
        self.experiments: dict[str, Experiment] = {}

    def __call__(self, key: str, asked: Requests) -> Replies:
        federation = self.federations[key]
        if key not in self.experiments:
            self.experiments[key] = assemble(federation.config, federation.classes)
        with _threads(federation.config.engine.threads):
            return stacked.answers(self.experiments[key], asked, partial(self._site, key))

    def _site(self, key: str, site: str, seat: Seat | None) -> Site:
        federation = self.federations[key]
        here = federation.folder / "sites" / site
        return Site(self.experiments[key], federation.sites[site], here, federation.secrets[site], seat)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Gradient bits depend on the number of threads, so it is fixed by the configuration."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Simulation:
    """Answers requests in this process (`workers` = 1) or by `workers` processes. Use as a context manager."""

    def __init__(self, federations: Mapping[str, Federation], workers: int, record: Recorder | None = None) -> None:
        self.answering, self.workers, self.record = Answering(federations), workers, record
        self.pool: ProcessPoolExecutor | None = None
        self.lifeline: Connection | None = None

    def __enter__(self) -> Simulation:
        if self.workers > 1:
            context = get_context("spawn")
            ours, self.lifeline = context.Pipe(duplex=False)
            self.pool = ProcessPoolExecutor(
                self.workers, context, initializer=_start_worker, initargs=(self.answering.federations, ours)
            )
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            self.stop()
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """End the workers at once, whatever they do; the files they wrote are whole."""
        if self.lifeline is not None:
            self.lifeline.close()

    def transport(self, key: str) -> Transport:
        """The wire to the sites of one federation."""
        return Transport(self, key, tuple(sorted(self.answering.federations[key].sites)))

    def explain(self, key: str) -> Callable[[Failure], str]:
        """Why a site of one federation failed, in full: here its folder can be read."""
        folder = self.answering.federations[key].folder
        return lambda failure: failures.unseal(folder / "sites" / failure.site, failure.message)

    def submit(self, key: str, asked: Requests) -> Future[Replies]:
        """A future of the replies of a few sites, answered by one worker, or of BrokenProcessPool where it died."""
        future: Future[Replies] = Future()
        try:
            if self.pool is not None:
                with _uninterrupted():
                    return self.pool.submit(_answer_in_worker, key, asked)
            future.set_result(self.answering(key, asked))
        except BrokenProcessPool as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Transport:
    """The seam between the round loop and the sites."""

    simulation: Simulation
    key: str
    names: tuple[str, ...]

    def sites(self) -> tuple[str, ...]:
        """Names of all sites, sorted."""
        return self.names

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Replies in the order of sites. Few sites start at once, the largest first; of many, some are asked ahead."""
        window = AHEAD * self.simulation.workers if self.simulation.pool is not None else 1
        groups = stacked.groups(requests, self.simulation.answering.federations[self.key].config)
        waiting = deque(sorted(groups, key=self._size) if len(requests) <= window else groups)
        started: dict[str, Future[Replies]] = {}
        for site in sorted(requests):
            while waiting and (site not in started or len(started) + len(waiting[0]) <= window):
                group = waiting.popleft()
                started |= dict.fromkeys(group, self._start(group, requests))
            yield site, self._answer(site, started.pop(site))

    def _size(self, group: Sequence[str]) -> tuple[int, Sequence[str]]:
        federation = self.simulation.answering.federations[self.key]
        return -sum(len(federation.sites[site].train) for site in group), group

    def _start(self, group: Sequence[str], requests: Mapping[str, bytes]) -> Future[Replies]:
        asked = {site: requests[site] for site in group}
        for site, data in asked.items():
            self._record("down", site, data)
        return self.simulation.submit(self.key, asked)

    def _answer(self, site: str, future: Future[Replies]) -> bytes | Failure:
        try:
            reply = future.result().pop(site)
        except BrokenProcessPool:
            return Failure(site, "lost", "its worker process died (out of memory?)")
        self._record("up", site, reply)
        return reply

    def _record(self, direction: Literal["down", "up"], site: str, data: bytes) -> None:
        if self.simulation.record is not None:
            self.simulation.record(direction, site, data)


def num_workers(wanted: int | Literal["auto"], num_sites: int) -> int:
    """ "auto": one per core this process may use, at most one per site."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, num_sites) if wanted == "auto" else wanted)


# ------------------------------------------------------------------------------------------------ worker processes
_here: list[Answering] = []


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A worker started inside is deaf to Ctrl-C for good: its parent hears it and ends the workers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(federations: Mapping[str, Federation], lifeline: Connection) -> None:
    Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    _here[:] = [Answering(federations)]


def _end_with_parent(lifeline: Connection) -> None:
    """The pipe ends when the parent closes it or dies, however it dies: no worker may go on writing site states."""
    lifeline.poll(None)
    os._exit(1)


def _answer_in_worker(key: str, asked: Requests) -> Replies:
    return _here[0](key, asked)


@dataclass(frozen=True)
class _PixelFile:
    """Stands for a memory map while a federation travels to a worker."""

    path: str
    shape: tuple[int, ...]
    offset: int


def _without_pixels(data: SiteData) -> SiteData:
    return _each_split(data, lambda images: _file_of(images) if isinstance(images, np.memmap) else images)


def _with_pixels(data: SiteData) -> SiteData:
    return _each_split(data, lambda images: _map(images) if isinstance(images, _PixelFile) else images)


def _file_of(images: np.memmap[Any, Any]) -> _PixelFile:
    return _PixelFile(str(images.filename), tuple(images.shape), int(images.offset))


def _map(file: _PixelFile) -> object:
    return np.memmap(file.path, dtype=np.uint8, mode="r", offset=file.offset, shape=file.shape)


def _each_split(data: SiteData, change: Callable[[object], object]) -> SiteData:
    def split(examples: Examples) -> Examples:
        return replace(examples, images=cast(UInt8Array, change(examples.images)))

    return replace(data, train=split(data.train), val=split(data.val), test=split(data.test))
