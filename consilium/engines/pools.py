"""Engine: several sites at once. In: a function that answers requests. Out: the same one, in threads or in processes.

Threads share the frozen weights and start at once; each has modules of its own. What draws from the process's random
generator (dropout), or is not this package's and so might, gets processes: there the draws of two sites cannot mix.
A process that dies loses its sites only; with threads it is the run, which can be resumed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Event, Thread, local
from typing import Literal, Protocol

import torch

from consilium import registry
from consilium.config import Config
from consilium.errors import ConfigError

Requests = Mapping[str, bytes]  # site -> request
Replies = dict[str, bytes]  # site -> reply
Answer = Callable[[str, Requests], Replies]  # of the sites of one federation, by its key
Make = Callable[[], Answer]
Kind = Literal["threads", "processes"]


class Stopped(BaseException):
    """Ends what a thread does between two steps of training; no failure of a site, so nobody may answer it."""


class Pool(Protocol):
    """Workers that answer for sites."""

    def submit(self, key: str, asked: Requests) -> Future[Replies]:
        """A future of the replies, or of BrokenExecutor where the worker died."""

    def stop(self) -> None:
        """End the workers at once, whatever they do; the files they wrote are whole."""

    def close(self) -> None:
        """Wait for the workers to end; what has not begun is dropped."""


def kind_of(configs: Sequence[Config]) -> Kind:
    """The pool that all of these runs can share."""
    return (
        "threads" if all(each.engine.pool != "processes" and not _obstacle(each) for each in configs) else "processes"
    )


def check(config: Config) -> None:
    """ConfigError where a run wants threads and cannot have them."""
    if config.engine.pool == "threads" and (obstacle := _obstacle(config)):
        what, allowed = "sites of this run cannot share a process", "auto, processes"
        raise ConfigError(what, where="engine.pool", allowed=allowed, received=obstacle)


def _obstacle(config: Config) -> str:
    """Why sites of a run cannot be answered by threads of one process; "" if they can."""
    if config.engine.compile:
        return "engine.compile: blocks are compiled for one thread"
    for kind, name, table in config.members():
        member = registry.get(kind, name)
        if kind != "sources" and not member.build.__module__.startswith("consilium."):
            return f"{name}: of another package, so it may draw from the process's random generator"
        if getattr(registry.parse_options(member, table.options()), "dropout", 0) > 0:
            return f"{name}: dropout draws from the process's random generator"
    return ""


# ------------------------------------------------------------------------------------------------ threads
class Threads:
    """Every thread answers with an `Answer` of its own."""

    def __init__(self, make: Callable[[Callable[[], None]], Answer], workers: int) -> None:
        self._make, self._own, self._ended = make, local(), Event()
        self._threads, self._state = torch.get_num_threads(), torch.get_rng_state()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sites")

    def submit(self, key: str, asked: Requests) -> Future[Replies]:
        """A future of the replies."""
        return self._pool.submit(self._answer, key, asked)

    def _answer(self, key: str, asked: Requests) -> Replies:
        self._go_on()
        if not hasattr(self._own, "answer"):
            self._own.answer = self._make(self._go_on)
        replies: Replies = self._own.answer(key, asked)
        return replies

    def _go_on(self) -> None:
        if self._ended.is_set():
            raise Stopped

    def stop(self) -> None:
        """Every thread ends before its next step."""
        self._ended.set()

    def close(self) -> None:
        """Wait for the threads, and leave the caller's random generator and number of threads as they were."""
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)
        torch.set_rng_state(self._state)


# ------------------------------------------------------------------------------------------------ processes
class Processes:
    """Every process answers with an `Answer` of its own; `make` travels there."""

    def __init__(self, make: Make, workers: int) -> None:
        context = get_context("spawn")
        ours, self._lifeline = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(make, ours))

    def submit(self, key: str, asked: Requests) -> Future[Replies]:
        """A future of the replies; BrokenExecutor at once where a worker died before."""
        with _uninterrupted():
            return self._pool.submit(_answer_in_worker, key, asked)

    def stop(self) -> None:
        """The processes end at once."""
        self._lifeline.close()

    def close(self) -> None:
        """Wait for the processes."""
        self._pool.shutdown(cancel_futures=True)


_here: list[Answer] = []


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A worker started inside is deaf to Ctrl-C for good: its parent hears it and ends the workers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(make: Make, lifeline: Connection) -> None:
    Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    _here[:] = [make()]


def _end_with_parent(lifeline: Connection) -> None:
    """The pipe ends when the parent closes it or dies, however it dies: no worker may go on writing site states."""
    lifeline.poll(None)
    os._exit(1)


def _answer_in_worker(key: str, asked: Requests) -> Replies:
    return _here[0](key, asked)
