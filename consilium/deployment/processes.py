"""Composition: Flower's programs. In: folders and addresses. Out: running SuperLink and SuperNode, watched.

The only file that knows the flags and the files of Flower's command line, which change from release to release. In all
of it telemetry, update checks and the installation of an app's dependencies are off: nothing needs the internet.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from consilium.deployment import door, reach, watch
from consilium.errors import ConfigError, StateError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
CA, CERTIFICATE, KEY, NODE_KEY, PUBLIC_KEY = "ca.crt", "server.pem", "server.key", "node.key", "node.key.pub"
APP, HOME, DATABASE, CONNECTION = "app", "flower", "superlink.db", "deploy"
SUPERNODE = watch.SUPERNODE
_LIBC = ctypes.CDLL(None)
_PARENT_DIED = 1  # of Linux's prctl: which signal a process gets then
PAUSE = 20.0  # seconds before a program that ended is started again; Flower refuses a node within a minute of its death
Tell = Callable[[Mapping[str, object]], None]


def environment(home: Path) -> dict[str, str]:
    """Of every program of Flower: quiet, with a home of its own, and its sub-programs on the path."""
    here = str(Path(sys.executable).parent)
    home.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([here, os.environ.get("PATH", "")])
    return {**os.environ, **reach.without_proxy(os.environ), **QUIET, "FLWR_HOME": str(home), "PATH": path}


def program(name: str) -> str:
    """Path of one of Flower's programs; ConfigError where Flower is not installed."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise ConfigError(f"{name} is not installed", remedy="pip install 'consilium[flower]'")
    return found


def superlink(folder: Path, address: str) -> list[str]:
    """The coordinator's end: TLS, registered nodes only, a database that outlives it, and `door` before it."""
    program(door.SUPERLINK)
    _, _, port = address.rpartition(":")
    keys = folder / "keys"
    secured = ["--ssl-ca-certfile", keys / CA, "--ssl-certfile", keys / CERTIFICATE, "--ssl-keyfile", keys / KEY]
    stays = ["--database", folder / DATABASE, "--disable-runtime-dependency-installation", "--enable-supernode-auth"]
    behind = [sys.executable, "-m", door.__name__]
    return [*behind, "--host", "0.0.0.0", "--port", port, *map(str, [*secured, *stays])]


