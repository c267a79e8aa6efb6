"""Between a node and the SuperLink, a process of its own: PORT TO MARK. File MARK cuts it."""

from __future__ import annotations

import selectors
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path


def serve(port: int, to: int, mark: Path) -> None:
    """Until the process is killed."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            near, _ = listener.accept()
            threading.Thread(target=carry, args=(near, to, mark), daemon=True).start()


def carry(near: socket.socket, to: int, mark: Path) -> None:
    """Bytes both ways, until an end goes or the way is cut."""
    with near, suppress(OSError):
        if mark.exists():  # an end of file, whatever has come in by now: a socket with bytes left in it would be reset
            near.shutdown(socket.SHUT_WR)
            near.settimeout(10)
            while near.recv(1 << 16):
                pass
            return
        with socket.create_connection(("127.0.0.1", to)) as far, selectors.DefaultSelector() as ready:
            ends = {near: far, far: near}
            for end in ends:
                ready.register(end, selectors.EVENT_READ)
            while not mark.exists():
                for key, _ in ready.select(0.2):
                    end = near if key.fileobj is near else far
                    if not (piece := end.recv(1 << 16)):
                        return
                    ends[end].sendall(piece)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
