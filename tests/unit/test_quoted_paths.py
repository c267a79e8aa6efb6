"""Folders with odd names, in Flower's words and files; addresses that its server does not listen on."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flwr.common.config import parse_config_args

from consilium.deployment import processes
from consilium.deployment.files import Deployment

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


@pytest.mark.parametrize("address", ["[::1]:9092", "::1:9092", "[2001:db8::7]:443"])
def test_an_address_that_nobody_would_listen_on_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="no IPv6 address"):
        Deployment(sites=("a",), address=address)
