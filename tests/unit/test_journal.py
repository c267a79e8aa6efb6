"""The journal of what left a hospital: no line is touched unseen, and a line costs the same in a long one."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium import checkpoint
from consilium.deployment import journal
from consilium.deployment.journal import HEAD, JOURNAL, Journal
from consilium.errors import StateError


def _filled(folder: Path, count: int = 4) -> list[bytes]:
    for number in range(count):
        Journal(folder).add({"what": number})
    return (folder / JOURNAL).read_bytes().splitlines(keepends=True) if count else []


@pytest.mark.parametrize("damage", ["changed", "taken out", "swapped", "cut", "added", "emptied", "no json"])
def test_no_line_can_be_touched_unseen(tmp_path: Path, damage: str) -> None:
    lines = _filled(tmp_path)
    assert [entry["what"] for entry in Journal(tmp_path).entries()] == [0, 1, 2, 3]
    after = {
        "changed": [lines[0], lines[1].replace(b'"what":1', b'"what":7'), *lines[2:]],
        "taken out": [lines[0], *lines[2:]],
        "swapped": [lines[0], lines[2], lines[1], lines[3]],
        "cut": lines[:-1],
        "added": [*lines, lines[-1]],
        "emptied": [],
        "no json": [lines[0], b"oops\n", *lines[2:]],
    }[damage]
    (tmp_path / JOURNAL).write_bytes(b"".join(after))
    with pytest.raises(StateError, match="not as it was written"):
        list(Journal(tmp_path).entries())


def test_the_last_line_is_pinned_by_its_head(tmp_path: Path) -> None:
    lines = _filled(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"".join(lines).replace(b'"what":3', b'"what":7'))
    with pytest.raises(StateError, match="not as it was written"):
        list(Journal(tmp_path).entries())


def test_a_crash_between_line_and_head_is_no_tampering(tmp_path: Path) -> None:
    _filled(tmp_path, 3)
    before = (tmp_path / HEAD).read_text()
    Journal(tmp_path).add({"what": 3})
    (tmp_path / HEAD).write_text(before)
    assert len(list(Journal(tmp_path).entries())) == 4, "before the next line is written, too"
    assert Journal(tmp_path).last() == hashlib.sha256((tmp_path / JOURNAL).read_bytes().splitlines()[-1]).hexdigest()
    Journal(tmp_path).add({"what": 4})
    assert [entry["what"] for entry in Journal(tmp_path).entries()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("torn", [b'{"what":"to', b"\0" * 90, b'{"before":"0"}'])
@pytest.mark.parametrize("lines", [0, 3])
def test_a_line_that_a_power_cut_tore_is_no_tampering(tmp_path: Path, torn: bytes, lines: int) -> None:
    _filled(tmp_path, lines)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(torn)
    assert len(list(Journal(tmp_path).entries())) == lines
    Journal(tmp_path).add({"what": lines})
    assert [entry["what"] for entry in Journal(tmp_path).entries()] == [*range(lines + 1)]


def test_a_line_whose_end_was_cut_off_is_missed(tmp_path: Path) -> None:
    lines = _filled(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"".join(lines)[:-1])
    with pytest.raises(StateError, match="not as it was written"):
        list(Journal(tmp_path).entries())
    with pytest.raises(StateError, match="not as it was written"):
        Journal(tmp_path).add({"what": 9})


def test_a_journal_that_was_touched_takes_no_more_lines(tmp_path: Path) -> None:
    lines = _filled(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[:2]))
    with pytest.raises(StateError, match="not as it was written"):
        Journal(tmp_path).add({"what": 9})


@pytest.mark.parametrize("tail", [b"", b'{"torn'])
def test_a_line_of_another_is_no_line_of_ours(tmp_path: Path, tail: bytes) -> None:
    last = _filled(tmp_path)[-1]
    foreign = json.loads(last) | {"number": 5, "before": hashlib.sha256(b"another").hexdigest()}
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(json.dumps(foreign).encode() + b"\n" + tail)
    for use in (lambda: Journal(tmp_path).add({}), lambda: list(Journal(tmp_path).entries()), Journal(tmp_path).last):
        with pytest.raises(StateError, match="not as it was written"):
            use()


def test_a_line_taken_out_of_the_midst_is_missed_by_the_next_one(tmp_path: Path) -> None:
    lines = _filled(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(StateError, match="does not end as"):
        Journal(tmp_path).add({"what": 9})


def test_a_journal_without_its_head_takes_no_more_lines(tmp_path: Path) -> None:
    _filled(tmp_path)
    (tmp_path / HEAD).unlink()
    with pytest.raises(StateError, match="not as it was written"):
        Journal(tmp_path).add({"what": 9})
    (tmp_path / HEAD).write_text('{"lines": 4, "hash": "0"}')
    with pytest.raises(StateError, match="cannot be read"):
        Journal(tmp_path).add({"what": 9})


def test_a_look_while_the_service_writes_is_of_one_moment(tmp_path: Path) -> None:
    class Busy(Journal):
        def _lines(self) -> list[bytes]:
            found = super()._lines()
            for number in range(len(found), min(6, len(found) + 2)):  # two lines between the look and the head
                Journal(self.folder).add({"what": number})
            return found

    _filled(tmp_path)
    assert [entry["what"] for entry in Busy(tmp_path).entries()] == [*range(6)]


def _and_die(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text + "\n")
    raise SystemExit


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["line", "torn", "headless", "long"]), max_size=12), st.integers(2, 400))
def test_whatever_a_crash_leaves_every_whole_line_counts_once(does: list[str], block: int) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "_BLOCK", block)  # lines shorter and longer than what is read at once
        folder, written = Path(name), list[Any]()
        for number, what in enumerate(does):
            if what == "torn":
                with (folder / JOURNAL).open("ab") as file:
                    file.write(b'{"what":')
                continue
            written.append("x" * 500 if what == "long" else number)
            with pytest.MonkeyPatch.context() as crash:
                if what == "headless":
                    crash.setattr(checkpoint, "append_line", _and_die)
                with suppress(SystemExit):
                    Journal(folder).add({"what": written[-1]})
            last = (folder / JOURNAL).read_bytes().splitlines()[-1]
            assert Journal(folder).last() == hashlib.sha256(last).hexdigest()
        assert [entry["what"] for entry in Journal(folder).entries()] == written


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["flip", "cut", "insert"]))
def test_no_byte_can_be_touched_unseen(at: int, how: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        data = b"".join(_filled(Path(name), 3))
        at %= len(data)
        after = {"flip": bytes([data[at] ^ 1]) + data[at + 1 :], "cut": b"", "insert": b"\n" + data[at:]}[how]
        (Path(name) / JOURNAL).write_bytes(data[:at] + after)
        with pytest.raises(StateError, match="not as it was written"):
            list(Journal(Path(name)).entries())
        if how != "flip":
            with pytest.raises(StateError, match="not as it was written"):
                Journal(Path(name)).add({})


def counted(monkeypatch: pytest.MonkeyPatch, block: int) -> list[int]:
    """Bytes of every read of the journal from now on, which is looked through in blocks of this size at first."""
    monkeypatch.setattr(journal, "_BLOCK", block)
    read: list[int] = []
    plain = io.open

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            read.append(len(data))
            return data

    def opened(file: Any, mode: str = "r", *words: Any) -> Any:
        return Counting(io.FileIO(file)) if Path(file).name == JOURNAL and mode == "rb" else plain(file, mode, *words)

    monkeypatch.setattr(io, "open", opened)
    return read


def test_a_line_costs_as_much_to_write_in_a_long_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, costs = counted(monkeypatch, 1024), []
    for number in range(200):
        read.clear()
        Journal(tmp_path).add({"what": f"{number:04d}"})
        costs.append(sum(read))
    assert costs[0] == 0
    assert 0 < max(costs) <= 1024
    assert (tmp_path / JOURNAL).stat().st_size > 20 * 1024


def test_a_long_torn_end_is_looked_through_in_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(b"".join(_filled(tmp_path, 2)))
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(bytes(1 << 20))
    read = counted(monkeypatch, 1024)
    assert journal._tail(tmp_path / JOURNAL)[1:] == (whole, 1 << 20)
    assert len(read) <= 11
    assert sum(read) <= whole + (1 << 20)
