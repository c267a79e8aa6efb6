"""Real processes for tests: `consilium` in children of one warm parent, so that a run costs its own time, no imports.

A child may be given a hook: Python source that runs before the command line and may patch what it likes, such as to
kill the process at an exact moment. Worker processes of a child are spawned, so a hook does not reach them.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120  # after which a test gives a process up


@dataclass(frozen=True)
class Done:
    """How a process ended; `code` is negative for a signal."""

    code: int
    stdout: str
    stderr: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """Standard output as JSON lines, every one of which must be strict JSON."""
        return [json.loads(line, parse_constant=_refuse) for line in self.stdout.splitlines()]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


@dataclass(frozen=True)
class Running:
    """A child that was started and not waited for."""

    parent: Parent
    pid: int
    stdout: Path
    stderr: Path

    def wait(self) -> Done:
        """Its end, which must come."""
        code = self.parent.ask({"wait": self.pid})
        return Done(code, "" if self.stdout.is_fifo() else self.stdout.read_text(), self.stderr.read_text())

    @contextmanager
    def stream(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Events as they happen. They end when the last descendant that could write one is gone."""
        with self.stdout.open("rb", buffering=0) as pipe:
            yield (json.loads(line) for line in _lines(pipe.fileno()))

    def descendants(self, word: str) -> list[int]:
        """Children, of whichever thread, with this word in their command line."""
        threads = Path(f"/proc/{self.pid}/task").glob("*/children")
        children = [pid for thread in threads for pid in _text(thread).split()]
        return [int(pid) for pid in children if word in _text(Path(f"/proc/{pid}/cmdline"))]

    def wait_for_none(self, word: str) -> None:
        """Return when no child with this word in its command line is left."""
        until = time.monotonic() + PATIENCE_SECONDS
        while self.descendants(word):
            assert time.monotonic() < until, f"{word} is still there"
            time.sleep(0.01)


def _text(path: Path) -> str:
    """What is in it; "" where it is of a process that has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _patiently(descriptor: int) -> None:
    assert select.select([descriptor], [], [], PATIENCE_SECONDS)[0], "a process neither speaks nor ends"


def wait_for_writer(fifo: Path) -> None:
    """Return when a process has opened `fifo` to write and closed it."""
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _patiently(descriptor)
    finally:
        os.close(descriptor)


def _lines(descriptor: int) -> Iterator[bytes]:
    left = b""
    while True:
        _patiently(descriptor)
        read = os.read(descriptor, 65536)
        if not read:
            return
        *whole, left = (left + read).split(b"\n")
        yield from whole


class Parent:
    """The warm parent of `consilium` processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.e2e.processes"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )

    def ask(self, request: Mapping[str, Any]) -> int:
        """One line there, one number back."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        _patiently(self.process.stdout.fileno())
        return int(self.process.stdout.readline())

    def start(self, *words: str | Path, hook: str = "", cwd: Path | None = None, piped: bool = False) -> Running:
        """Start `consilium WORDS`; `piped`: its output waits to be read by `Running.stream`."""
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        if piped:
            os.mkfifo(out)
        request = {"words": [str(word) for word in words], "hook": hook, "cwd": str(cwd or self.folder)}
        return Running(self, self.ask({**request, "out": str(out), "err": str(err)}), out, err)

    def __call__(self, *words: str | Path, hook: str = "", cwd: Path | None = None) -> Done:
        """`consilium WORDS` from start to end."""
        return self.start(*words, hook=hook, cwd=cwd).wait()


@contextmanager
def parent(folder: Path) -> Iterator[Parent]:
    """A warm parent, ended with all that it started."""
    made = Parent(folder)
    try:
        yield made
    finally:
        made.process.stdin.close()  # type: ignore[union-attr]
        made.process.wait()


# ------------------------------------------------------------------------------------------------ inside the parent
def _serve() -> None:
    import consilium.check
    import consilium.report.html
    import consilium.run  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        answer = _exit_code(request["wait"]) if "wait" in request else _start(request)
        print(answer, flush=True)


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _start(request: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        _become(request)
    return pid


def _become(request: Mapping[str, Any]) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    code = 1
    try:
        exec(request["hook"], {"__name__": "hook"})
        code = _main(request["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(words: Sequence[str]) -> int:
    from consilium.cli import main

    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # what a user would see of it
        import traceback

        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _serve()
