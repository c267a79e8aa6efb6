"""Verbs of a deployment with a folder, a file or words that somebody new gets wrong: what is wrong, and what to do."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium import checkpoint, cli
from consilium.deployment import board, consent, files, init, leaflets, office
from consilium.errors import ConfigError, StateError
from tests import commands
from tests.hospitals_apart import FEDERATION, SITE, SITES, Apart, made


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    return made(tmp_path_factory.mktemp("folders"))


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code of a verb, and what it said."""
    code, said = commands.call(*words), capsys.readouterr()
    return code, said.out + said.err


LEADER = [["start"], ["submit"], ["resume"], ["stop"], ["status"], ["status", "--page", "0"], ["status", "--follow"]]
HOSPITAL = [["check"], ["join"], ["approve", "--by", "me"], ["withdraw", "--by", "me"], ["approvals"], ["audit-log"]]


@pytest.mark.parametrize("words", LEADER, ids=" ".join)
@pytest.mark.parametrize("folder", ["alpine", "nowhere", "alpine/keys"])
def test_a_folder_that_is_not_the_coordinators(
    apart: Apart, words: list[str], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *options = words
    code, said = call(capsys, "coordinator", verb, apart.at(folder), *options)
    assert (code, "this is no coordinator's folder" in said) == (2, True), said
    assert str(apart.at(folder)) in said


@pytest.mark.parametrize("words", [*HOSPITAL, ["states"], ["report"]], ids=" ".join)
@pytest.mark.parametrize("folder", ["coordinator", "nowhere", "alpine/site.toml"])
def test_a_folder_that_is_no_hospitals(
    apart: Apart, words: list[str], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *options = words
    code, said = call(capsys, "site", verb, apart.at(folder), *options)
    assert (code, "this is not a hospital's folder" in said, "no site.toml" in said) == (2, True, True), said


def test_no_key_is_taken_into_a_hospitals_folder(apart: Apart, capsys: pytest.CaptureFixture[str]) -> None:
    key = apart.at("alpine") / "keys" / "node.key.pub"
    assert call(capsys, "coordinator", "enrol", apart.at("alpine"), "alpine", key)[0] == 2
    assert not (apart.at("alpine") / files.NODES).exists()


def test_a_fingerprint_is_what_ssh_keygen_tells_the_hospital(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "node.key.pub"
    key.write_text(
        "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBN+oCtYqMOcsJtI+VxCN7YBtRAls"
        "iCmSHgjizPZNTIapzTPnTaAU3OnSqV/a0LzRjl6a2adeG43mPSWPCL/3Sk+WpD+en9+GzLqOGbqX4fZ9k45W1CqPAk"
        "QKXpnwHq+/kg== me@here\n"
    )
    said = call(capsys, "coordinator", "enrol", made(tmp_path).at("coordinator"), "alpine", key)
    assert said == (0, "alpine: SHA256:Z6OSesPBtzZ527Z8TTkPmE0ji1wRDKjlLfbRwP4jkMw\n")  # `ssh-keygen -lf`, OpenSSH 9.2


def test_a_key_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = made(tmp_path)
    leader, path = apart.at("coordinator"), apart.at("coordinator") / files.NODES / "alpine.pub"
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    code, said = call(capsys, "coordinator", "enrol", leader, "alpine", apart.at("harbour") / "keys" / "node.key.pub")
    assert (code, "No space left" in said, path.read_bytes() == before) == (1, True, True)


def test_a_key_that_two_sites_have_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart = made(tmp_path)
    leader, keys = apart.at("coordinator"), {name: apart.at(name) / "keys" / "node.key.pub" for name in SITES}
    code, said = call(capsys, "coordinator", "enrol", leader, "alpine", keys["harbour"])
    assert (code, "warning: harbour has the same key" in said) == (0, True)
    for name in ("alpine", "harbour"):
        assert "warning" not in call(capsys, "coordinator", "enrol", leader, name, keys[name])[1]


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_what_has_ended_is_not_stopped(tmp_path: Path, state: str) -> None:
    (tmp_path / files.FEDERATION).write_text(FEDERATION)
    checkpoint.write_json(tmp_path / office.FLOWER_RUN, {"run": "8"})
    checkpoint.write_json(tmp_path / board.STATUS, {"state": state, "round": 2, "sites": {}})
    with pytest.raises(StateError, match=rf"no run is going on\n.*\n  received: {state}"):
        office.stop(tmp_path)


@pytest.mark.parametrize("words", [["--json", "--follow"], ["--page", "0", "--json"], ["--page", "0", "--follow"]])
def test_words_that_exclude_each_other(apart: Apart, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, said = call(capsys, "coordinator", "status", apart.at("coordinator"), *words)
    assert (code, "one of them" in said) == (2, True)


@pytest.mark.parametrize("digest", ["", "12", "XYZ0", "9b3b0afa8339…"])
@pytest.mark.parametrize(
    "verb", [["check"], ["approve", "--by", "me", "--yes"], ["withdraw", "--by", "me"]], ids=" ".join
)
def test_what_is_no_digest_compares_nothing(
    apart: Apart, verb: list[str], digest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = call(capsys, "site", verb[0], apart.at("alpine"), *verb[1:], "--digest", digest)
    assert (code, "this is no digest of an agreement" in said) == (2, True), said


def test_the_beginning_of_a_digest_is_enough_to_approve(apart: Apart, capsys: pytest.CaptureFixture[str]) -> None:
    digest = consent.terms(apart.at("prairie"))["agreement"]
    words = ["site", "approve", apart.at("prairie"), "--by", "me", "--yes", "--digest"]
    assert call(capsys, *words, digest[:12])[0] == 0
    code, said = call(capsys, *words, "0000")
    assert (code, "another agreement" in said) == (2, True)


def test_the_line_of_the_approvals_that_is_none_is_named(apart: Apart, capsys: pytest.CaptureFixture[str]) -> None:
    folder = apart.at("harbour")
    assert call(capsys, "site", "approve", folder, "--by", "me", "--yes")[0] == 0
    with (folder / "approvals.jsonl").open("a") as file:
        file.write("torn\n")
    code, said = call(capsys, "site", "approvals", folder)
    assert (code, "line 2 is no approval" in said) == (1, True)


# ------------------------------------------------------------------------------------------------ deploy init
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist"),
        ("[sites", "not valid TOML"),
        (f'site = "alpine"\n{SITE}', "names none"),
        (f"{SITE}\n[train]\nrounds = 1", "cannot change the agreement"),
        (f"{SITE}\n[gate]\nmin_image = 1", "min_image"),
    ],
)
def test_a_site_file_that_no_hospital_could_use(tmp_path: Path, text: str | None, said: str) -> None:
    (tmp_path / "federation.toml").write_text(FEDERATION)
    if text is not None:
        (tmp_path / "own.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        init.init(tmp_path / "federation.toml", tmp_path / "made", tmp_path / "own.toml")
    assert not (tmp_path / "made").exists()


def test_no_keys_are_left_of_folders_that_could_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    (tmp_path / "federation.toml").write_text(FEDERATION)
    monkeypatch.setattr(init.leaflets, "site", full)
    with pytest.raises(OSError, match="No space"):
        init.init(tmp_path / "federation.toml", tmp_path / "made")
    assert [*(tmp_path / "made").iterdir()] == []


def test_what_the_system_refuses_is_said_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "federation.toml").write_text(FEDERATION)
    (tmp_path / "taken").write_text("a file")
    words = ["deploy", "init", tmp_path / "federation.toml", "--out", tmp_path / "taken" / "made"]
    code, said = call(capsys, *words)
    assert (code, said.splitlines()[0]) == (1, "error: Not a directory")
    assert "taken" in said
    with pytest.raises(NotADirectoryError):
        cli.main([*map(str, words), "--debug"])


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ('weights = "random"', ""),
        ('weights = "w/model.safetensors"', "as FOLDER/w/model.safetensors"),
        ('weights = "/data/model.safetensors"', "from /data/model.safetensors"),
        ("", "No backbone.weights"),
    ],
)
def test_the_checklist_says_where_the_weights_are_looked_for(tmp_path: Path, weights: str, said: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(FEDERATION.replace('weights = "random"', weights))
    text = leaflets.checklist(path, [tmp_path / "coordinator"])
    assert (" 6. " in text, said in text) == (bool(said), True)


def test_a_journal_that_is_gone_does_not_say_that_nothing_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = made(tmp_path)
    folder = apart.at("alpine")
    code, said = call(capsys, "site", "audit-log", folder)
    assert (code, said) == (0, "nothing has left this hospital\n")
    (folder / files.STATE / "0123456789abcdef").mkdir(parents=True)
    code, said = call(capsys, "site", "audit-log", folder)
    assert (code, "0123456789abcdef" in said, "nothing has left" in said) == (1, True, False)
