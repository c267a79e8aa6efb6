"""Composition: the coordinator's port. In: Flower's SuperLink. Out: the same; others reach the nodes' part of it only.

Flower serves three interfaces on one port. The nodes' asks for a registered key. The one by which runs are begun asks
for nothing: whoever reached it could make the coordinator and every node run any code. So all but the nodes' interface
is for callers on this machine. No part of Flower is changed: what it hands to its web server goes through here.

It starts the coordinator's program by another one that it does not look after. Without that one it would take runs and
begin none; so it ends then, and its supervisor starts both anew.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import entry_points
from ipaddress import ip_address
from typing import Any

from consilium.deployment import watch

SUPERLINK, NODES, HERE = "flower-superlink", "/v1/fleet/", "/consilium/door"
HANDED_ON = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")  # headers of proxies
ALONE = {"proxy_headers": False}  # of uvicorn: else FORWARDED_ALLOW_IPS would let callers say who they are
Scope = MutableMapping[str, Any]
Send = Callable[[Scope], Awaitable[None]]
Receive = Callable[[], Awaitable[Scope]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Door:
    """A web application in front of another one."""

    def __init__(self, inner: App) -> None:
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on what may pass; 403 for the rest, 204 for who asks whether there is a door."""
        if scope["type"] == "http" and scope["path"] == HERE:
            await _answer(send, 204)
        elif scope["type"] == "lifespan" or _is_local(scope) or _is_of_nodes(scope):
            await self.inner(scope, receive, send)
        elif scope["type"] == "http":
            await _answer(send, 403)
        else:
            await send({"type": "websocket.close", "code": 1008})


def _is_local(scope: Scope) -> bool:
    """Whether a program of this machine calls, and does not say that it hands on the call of another."""
    try:
        here = ip_address(scope["client"][0]).is_loopback
    except (KeyError, TypeError, ValueError):
        return False
    return here and not any(name.lower() in HANDED_ON for name, _ in scope.get("headers", ()))


def _is_of_nodes(scope: Scope) -> bool:
    """Whether a path is of the nodes' part, however whoever is behind the door may read it."""
    path = str(scope["path"])
    odd = {"", ".", ".."} & set(path.replace("\\", "/").split("/")[1:])
    return scope["type"] == "http" and path.startswith(NODES) and not odd and "%" not in path and ";" not in path


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def look() -> None:
    """End when the program has ended that starts the coordinator's."""
    watch.await_child()
    watch.say("the program that starts the coordinator's has ended (flower-superexec)")
    watch.end()


def main() -> None:
    """Flower's own program, with the words of the command line, behind the door."""
    import uvicorn

    web: Any = uvicorn
    serve = web.run

    web.run = lambda app, **settings: serve(Door(app), **settings, **ALONE)
    threading.Thread(target=look, daemon=True).start()
    (program,) = entry_points(group="console_scripts", name=SUPERLINK)
    sys.argv[0] = SUPERLINK
    program.load()()


if __name__ == "__main__":
    main()
