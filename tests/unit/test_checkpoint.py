"""Files are whole or absent, damage is noticed wherever it is, and a run folder belongs to one run."""

from __future__ import annotations

import errno
import os
from os.path import isdir
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium import checkpoint, run_folder, tensors
from consilium.errors import StateError

TENSORS = {
    "b": torch.tensor([[1.5, -0.0], [torch.finfo(torch.float32).tiny, 3.0]]),
    "a": torch.arange(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.0, dtype=torch.float64),
}
META = {"round": 7, "sites": ["a", "b"], "nested": {"ä": None, "x": [1.5, True]}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "state.safetensors"
    checkpoint.save(path, TENSORS, META)
    return path


def test_what_is_saved_is_loaded_to_the_last_bit(saved: Path) -> None:
    found, meta = checkpoint.load(saved)
    assert tensors.equal(found, TENSORS)
    assert meta == META
    assert [path.name for path in saved.parent.iterdir()] == ["state.safetensors"]


def test_nothing_can_be_saved_too(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "nothing", {}, {})
    assert checkpoint.load(tmp_path / "nothing") == ({}, {})


def _loaded(path: Path) -> object:
    """What a file says, or the error that it is damaged."""
    try:
        found, meta = checkpoint.load(path)
    except StateError as error:
        return error
    return tensors.digest_all(found), meta


def test_a_flipped_bit_is_noticed_wherever_it_is(saved: Path) -> None:
    whole, meant = saved.read_bytes(), _loaded(saved)
    damaged = 0
    for place in range(len(whole)):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = _loaded(saved)
        damaged += isinstance(found, StateError)
        assert found == meant or (isinstance(found, StateError) and str(saved) in str(found) and found.remedy), place
    assert damaged > len(whole) - 10  # the rest pads a header


def test_a_cut_file_is_noticed_wherever_it_is_cut(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        with pytest.raises(StateError):
            checkpoint.load(saved)
    saved.unlink()
    with pytest.raises(StateError, match="cannot be read"):
        checkpoint.load(saved)


@given(meta=st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.booleans()))
def test_any_json_survives(tmp_path_factory: pytest.TempPathFactory, meta: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    checkpoint.save(path, {"x": torch.ones(1)}, meta)
    assert checkpoint.load(path)[1] == meta


# ------------------------------------------------------------------------------------------------ whole or absent
@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "file"
    checkpoint.write_bytes(path, b"earlier")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(moment, full)
        with pytest.raises(StateError, match=r"(?s)could not be written.*file.*No space left.*--resume"):
            checkpoint.write_bytes(path, b"later")
    assert {child.name: child.read_bytes() for child in tmp_path.iterdir()} == {"file": b"earlier"}


def test_the_folder_is_flushed_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[bool, bool]] = []
    monkeypatch.setattr("os.fsync", lambda number: flushed.append((isdir(number), (tmp_path / "file").exists())))
    checkpoint.write_bytes(tmp_path / "file", b"whole")
    assert flushed == [(False, False), (True, True)]


def test_an_interrupted_write_leaves_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_bytes(tmp_path / "file", b"later")
    assert list(tmp_path.iterdir()) == []


def test_where_no_folder_can_be_the_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="could not be written"):
        checkpoint.write_json(tmp_path / "file" / "below", {})


def test_json_is_strict_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"b": 1, "a": [None, 0.1]})
    assert checkpoint.read_json(path) == {"b": 1, "a": [None, 0.1]}
    assert path.read_bytes().endswith(b"}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(path, {"x": float("nan")})
    assert checkpoint.read_json(path) == {"b": 1, "a": [None, 0.1]}
    for content in (b"{", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(StateError, match=r"x\.json"):
            checkpoint.read_json(path)


# ------------------------------------------------------------------------------------------------ whose folder it is
def _open(folder: Path, resume: bool = False, **identity: str) -> None:
    with run_folder.claimed(folder, resume):
        run_folder.open_run(folder, identity, {"config": {"train": {"rounds": identity["config_hash"]}}}, b"split")


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    _open(out, config_hash="1", code="x")
    assert (out / "split.parquet").read_bytes() == b"split"
    with pytest.raises(StateError, match="already holds a run"):
        _open(out, config_hash="1", code="x")
    _open(out, resume=True, config_hash="1", code="x")
    with pytest.raises(StateError, match=r"different: config_hash, train\.rounds"):
        _open(out, resume=True, config_hash="2", code="x")
    with pytest.raises(StateError, match="different: code\n"):
        _open(out, resume=True, config_hash="1", code="y")


def test_a_folder_is_claimed_once_at_a_time_and_released_after_an_error(tmp_path: Path) -> None:
    with run_folder.claimed(tmp_path, False):
        with pytest.raises(StateError, match="another process"), run_folder.claimed(tmp_path, True):
            pytest.fail("claimed twice")
        run_folder.open_run(tmp_path, {}, {"config": {}}, b"")
    with pytest.raises(ZeroDivisionError), run_folder.claimed(tmp_path, True):
        raise ZeroDivisionError
    with run_folder.claimed(tmp_path, True):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_never_began_leaves_the_folder_as_it_was(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(ZeroDivisionError), run_folder.claimed(out, False):
        raise ZeroDivisionError
    assert out.exists() == there
    assert not there or list(out.iterdir()) == []


def test_what_a_killed_process_left_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".config.json.17.tmp").write_text("{")
    _open(tmp_path, config_hash="1")
    (tmp_path / "split.parquet").unlink()
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / ".state.17.tmp").write_text("")
    _open(tmp_path, resume=True, config_hash="1")
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {".lock", "config.json", "split.parquet", "sites"}


@pytest.mark.parametrize("name", ["notes.txt", "split.parquet", ".hidden"])
def test_whatever_else_lies_there_is_somebody_elses(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(StateError, match="not empty and holds no run"):
        _open(tmp_path, config_hash="1")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"
