"""What a command costs. In: an argument list. Out: seconds on the clock and the peak memory of all its processes.

Memory is the sum of PSS, in which a page that several processes share counts once. A process belongs to the command if
the mark in its environment says so, so that daemons and workers are found whoever their parent is; all of them are
ended before `command` returns.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

ROOT = Path(__file__).resolve().parent.parent
MARK = "CONSILIUM_BENCHMARK"
EVERY_SECONDS = 0.25
ENVIRONMENT = {  # one thread per worker, and nothing that leaves the machine
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, peak of the summed PSS in bytes, at most so many processes, all they wrote."""

    seconds: float
    peak_bytes: int
    processes: int
    output: str
    started: float  # seconds of the epoch


def command(arguments: Sequence[str], extra: Mapping[str, str] | None = None, timeout: float = 900) -> Cost:
    """Run to the end; RuntimeError where it fails or takes longer than `timeout` seconds."""
    mark = uuid.uuid4().hex
    here = os.path.dirname(sys.executable)
    environment = {**os.environ, **ENVIRONMENT, MARK: mark, **(extra or {})}
    environment["PATH"] = f"{here}{os.pathsep}{environment.get('PATH', '')}"
    with tempfile.TemporaryFile("w+") as written:
        watch, started = _Watch(mark), time.time()
        begun = time.perf_counter()
        process = subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT)
        with watch:
            try:
                code: int | None = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            seconds = time.perf_counter() - begun
        end_all(mark)
        process.wait()
        written.seek(0)
        output = written.read()
    if code != 0:
        outcome = f"ended with {code}" if code is not None else f"took more than {timeout:.0f} s"
        raise RuntimeError(f"{' '.join(arguments[:6])} {outcome}:\n{output[-3000:]}")
    return Cost(seconds, watch.peak_bytes, watch.processes, output, started)


class _Watch:
    """Samples the memory of the marked processes while it is open."""

    def __init__(self, mark: str) -> None:
        self.mark, self.peak_bytes, self.processes = mark, 0, 0
        self.stop, self.thread = Event(), Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watch:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(EVERY_SECONDS):
            found = marked(self.mark)
            self.processes = max(self.processes, len(found))
            self.peak_bytes = max(self.peak_bytes, sum(map(pss, found)))


def marked(mark: str) -> list[int]:
    """Processes that carry this mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                if wanted in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
    return found


def pss(process: int) -> int:
    """Bytes of a process in which a page shared by n processes counts as 1 / n; 0 where it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def end_all(mark: str, patience: float = 5.0) -> None:
    """End every marked process: ask first, then do not ask."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in marked(mark):
            with suppress(OSError):
                os.kill(process, number)
        deadline = time.monotonic() + patience
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
