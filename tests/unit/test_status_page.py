"""The page of a run: what the verb says and the closed rounds, escaped, for this machine alone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from consilium.deployment import board, page
from consilium.errors import ConfigError, StateError
from consilium.progress import sparkline

LINE = {
    "round": 1,
    "seconds": 2.25,
    "bytes": {"up": {"alpine": 1000, "harbour": 500}, "down": {"alpine": 70, "harbour": 30}},
    "sites": {"alpine": {"status": "ok"}, "harbour": {"status": "late"}},
    "val_mean": {"balanced_accuracy": 0.25},
}
FEDERATION = """
name = "skin & <b>more"
[task]
classes = ["a", "b"]
[backbone]
name = "test_vit"
weights = "random"
image_size = 32
[[tuner]]
name = "lora"
[strategy]
name = "fedavg"
[deployment]
sites = ["alpine", "harbour"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "federation.toml").write_text(FEDERATION)
    sites = {
        "alpine": {"status": "training", "since": "2026-01-02T03:04:05.000+00:00", "message": ""},
        "harbour": {"status": "lost", "since": "2026-01-02T03:04:06.000+00:00", "message": "<script>1</script>"},
    }
    table = {"state": "failed", "round": 2, "rounds": 3, "closed": 1, "sites": sites, "message": "too few sites"}
    (tmp_path / board.STATUS).write_text(json.dumps({**table, "time": board.now()}))
    (tmp_path / "run").mkdir()
    whole = [LINE, {**LINE, "round": 2, "val_mean": {"balanced_accuracy": 0.5}}]
    text = "\n".join(json.dumps(line) for line in whole) + '\n{"round": 3, "sec'
    (tmp_path / "run" / "events.jsonl").write_text(text)
    return tmp_path


def got(folder: Path, request: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one call, without a network."""
    here, there = socket.socketpair()
    with here, there:
        here.sendall(request.encode())
        here.shutdown(socket.SHUT_WR)
        page._Handler(folder, there, ("127.0.0.1", 1), None)
        there.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: here.recv(65536), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    first, *lines = head.splitlines()
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


def test_the_page_says_what_the_verb_says(folder: Path) -> None:
    text = page.html(folder)
    for said in ("failed", "training", "03:04:05", "too few sites", "1 of 2, harbour late", "3.0 kB", "200 bytes"):
        assert said in text
    assert f"0.500 {sparkline([0.25, 0.5])}" in text
    assert text.index('<td class="n">2<') < text.index('<td class="n">1<')


def test_no_name_and_no_message_becomes_markup(folder: Path) -> None:
    text = page.html(folder)
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;1" in text


def test_nothing_is_asked_of_another_server(folder: Path) -> None:
    status, headers, body = got(folder, "GET / HTTP/1.0\r\nHost: localhost:8000\r\n\r\n")
    assert (status, headers["Content-Security-Policy"]) == (200, page.POLICY)
    assert "http" not in body.replace('http-equiv="refresh"', "")
    assert "src=" not in body


def test_the_same_as_json(folder: Path) -> None:
    status, _, body = got(folder, "GET /status.json HTTP/1.0\r\nHost: 127.0.0.1:8000\r\n\r\n")
    assert (status, json.loads(body)["sites"]["harbour"]["status"]) == (200, "lost")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET / HTTP/1.0\r\nHost: hostile.example.org:8000\r\n\r\n", 403),
        ("GET / HTTP/1.0\r\n\r\n", 403),
        ("GET /../keys/server.key HTTP/1.0\r\nHost: localhost:8000\r\n\r\n", 404),
        ("GET /keys/server.key HTTP/1.0\r\nHost: localhost:8000\r\n\r\n", 404),
        ("POST / HTTP/1.0\r\nHost: localhost:8000\r\n\r\n", 501),
    ],
)
def test_nothing_else_is_answered(request_: str, status: int, folder: Path) -> None:
    assert got(folder, request_)[0] == status


def test_a_page_while_somebody_edits_the_agreement(folder: Path) -> None:
    with (folder / "federation.toml").open("a") as file:
        file.write("sites = [")
    status, _, body = got(folder, "GET / HTTP/1.0\r\nHost: localhost:8000\r\n\r\n")
    assert status == 200
    assert "too few sites" in body


def test_a_page_before_any_run(folder: Path) -> None:
    (folder / board.STATUS).unlink()
    (folder / "run" / "events.jsonl").unlink()
    assert "no run was begun here" in page.html(folder)


def test_it_is_served_to_this_machine_until_it_is_ended(folder: Path) -> None:
    said: list[str] = []
    page.serve(folder, 0, said.append, lambda: None)
    assert said[0].startswith("http://127.0.0.1:")


def test_a_port_that_is_taken_and_a_folder_that_is_none(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StateError, match="cannot be served"):
            page.serve(folder, taken.getsockname()[1], print, lambda: None)
    with pytest.raises(ConfigError):
        page.serve(tmp_path / "nowhere", 0, print, lambda: None)
