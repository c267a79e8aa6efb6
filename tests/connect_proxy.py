"""A hospital's proxy as a test double: hands connections on that ask by CONNECT, and notes whereto."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Proxy(ThreadingHTTPServer):
    """Listens on a free port of this machine. `authorization`: what a caller must send, None for nothing."""

    daemon_threads = True

    def __init__(self, authorization: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.authorization = authorization
        self.led: list[str] = []  # host:port, in the order in which they were asked for

    @property
    def port(self) -> int:
        return self.server_port


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_CONNECT(self) -> None:
        given = self.headers.get("Proxy-Authorization")
        if self.server.authorization not in (None, given):
            return self.send_error(407)
        self.server.led.append(self.path)
        _, _, port = self.path.rpartition(":")
        try:
            far = socket.create_connection(("127.0.0.1", int(port)), timeout=30)
        except OSError:
            return self.send_error(502)
        with far:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_carry, args=(far, self.connection), daemon=True)
            back.start()
            _carry(self.connection, far)
            back.join(1)
        self.close_connection = True
        return None

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def _carry(near: socket.socket, far: socket.socket) -> None:
    with suppress(OSError):
        while piece := near.recv(1 << 16):
            far.sendall(piece)
    with suppress(OSError):
        far.shutdown(socket.SHUT_WR)


@contextmanager
def proxy(authorization: str | None = None) -> Iterator[Proxy]:
    """A running one."""
    with Proxy(authorization) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        try:
            yield made
        finally:
            made.shutdown()