def set_aside(folder: Path) -> Path | None:
    """Move a SuperLink's database that cannot be read away; its new name. What is lost with it are messages that were
    under way, and which keys were registered, which `start` does again. None where it is sound or not there."""
    path = folder / DATABASE
    if not path.is_file() or _is_sound(path):
        return None
    kept = path.with_name(f"{DATABASE}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    for end in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(kept.with_name(kept.name + end))
    return kept


def _is_sound(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(path)) as database:
            return bool(database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.OperationalError:  # locked, or not ours to read: no damage, and the SuperLink says so itself
        return True
    except sqlite3.DatabaseError:
        return False


def is_guarded(folder: Path, address: str) -> bool:
    """Whether the door is in front of the SuperLink that listens here; False where none listens."""
    port = int(address.rpartition(":")[2])
    context = ssl.create_default_context(cafile=str(folder / "keys" / CA))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    try:
        connection.request("GET", door.HERE)
        return connection.getresponse().status == 204
    except OSError:
        return False
    finally:
        connection.close()


def supernode(folder: Path, address: str, relay: Path) -> list[str]:
    """The hospital's end: one connection, outwards, and `watch` over it."""
    program(SUPERNODE)
    keys = folder / "keys"
    secured = ["--root-certificates", keys / CA, "--auth-supernode-private-key", keys / NODE_KEY]
    inside = ["--host", "127.0.0.1", "--port", str(free_port()), "--node-config", f"consilium-socket={quoted(relay)}"]
    return [sys.executable, "-m", watch.__name__, "--superlink", address, *map(str, secured), *inside]


def write_connection(folder: Path, address: str) -> None:
    """Where Flower's command line finds the SuperLink: on this machine, as does a run's own process."""
    home = folder / HOME
    home.mkdir(parents=True, exist_ok=True)
    here = f"127.0.0.1:{address.rpartition(':')[2]}"
    lines = [f"[superlink.{CONNECTION}]", f'address = "{here}"', f"root-certificates = {quoted(folder / 'keys' / CA)}"]
    (home / "config.toml").write_text("\n".join(["[superlink]", f'default = "{CONNECTION}"', "", *lines]) + "\n")


def flwr(folder: Path, *words: str, timeout: float = 120.0) -> Any:
    """What one call of Flower's command line says, as JSON; StateError where it says that it failed."""
    command, remedy = [program("flwr"), *words, "--format", "json"], "is the SuperLink up? consilium coordinator start"
    try:
        done = subprocess.run(
            command,
            env=environment(folder / HOME),
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=folder,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = f"nothing in {timeout:g} s"
        raise StateError(f"flwr {words[0]} failed", where=str(folder), received=said, remedy=remedy) from error
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {}
    if done.returncode or not isinstance(found, dict) or not found.get("success"):
        said = found.get("error-message") or found.get("error_message") or (done.stderr or done.stdout).strip()[-600:]
        raise StateError(f"flwr {words[0]} failed", where=str(folder), received=said, remedy=remedy)
    return found


def quoted(path: Path) -> str:
    """A path as a value in Flower's words and files, which are TOML; no quotation mark inside ends it."""
    return '"' + json.dumps(str(path), ensure_ascii=False)[1:-1].replace('\\"', "\\u0022") + '"'


def free_port() -> int:
    """A port on this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_port(address: str, tell: Tell, patience: float = 60.0) -> None:
    """Wait until nobody listens on the port of an address, as a SuperLink that is just ending does; StateError where
    somebody stays: what answers there would be taken for the SuperLink that is to be started."""
    port, end, told = int(address.rpartition(":")[2]), time.monotonic() + patience, False
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
                return
            except OSError as error:
                if time.monotonic() >= end:
                    remedy = "stop what listens there, as another `coordinator start`, or agree on another address"
                    raise StateError(
                        "the port is not free", where=f"port {port}", received=error.strerror, remedy=remedy
                    ) from error
        if not told:
            tell({"event": "waiting", "text": f"something listens at port {port}: {patience:.0f} s for it to end"})
            told = True
        time.sleep(1.0)


class Supervised:
    """A program that is started again whenever it ends, until it is stopped. Use as a context manager."""

    def __init__(
        self, name: str, command: Sequence[str], home: Path, log: Path, tell: Tell, pause: float = PAUSE
    ) -> None:
        self.name, self.command, self.home = name, list(command), home
        self.log, self.tell, self.pause = log, tell, pause
        self.process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    def __enter__(self) -> Supervised:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the program and all that it started."""
        self._stopped.set()
        if self.process is not None:
            _end(self.process)
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            try:
                code, why = self._run()
            except OSError as error:  # no process, no file, no memory to be had now
                code, why = None, f"it could not be started: {error}"
            if not self._stopped.is_set():
                self.tell({"event": "ended", "program": self.name, "code": code, "why": why, "again_in": self.pause})
                self._stopped.wait(self.pause)

    def _run(self) -> tuple[int | None, str]:
        """To its end: exit code and why."""
        with self.log.open("ab") as out:
            before = out.tell()
            self.process = self._start(out)
            self.tell({"event": "started", "program": self.name, "process": self.process.pid})
            return self.process.wait(), _why(self.log, before)

    def _start(self, out: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            env=environment(self.home),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _why(log: Path, start: int) -> str:
    """What a program that ended wrote last, in an engineer's words where these are known."""
    with log.open("rb") as file:
        file.seek(start)
        said = file.read().decode(errors="replace")
    known = next((words for sign, words in _REASONS.items() if sign in said), "")
    _, ends, why = said.partition(watch.ENDS)
    _, found, rest = said.rpartition("Exit Code: ")
    flowers = " ".join(rest.splitlines()[1:3]) if found else f"see {log.name}"
    return known or (why.splitlines()[0] if ends else flowers)


_REASONS = {
    "CERTIFICATE_VERIFY_FAILED": f"the coordinator is not whom keys/{CA} vouches for",
    "Failed to activate SuperNode": "the coordinator does not know this node's key (is it enrolled?), or still holds "
    "its last connection, for about a minute",
    "401 Unauthorized": "the coordinator no longer took its requests, as after the loss of the SuperLink's database: "
    "it is let in anew by its key",
}


def _end_with_parent() -> None:
    """In the child: the system ends it when this process dies, however that happens: no node without its site."""
    _LIBC.prctl(_PARENT_DIED, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """Ask a program and its children to end, and after a while make them."""
    for sign, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, patience)):
        try:
            os.killpg(process.pid, sign)
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
