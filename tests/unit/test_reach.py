"""The way to the coordinator, as `site check` looks at it: authority, proxy, clock, a certificate that ends soon."""

from __future__ import annotations

import base64
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from consilium.deployment import init, processes, reach
from tests.connect_proxy import proxy

pytestmark = pytest.mark.loopback
NAMES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")


class Coordinator(BaseHTTPRequestHandler):
    date: str | None = None

    def do_HEAD(self) -> None:
        self.send_response_only(404)
        self.send_header("Date", self.date or self.date_time_string())
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Of a coordinator whose certificate is for example.test and this machine."""
    init.certificates(tmp_path, "example.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / processes.CERTIFICATE, tmp_path / processes.KEY)
    with HTTPServer(("127.0.0.1", 0), Coordinator) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def verdicts(found: list[reach.Finding]) -> dict[str, str]:
    return {each.what: each.verdict for each in found}


def test_a_coordinator_that_is_there(tmp_path: Path, port: int) -> None:
    found = reach.connection(tmp_path / processes.CA, f"127.0.0.1:{port}")
    assert verdicts(found) == {"connection": "good", "clock": "good"}
    assert "proxy" not in found[0].text


def test_another_authority_and_nobody(tmp_path: Path, port: int) -> None:
    (tmp_path / "other").mkdir()
    init.certificates(tmp_path / "other", "example.test")
    (wrong,) = reach.connection(tmp_path / "other" / processes.CA, f"127.0.0.1:{port}")
    assert (wrong.verdict, f"not whom keys/{processes.CA} vouches for" in wrong.text) == ("bad", True)
    (nobody,) = reach.connection(tmp_path / processes.CA, f"127.0.0.1:{processes.free_port()}")
    assert (nobody.verdict, "cannot be reached" in nobody.text) == ("bad", True)
    (missing,) = reach.connection(tmp_path / "away", f"127.0.0.1:{port}")
    assert missing.verdict == "bad"


def test_the_way_leads_through_the_proxy_that_the_environment_names(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is the proxy's to find: this machine knows no example.test."""
    with proxy() as there:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{there.port}")
        found = reach.connection(tmp_path / processes.CA, f"example.test:{port}")
        assert verdicts(found) == {"connection": "good", "clock": "good"}
        assert f"through the proxy 127.0.0.1:{there.port}" in found[0].text
        assert there.led == [f"example.test:{port}"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert verdicts(reach.connection(tmp_path / processes.CA, f"127.0.0.1:{port}"))["connection"] == "good"
        assert len(there.led) == 1, "an excepted host is asked directly"


def test_a_proxy_that_wants_a_password(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known = f"Basic {base64.b64encode(b'clinic:s@cret').decode()}"
    with proxy(known) as there:
        monkeypatch.setenv("https_proxy", f"http://clinic:s%40cret@127.0.0.1:{there.port}")
        (good, _) = reach.connection(tmp_path / processes.CA, f"example.test:{port}")
        assert good.verdict == "good"
        assert "s%40cret" not in good.text
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{there.port}")
        (bad,) = reach.connection(tmp_path / processes.CA, f"example.test:{port}")
        assert (bad.verdict, "407" in bad.text) == ("bad", True)


@pytest.mark.parametrize("named", ["socks5://127.0.0.1:1", "http://127.0.0.1:port", "http://", "http://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used(named: str, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", named)
    (bad,) = reach.connection(tmp_path / processes.CA, f"example.test:{port}")
    assert bad.verdict == "bad"


def test_a_clock_that_is_off(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coordinator, "date", "Wed, 01 Jan 2020 00:00:00 GMT")
    _, clock = reach.connection(tmp_path / processes.CA, f"127.0.0.1:{port}")
    assert clock.verdict == "bad"
    monkeypatch.setattr(Coordinator, "date", "yesterday")
    _, clock = reach.connection(tmp_path / processes.CA, f"127.0.0.1:{port}")
    assert clock.verdict == "doubtful"


def test_a_certificate_that_ends_soon(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "SOON", (init.TRIAL + timedelta(days=1)).total_seconds())
    (link, _) = reach.connection(tmp_path / processes.CA, f"127.0.0.1:{port}")
    assert link.verdict == "doubtful"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a.test, localhost"}, "a.test,localhost,127.0.0.1,::1"),
        ({"no_proxy": "b.test", "NO_PROXY": "a.test"}, "b.test,127.0.0.1,localhost,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_parts_of_one_machine_speak_without_a_proxy(given: dict[str, str], wanted: str) -> None:
    assert reach.without_proxy(given) == {"no_proxy": wanted, "NO_PROXY": wanted}


def test_programs_of_flower_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "a.test")
    assert processes.environment(tmp_path / "home")["no_proxy"] == "a.test,127.0.0.1,localhost,::1"
