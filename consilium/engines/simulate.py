"""Engine: the simulation. In: encoded requests for sites. Out: their encoded replies, from this machine.

Sites are answered in this thread or by a pool of threads or processes. A site's answer depends on the request and its
own folder alone, so neither the workers nor the order in which they finish change a bit of any result.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal, cast

import numpy as np
import torch

from consilium import seeds
from consilium.config import Config
from consilium.data import Examples, SiteData, UInt8Array
from consilium.engines import failures, pools, stacked
from consilium.engines.pools import Pool, Replies, Requests
from consilium.engines.site import Site
from consilium.experiment import Experiment, assemble
from consilium.local.seats import Seat
from consilium.protocols import Failure

Recorder = Callable[[Literal["down", "up"], str, bytes], None]
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


def proceed() -> None:
    """Nothing ends what this thread does."""


class Answering:
    """Answers for any site of several federations, building each experiment once. `go_on` raises to end a thread."""

    def __init__(self, federations: Mapping[str, Federation], go_on: Callable[[], None] = proceed) -> None:
        self.federations, self.go_on = federations, go_on
        self.experiments: dict[str, Experiment] = {}

    def __call__(self, key: str, asked: Requests) -> Replies:
        with threads(self.federations[key].config.engine.threads):
            return stacked.answers(self._experiment(key), asked, partial(self._site, key))

    def _site(self, key: str, site: str, seat: Seat | None) -> Site:
        self.go_on()
        federation, here = self.federations[key], self.federations[key].folder / "sites" / site
        return Site(self._experiment(key), federation.sites[site], here, federation.secrets[site], seat)

    def _experiment(self, key: str) -> Experiment:
        if key not in self.experiments:
            with assembling:
                made = assemble(self.federations[key].config, self.federations[key].classes)
            self.experiments[key] = replace(made, setting=replace(made.setting, go_on=self.go_on))
        return self.experiments[key]


assembling = Lock()  # loads a backbone once, and its modules draw from the process's random generator


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Gradient bits depend on the number of threads, so it is fixed by the configuration."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Simulation:
    """Answers requests in this thread (`workers` = 1) or by so many threads or processes. Use as a context manager."""

    def __init__(self, federations: Mapping[str, Federation], workers: int, record: Recorder | None = None) -> None:
        self.answering, self.workers, self.record = Answering(federations), workers, record
        self.pool: Pool | None = None
        self.stopped = False

    def __enter__(self) -> Simulation:
        federations = self.answering.federations
        kind = pools.kind_of([federation.config for federation in federations.values()])
        if self.workers > 1 and kind == "threads":
            self.pool = pools.Threads(partial(Answering, federations), self.workers)
        elif self.workers > 1:
            self.pool = pools.Processes(partial(Answering, federations), self.workers)
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if self.pool is not None:
            if kind is not None:
                self.stop()
            self.pool.close()

    def stop(self) -> None:
        """End the workers at once, whatever they do; the files they wrote are whole."""
        self.stopped = True
        if self.pool is not None:
            self.pool.stop()

    def transport(self, key: str) -> Transport:
        """The wire to the sites of one federation."""
        return Transport(self, key, tuple(sorted(self.answering.federations[key].sites)))

    def explain(self, key: str) -> Callable[[Failure], str]:
        """Why a site of one federation failed, in full: here its folder can be read."""
        folder = self.answering.federations[key].folder
        return lambda failure: failures.unseal(folder / "sites" / failure.site, failure.message)

    def submit(self, key: str, asked: Requests) -> Future[Replies]:
        """A future of the replies of a few sites, answered by one worker, or of BrokenExecutor where it died."""
        future: Future[Replies] = Future()
        try:
            if self.pool is not None:
                return self.pool.submit(key, asked)
            future.set_result(self.answering(key, asked))
        except BrokenExecutor as error:
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
        config = self.simulation.answering.federations[self.key].config
        window = AHEAD * self.simulation.workers * stacked.size(config) if self.simulation.pool is not None else 1
        groups = stacked.groups(requests, config)
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
        except BrokenExecutor as error:
            if self.simulation.stopped:  # no site was lost: its round is to be repeated, not closed without it
                raise pools.Stopped from error
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


# ------------------------------------------------------------------------------------------------ to another process
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
