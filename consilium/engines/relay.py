"""Engine: a local socket in front of a site's service. In: bytes of a request. Out: bytes of the service's reply.

A federated engine may start a process for every message; that process asks here, and the backbone stays warm in the one
that listens. The socket is a file that only its owner can open, in a folder that only its owner can enter, and the
listener asks the system who calls. One other user may be let in: that of the node, who then can ask, and read nothing
else of the site. Nothing heavy is imported, as the asking process starts anew each time.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from consilium.errors import StateError

LONGEST_PATH = 100  # bytes that every system takes as the name of a socket
LARGEST = 1 << 34  # bytes of one message; a length beyond it is no length
_FOLDERS = Path("/proc/self/fd")  # open ones of this process, where the system has such
_PATIENCE = 60  # seconds without a byte from a caller, who must not keep the next one waiting for ever
_MOMENT = 3.0  # seconds
_LENGTH = struct.Struct("<Q")
Answer = Callable[[bytes], bytes]


class Unreachable(Exception):
    """Nobody listens, or the listener went away before it had answered."""


def ask(path: Path, request: bytes, timeout: float | None = None) -> bytes:
    """Send one request and wait for the reply; Unreachable where there is none. `timeout`: seconds without a byte."""
    try:
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(timeout)
            with _name(path) as name:
                caller.connect(name)
            _send(caller, request)
            return _receive(caller, LARGEST)
    except (OSError, EOFError) as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Other:
    """A user beside the owner who may ask, by the numbers that the system knows."""

    user: int
    group: int


class Listener:
    """Answers one request after the other until it is closed. Use as a context manager. `largest`: bytes of a request;
    of a longer one nothing is read."""

    def __init__(self, path: Path, answer: Answer, other: Other | None = None, largest: int = LARGEST) -> None:
        self.path, self.answer, self.largest = path, answer, largest
        self._users = {os.getuid(), 0} | ({other.user} if other is not None else set())
        self._socket = _bound(path, other)
        self._thread = threading.Thread(target=self._serve, name="relay", daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """No further request is taken. One in work has a moment to end; what it would leave is whole or not there."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(_MOMENT)
        self.path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:  # closed
                return
            with caller, suppress(Exception):  # who went away, or met a fault, gets no answer and may ask again
                caller.settimeout(_PATIENCE)
                if _may_ask(caller, self._users):
                    _send(caller, self.answer(_receive(caller, self.largest)))


def is_nameable(path: Path) -> bool:
    """Whether a socket can lie here: the system takes short names only, and longer ones by way of an open folder."""
    return len(os.fsencode(path)) <= LONGEST_PATH or (
        _FOLDERS.is_dir() and len(os.fsencode(path.name)) < LONGEST_PATH // 2
    )


@contextmanager
def _name(path: Path) -> Iterator[str]:
    """What the system is told of a socket's place."""
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY))
    try:
        yield str(_FOLDERS / str(folder) / path.name)
    finally:
        os.close(folder)


def _bound(path: Path, other: Other | None) -> socket.socket:
    if not is_nameable(path):
        remedy = "choose a folder with a shorter name for it"
        raise StateError(
            "the name of this socket is too long", where=str(path), allowed=f"{LONGEST_PATH} bytes", remedy=remedy
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if other is not None:
        _let_in(path.parent, other, 0o750)
    if path.parent.stat().st_mode & (0o077 if other is None else 0o027):
        remedy = f"chmod {'700' if other is None else '750'} {path.parent}"
        raise StateError("others can enter the folder of the site's socket", where=str(path.parent), remedy=remedy)
    path.unlink(missing_ok=True)  # of a service that was killed: whoever holds the site's lock may take its place
    listener = socket.socket(socket.AF_UNIX)
    with _name(path) as name:
        listener.bind(name)
    path.chmod(0o600)
    if other is not None:
        _let_in(path, other, 0o660)
    listener.listen()
    return listener


def _let_in(path: Path, other: Other, mode: int) -> None:
    """Give a file or folder to the group of the other user; StateError where the system does not let us."""
    try:
        os.chown(path, -1, other.group)
        path.chmod(mode)
    except OSError as error:
        remedy = "make the user of the service a member of the node's group (usermod -aG), and log in anew"
        raise StateError(
            "the node's user cannot be let in", where=str(path), received=str(error), remedy=remedy
        ) from error


def _may_ask(caller: socket.socket, users: set[int]) -> bool:
    """Whether one of these users is at the other end; where the system does not say, the file's permissions do."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, user, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return user in users


def _send(to: socket.socket, data: bytes) -> None:
    to.sendall(_LENGTH.pack(len(data)))
    if data:  # sending nothing fails too where the other end, which has all it waits for, has gone
        to.sendall(data)


def _receive(caller: socket.socket, largest: int) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(caller, _LENGTH.size))
    if length > largest:
        raise EOFError(f"a message of {length} bytes")
    return bytes(_exactly(caller, length))


def _exactly(caller: socket.socket, length: int) -> bytearray:
    data = bytearray()
    while len(data) < length:
        piece = caller.recv(min(length - len(data), 1 << 20))
        if not piece:
            raise EOFError(f"{len(data)} of {length} bytes")
        data += piece
    return data
