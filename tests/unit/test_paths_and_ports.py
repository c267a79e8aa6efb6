"""Folders with odd names, in Flower's words and files; addresses and ports that its server cannot have."""

from __future__ import annotations

import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flwr.common.config import parse_config_args

from consilium.deployment import processes
from consilium.deployment.files import Deployment
from consilium.errors import StateError

NAMES = [
    "plain",
    "with space",
    "umläut",
    "O'Brien",
    'quo"te',
    "back\\slash",
    "a'b\" c=d",
    "tab\there",
    "new\nline",
    "x#y[z]",
]


@pytest.mark.parametrize("name", NAMES)
def test_flower_reads_the_path_that_was_meant(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    words = processes.supernode(folder, "127.0.0.1:9092", folder / "socket")
    given = words[words.index("--node-config") + 1]
    assert parse_config_args([given]) == {"consilium-socket": str(folder / "socket")}
    processes.write_connection(folder, "127.0.0.1:9092")
    table = tomllib.loads((folder / processes.HOME / "config.toml").read_text(encoding="utf-8"))
    (connection,) = (each for each in table["superlink"].values() if isinstance(each, dict))
    assert connection["root-certificates"] == str(folder / "keys" / processes.CA)


def test_a_program_of_flowers_that_says_nothing_is_no_fault_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "flwr"
    silent.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    silent.chmod(0o755)
    monkeypatch.setattr(processes, "program", lambda _: str(silent))
    with pytest.raises(StateError, match=r"flwr list failed(.|\n)*nothing in 0.1 s(.|\n)*coordinator start"):
        processes.flwr(tmp_path, "list", timeout=0.1)


def test_a_port_that_somebody_else_has_is_named_and_not_taken_for_ours() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{other.getsockname()[1]}"
        other.listen()
        with pytest.raises(StateError, match=r"the port is not free(.|\n)*coordinator start"):
            processes.await_port(address, print, patience=0)
        told: list[Mapping[str, object]] = []
        with pytest.raises(StateError, match="the port is not free"):
            processes.await_port(address, told.append, patience=0.01)
        assert [event["event"] for event in told] == ["waiting"]
    processes.await_port(address, print, patience=0)


@pytest.mark.parametrize("address", ["[::1]:9092", "::1:9092", "[2001:db8::7]:443"])
def test_an_address_that_nobody_would_listen_on_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="no IPv6 address"):
        Deployment(sites=("a",), address=address)
