"""What a person at a hospital approves and takes back: noted for good, and heeded by the next message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from consilium.deployment import approvals, files
from consilium.deployment.gate import Gate, GateConfig
from consilium.deployment.guard import Guard
from consilium.deployment.journal import Journal
from consilium.engines.resident import Resident
from consilium.errors import ConfigError, StateError
from consilium.messages import envelope_of
from tests.commands import call
from tests.hospitals_apart import FEDERATION, Apart, made

ASKS = GateConfig(min_patients=1, approval=True)
SILENT = GateConfig(min_patients=1)
OURS, OTHER = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """A finished run: its requests can be asked again."""
    found = made(tmp_path_factory.mktemp("approvals"), FEDERATION.replace("rounds = 3", "rounds = 1"))
    found.conduct()
    return found


def guard(apart: Apart, folder: Path, rules: GateConfig) -> Guard:
    """Of one service that is never started anew."""
    site = apart.resident("alpine").site
    return Guard(Resident(site, lambda _: None), Gate(rules, site.experiment, site.data, folder), Journal(folder))


def request(apart: Apart) -> bytes:
    return next(data for site, data, _ in apart.seen if site == "alpine" and envelope_of(data)["kind"] == "round")


def said(door: Guard, data: bytes) -> str:
    failure = envelope_of(door.answer(data))["failure"]
    return "" if failure is None else f"{failure['code']}: {failure['message']}"


def agreement(apart: Apart) -> str:
    return apart.resident("alpine").site.experiment.handshake.agreement


# ------------------------------------------------------------------------------------------------ the gate
def test_a_word_counts_from_the_next_request_on(apart: Apart, tmp_path: Path) -> None:
    door, data = guard(apart, tmp_path, ASKS), request(apart)
    before = sorted(path.name for path in apart.resident("alpine").site.folder.rglob("*"))
    approvals.approve(tmp_path, OTHER, "Dr Rivera")
    assert said(door, data).startswith("refused: nobody at the site has approved agreement")
    approvals.approve(tmp_path, agreement(apart), "Dr Rivera")
    assert said(door, data) == ""
    approvals.withdraw(tmp_path, "Dr Okafor", agreement(apart)[:12])
    assert said(door, data) == f"refused: the site has taken back its approval of agreement {agreement(apart)[:16]}"
    approvals.approve(tmp_path, agreement(apart), "Dr Rivera")
    assert said(door, data) == ""
    assert sorted(path.name for path in apart.resident("alpine").site.folder.rglob("*")) == before


def test_what_was_taken_back_is_out_also_where_no_approval_is_asked_for(apart: Apart, tmp_path: Path) -> None:
    door, data = guard(apart, tmp_path, SILENT), request(apart)
    assert said(door, data) == ""
    approvals.approve(tmp_path, agreement(apart), "Dr Rivera")
    approvals.withdraw(tmp_path, "Dr Rivera")
    assert "taken back" in said(door, data)


def test_a_reply_does_not_leave_where_the_word_is_taken_back_while_the_site_works(apart: Apart, tmp_path: Path) -> None:
    door, data = guard(apart, tmp_path, ASKS), request(apart)
    approvals.approve(tmp_path, agreement(apart), "Dr Rivera")
    fields, reply = envelope_of(data), apart.resident("alpine").answer(data)
    assert door.gate.refusal(fields) is None
    approvals.withdraw(tmp_path, "Dr Rivera")
    out = envelope_of(door.gate.let_out(fields, reply)[0])
    assert (out["failure"]["code"], out["num_examples"], out["numbers"]) == ("refused", 0, {})


@pytest.mark.parametrize("rules", [ASKS, SILENT])
@pytest.mark.parametrize("text", ["{", '"word"\n', '{"word": "approved"}\n', "\xff\n"])
def test_nothing_leaves_while_approvals_cannot_be_read(
    apart: Apart, tmp_path: Path, rules: GateConfig, text: str
) -> None:
    (tmp_path / approvals.APPROVALS).write_bytes(text.encode("latin-1"))
    assert said(guard(apart, tmp_path, rules), request(apart)).startswith(
        "refused: the site's approvals cannot be read"
    )


def test_no_name_of_a_person_leaves(apart: Apart, tmp_path: Path) -> None:
    approvals.approve(tmp_path, agreement(apart), "Dr Rivera")
    approvals.withdraw(tmp_path, "Dr Okafor")
    reply = guard(apart, tmp_path, ASKS).answer(request(apart))
    assert b"Rivera" not in reply
    assert b"Okafor" not in reply


# ------------------------------------------------------------------------------------------------ the file
def test_nothing_that_was_said_is_ever_lost(tmp_path: Path) -> None:
    approvals.approve(tmp_path, OURS, "Dr Rivera")
    first = (tmp_path / approvals.APPROVALS).read_bytes()
    approvals.withdraw(tmp_path, " Dr Okafor ")
    approvals.approve(tmp_path, OURS, "Dr Rivera")
    assert (tmp_path / approvals.APPROVALS).read_bytes().startswith(first)
    rows = approvals.history(tmp_path)
    assert [(row["word"], row["by"]) for row in rows] == [
        ("approved", "Dr Rivera"),
        ("withdrawn", "Dr Okafor"),
        ("approved", "Dr Rivera"),
    ]
    assert approvals.standing(tmp_path) == {OURS: rows[-1]}
    assert all(row["time"].endswith("+00:00") for row in rows)


def test_which_approval_is_meant_must_be_clear(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no agreement is approved here"):
        approvals.withdraw(tmp_path, "Dr Rivera")
    approvals.approve(tmp_path, OURS, "Dr Rivera")
    approvals.approve(tmp_path, OTHER, "Dr Rivera")
    with pytest.raises(ConfigError, match="say which approval is meant"):
        approvals.withdraw(tmp_path, "Dr Rivera")
    with pytest.raises(ConfigError, match="this agreement is not approved here"):
        approvals.withdraw(tmp_path, "Dr Rivera", "c" * 64)
    for none in ("A" * 64, "zz", "", "bb"):  # a variable of the shell that is empty means no agreement
        with pytest.raises(ConfigError, match="this is no digest of an agreement"):
            approvals.withdraw(tmp_path, "Dr Rivera", none)
    approvals.withdraw(tmp_path, "Dr Rivera", "bbbb")
    with pytest.raises(ConfigError, match="not approved here"):
        approvals.withdraw(tmp_path, "Dr Rivera", OTHER)  # not twice
    approvals.withdraw(tmp_path, "Dr Rivera")  # the only one that is left
    assert {row["word"] for row in approvals.standing(tmp_path).values()} == {"withdrawn"}


@pytest.mark.parametrize("wrong", ["", "g" * 64, "a" * 10])
def test_what_is_no_digest_is_not_approved(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no digest"):
        approvals.approve(tmp_path, wrong, "someone")
    assert not (tmp_path / approvals.APPROVALS).exists()


@pytest.mark.parametrize("nobody", ["", "  "])
def test_a_word_has_a_name(nobody: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a name"):
        approvals.approve(tmp_path, OURS, nobody)


def test_a_damaged_file_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / approvals.APPROVALS).write_text("{\n")
    with pytest.raises(StateError, match="cannot be read"):
        approvals.approve(tmp_path, OURS, "someone")
    assert (tmp_path / approvals.APPROVALS).read_text() == "{\n"


# ------------------------------------------------------------------------------------------------ the verbs
def test_a_person_approves_looks_and_takes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path).at("alpine")

    def listed() -> list[dict[str, Any]]:
        capsys.readouterr()
        assert call("site", "approvals", folder, "--json") == 0
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return found

    assert call("site", "approvals", folder) == 0
    assert "nobody has approved anything" in capsys.readouterr().out
    assert listed() == []
    assert call("site", "withdraw", folder, "--by", "Dr Rivera") == 2
    assert call("site", "approve", folder, "--by", "Dr Rivera", "--yes") == 0
    (row,) = listed()
    assert call("site", "withdraw", folder, "--by", "Dr Okafor", "--digest", "0" * 64) == 2
    assert call("site", "withdraw", folder) == 2  # who?
    assert call("site", "withdraw", folder, "--by", "Dr Okafor", "--digest", row["agreement"][:8]) == 0
    assert [(each["word"], each["by"]) for each in listed()] == [("approved", "Dr Rivera"), ("withdrawn", "Dr Okafor")]
    assert call("site", "approvals", folder) == 0
    assert "Dr Okafor" in capsys.readouterr().out
    (folder / approvals.APPROVALS).write_text("{")
    assert call("site", "approvals", folder) == 1
    (folder / files.SITE).unlink()
    assert call("site", "approvals", folder) == 2
    assert call("site", "withdraw", folder, "--by", "Dr Okafor") == 2
