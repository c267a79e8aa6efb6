"""Composition: runs on a Ray cluster. In: tasks. Out: how each ended. Every machine must see the same files.

A run is a Ray task that is never repeated by itself: running the study again goes on with it, from its last round.
Needs the extra `consilium[ray]`; nothing else imports Ray.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from consilium.errors import ConfigError
from consilium.study.local_pool import Ends
from consilium.study.runner import SPARE, Room
from consilium.study.work import Task, work

LOCAL = "local"


class RayPool:
    """Runs as tasks of the cluster that this process is connected to."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._work = ray.remote(max_retries=0, max_calls=1)(work)  # a process per run: none inherits another's memory
        self._runs: dict[Any, str] = {}

    def submit(self, task: Task) -> None:
        """Hand the run to the cluster."""
        gpus = 0 if task.device == "cpu" else 1
        needs = self._work.options(num_cpus=task.cores, num_gpus=gpus, memory=task.memory_bytes, name=task.run)
        self._runs[needs.remote(task)] = task.run

    def wait(self, seconds: float) -> Ends:
        """The runs that ended."""
        ready, _ = self._ray.wait(list(self._runs), timeout=seconds)
        return [(self._runs.pop(one), self._end(one)) for one in ready]

    def stop(self) -> None:
        """End all runs at once."""
        for one in self._runs:
            self._ray.cancel(one, force=True)
        self._runs.clear()

    def _end(self, one: Any) -> str | None:
        try:
            error: str | None = self._ray.get(one)
        except self._ray.exceptions.RayError as lost:  # its process died, or its machine
            return f"the process of the run died: {str(lost).strip().splitlines()[0]}"
        return error


@contextmanager
def connected(address: str) -> Iterator[tuple[RayPool, Room]]:
    """A pool on the cluster at this address ("local": one on this machine, for as long as this lasts) and its room.

    Raises ConfigError where Ray is not installed or no cluster answers.
    """
    ray = _imported()
    try:
        _connect(ray, address)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        remedy = "start one with `ray start --head` and give its address, or use --ray local"
        received = f"{address}: {' '.join(str(error).split())}"
        raise ConfigError("no Ray cluster answers", where="--ray", received=received, remedy=remedy) from error
    try:
        yield RayPool(ray), _room(ray)
    finally:
        ray.shutdown()


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a run that wants no GPU sees none
    try:
        import ray
    except ImportError as error:
        remedy = "install it: pip install 'consilium[ray]'"
        raise ConfigError("Ray is not installed", where="--ray", received=str(error), remedy=remedy) from error
    return ray


def _connect(ray: Any, address: str) -> None:
    if (found := _PORT.fullmatch(address)) is not None:  # Ray itself would wait for a minute
        socket.create_connection((found["host"], int(found["port"])), _PATIENCE_SECONDS).close()
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        ray.init(address=LOCAL, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    else:
        ray.init(address=address, **quiet)


_PORT = re.compile(r"(ray://)?(?P<host>[^:/]+):(?P<port>\d+)")
_PATIENCE_SECONDS = 10


def _room(ray: Any) -> Room:
    """What the whole cluster has; Ray itself finds the machine where a run fits."""
    total = ray.cluster_resources()
    cores, memory = int(total.get("CPU", 1)), round(SPARE * total.get("memory", 0))
    return Room(runs=cores, cores=cores, memory_bytes=memory, gpu_bytes=memory)
