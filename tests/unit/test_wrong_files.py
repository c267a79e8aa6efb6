"""Files of a deployment that an honest engineer gets wrong: refused with key and remedy, or read as they were meant."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium.deployment import files
from consilium.deployment.files import Deployment
from consilium.engines.failures import unseal
from consilium.errors import ConfigError
from consilium.messages import envelope_of
from tests.hospitals_apart import FEDERATION, Apart, made


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    return made(tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("name", [files.FEDERATION, files.SITE])
@pytest.mark.parametrize(("before", "end"), [(b"", b"\r\n"), (b"\xef\xbb\xbf", b"\n"), (b"\xef\xbb\xbf", b"\r\n")])
def test_marks_and_line_ends_of_another_system_change_nothing(
    apart: Apart, name: str, before: bytes, end: bytes
) -> None:
    path = apart.at("alpine") / name
    text, meant = path.read_bytes(), files.read_site(apart.at("alpine"))
    try:
        path.write_bytes(before + text.replace(b"\n", end))
        assert files.read_site(apart.at("alpine")) == meant
    finally:
        path.write_bytes(text)


@pytest.mark.parametrize("table", ["sites = 3", "engine = []", "backbone = 'x'", "gate = 3", "other = 1"])
def test_a_table_that_is_none(apart: Apart, table: str) -> None:
    path = apart.at("alpine") / files.SITE
    text = path.read_text()
    try:
        path.write_text(f'site = "alpine"\n{table}\n')
        with pytest.raises(ConfigError, match=table.split()[0]):
            files.read_site(apart.at("alpine"))
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    "address",
    [
        "host :9092",
        " host:9092",
        "https://host:9092",
        "a\nb:9092",
        "-x:9092",
        "h\u00f6st:9092",
        "host:\u0663\u0663",
        "host.",
    ],
)
def test_addresses_that_no_certificate_or_command_can_have(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        Deployment(sites=("a",), address=address)
    assert Deployment(sites=("a",), address="xn--hst-sna.example:443").address


def test_two_sites_that_differ_in_case_alone_are_one_folder_on_some_disks(tmp_path: Path) -> None:  # noqa: ARG001
    with pytest.raises(ValueError, match="different names"):
        Deployment(sites=("alpine", "Alpine"))


def test_a_folder_that_was_copied_from_another_hospital_gives_nothing_of_it_away(tmp_path: Path) -> None:
    apart = made(tmp_path)
    apart.conduct()
    asked = next(q for name, q, _ in apart.seen if name == "harbour" and envelope_of(q)["round"] == 3)
    run = envelope_of(asked)["handshake"]["run"]
    ours, theirs = (apart.at(name) / files.STATE / run for name in ("harbour", "alpine"))
    for path in ours.rglob("*.reply"):
        path.unlink()
    for path in theirs.glob("state-*"):
        (ours / path.name).write_bytes(path.read_bytes())
    failure = envelope_of(apart.resident("harbour").answer(asked))["failure"]
    assert failure["code"] == "refused"
    assert "this state is another site's" in unseal(ours, failure["message"])


def test_a_misspelt_table_is_named(tmp_path: Path) -> None:
    (tmp_path / files.FEDERATION).write_text(FEDERATION.replace("[deployment]", "[deployments]"))
    with pytest.raises(ConfigError, match="no table") as caught:
        files.read(tmp_path)
    assert "deployments" in str(caught.value.received)
