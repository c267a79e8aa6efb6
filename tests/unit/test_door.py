"""In front of Flower's port: nodes pass from everywhere, all else from this machine alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from consilium.deployment import door
from consilium.deployment.door import HERE, Door

AWAY, CLOSE = ("10.2.3.4", 5000), 1008


def asked(path: str, client: Any, kind: str = "http", *headers: bytes) -> list[Any]:
    """What a caller gets: the inner application's name, or what the door sent."""
    got: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        got.append("inner")

    async def send(message: Any) -> None:
        got.append(message.get("status", message.get("code")))

    async def receive() -> Any:
        return {}

    asyncio.run(
        Door(inner)(
            {"type": kind, "path": path, "client": client, "headers": [(name, b"x") for name in headers]}, receive, send
        )
    )
    return got[:1]


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/fleet/activate-node"])
def test_nodes_pass_from_everywhere(path: str) -> None:
    assert asked(path, AWAY) == ["inner"]


@pytest.mark.parametrize(
    "path",
    ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/x", "/docs", "/", "//v1/fleet/x", "/v1/fleet"],
)
def test_the_rest_is_for_this_machine(path: str) -> None:
    assert asked(path, AWAY) == [403]
    assert asked(path, ("127.0.0.1", 5000)) == asked(path, ("::1", 5000)) == ["inner"]


@pytest.mark.parametrize("client", [None, ("localhost.example.org", 1), ("", 1), ("127.0.0.1.example.org", 1)])
def test_who_has_no_address_of_this_machine_is_away(client: Any) -> None:
    assert asked("/v1/control/start-run", client) == [403]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/start-run",
        "/v1/fleet/./../control",
        "/v1/fleet//../control",
        "/v1/fleet//x",
        "/v1/fleet/..\\control",
        "/v1/fleet/%2e%2e/control",
        "/v1/fleet/;/../control",
        "/V1/FLEET/x",
    ],
)
def test_no_trick_with_a_path_leads_past_the_door(path: str) -> None:
    assert asked(path, AWAY) == [403]


@pytest.mark.parametrize("header", [b"x-forwarded-for", b"X-Forwarded-For", b"forwarded", b"x-real-ip", b"via"])
def test_a_call_that_a_proxy_on_this_machine_hands_on_is_from_away(header: bytes) -> None:
    assert asked("/v1/control/start-run", ("127.0.0.1", 5000), "http", b"host", header) == [403]
    assert asked("/v1/control/start-run", ("127.0.0.1", 5000), "websocket", header) == [CLOSE]
    assert asked("/v1/fleet/pull-messages", ("127.0.0.1", 5000), "http", header) == ["inner"]


def test_no_caller_says_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn believes X-Forwarded-For of whom FORWARDED_ALLOW_IPS names, which may be everybody."""
    uvicorn = pytest.importorskip("uvicorn")
    served: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: served.append((app, settings)))
    program = type("P", (), {"load": lambda _: lambda: uvicorn.run(app="flower", host="0.0.0.0")})
    monkeypatch.setattr(door, "entry_points", lambda **_: (program(),))
    monkeypatch.setattr("sys.argv", ["door"])
    monkeypatch.setattr(door, "look", lambda: None)  # it would end this process
    door.main()
    ((app, settings),) = served
    assert isinstance(app, Door)
    assert settings == {"host": "0.0.0.0", "proxy_headers": False}


def test_other_kinds_of_calls() -> None:
    assert asked("/v1/fleet/x", AWAY, "websocket") == [CLOSE]
    assert asked("", None, "lifespan") == ["inner"]
    assert asked(HERE, AWAY) == [204]
