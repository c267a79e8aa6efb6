"""Composition: what left a hospital. In: messages. Out: a file that only grows, each line sealed by the one before.

A line holds the SHA-256 of the line before it, so that none can be changed, taken out or put in without breaking every
line after it; the number of lines and bytes and the last hash stand in a file beside it, its head, so that a cut end
shows too. Whoever keeps a copy of a hash, on paper or at another place, can tell later whether all lines up to it are
still as they were. Nothing leaves that could not be written here first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from consilium import checkpoint
from consilium.deployment.log import now
from consilium.errors import StateError

JOURNAL, HEAD, START = "journal.jsonl", "journal.head.json", "0" * 64
_BLOCK = 1 << 16  # bytes; a line has less, as a rule
Entry = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Journal:
    """The file in a site's folder; one process at a time writes it, as one serves the folder."""

    folder: Path

    def add(self, entry: Mapping[str, Any]) -> str:
        """Write a line and flush it; its hash. StateError where it cannot be written: then nothing leaves.

        Of the file only the last line is read: its hash and the file's length must be what the head says of them.
        """
        path, (line, size, torn) = self.folder / JOURNAL, _tail(self.folder / JOURNAL)
        known = self._read_head()
        head = self._agreed(known, line, size)
        if head != known:  # or a second crash would leave two lines without one
            checkpoint.write_json(self.folder / HEAD, head)
        if torn:  # the new line must not go on where a torn one ends
            checkpoint.cut(path, size)
        text = _text({"number": head["lines"] + 1, "time": now(), "before": head["hash"], **entry})
        found = _head(head["lines"] + 1, text.encode(), size + len(text.encode()) + 1)
        checkpoint.append_line(path, text)
        checkpoint.write_json(self.folder / HEAD, found)
        return str(found["hash"])

    def entries(self) -> Iterator[Entry]:
        """Every line, checked; StateError at the first that is not as it was written."""
        path, before, count, line = self.folder / JOURNAL, START, 0, None
        head, lines = self._still(self._lines)
        for count, line in enumerate(lines, start=1):
            entry = _parsed(line, f"{path}, line {count}")
            if entry.get("before") != before or entry.get("number") != count:
                raise _broken(f"{path}, line {count}", "it does not follow the line before it")
            before = _hash(line)
            yield entry
        if self._agreed(head, line, sum(len(each) + 1 for each in lines))["lines"] != count:
            raise _broken(f"{path}, line {count}", f"the file ends here, and {HEAD} knows of {head['lines']} lines")

    def last(self) -> str:
        """Hash of the last line, to be kept at another place."""
        head, (line, size, _) = self._still(lambda: _tail(self.folder / JOURNAL))
        return str(self._agreed(head, line, size)["hash"])

    def _lines(self) -> list[bytes]:
        """Whole lines; one without an end is what a power cut left, and what it speaks of never left the hospital."""
        path = self.folder / JOURNAL
        return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []

    def _still(self, read: Callable[[], T]) -> tuple[Entry, T]:
        """The head, and what is read of the file while the head stays the same: the site's service may be writing."""
        while True:
            head, found = self._read_head(), read()
            if head == self._read_head():
                return head, found

    def _agreed(self, head: Entry, line: bytes | None, size: int) -> Entry:
        """The head of a file whose last line and length are these; a line that a crash left without its head is taken
        in, as it was written whole. StateError where the file does not end as the head says."""
        where = str(self.folder / JOURNAL)
        if size == head["bytes"] and (START if line is None else _hash(line)) == head["hash"]:
            return head
        last = {} if line is None else _parsed(line, f"the last line of {where}")
        follows = (last.get("before"), last.get("number")) == (head["hash"], head["lines"] + 1)
        if line is None or not follows or size != head["bytes"] + len(line) + 1:
            raise _broken(where, f"it does not end as {HEAD} says, which knows of {head['lines']} lines")
        return _head(head["lines"] + 1, line, size)

    def _read_head(self) -> Entry:
        path = self.folder / HEAD
        found = checkpoint.read_json(path) if path.is_file() else {"lines": 0, "hash": START, "bytes": 0}
        kinds = {"lines": int, "hash": str, "bytes": int}
        if not isinstance(found, dict) or any(type(found.get(key)) is not kind for key, kind in kinds.items()):
            raise StateError("the end of the journal cannot be read", where=str(path))
        return found


def _tail(path: Path) -> tuple[bytes | None, int, int]:
    """The last whole line, how many bytes it and all before it have, and how many of a torn one come after that."""
    if not path.is_file():
        return None, 0, 0
    with path.open("rb") as file:
        size = start = file.seek(0, os.SEEK_END)
        data, block = b"", _BLOCK
        while start and data.count(b"\n") < 2:
            start, block = max(0, start - block), 2 * block  # else a long torn end is looked through again and again
            file.seek(start)
            data = file.read(size - len(data) - start) + data
    whole, end, torn = data.rpartition(b"\n")
    return (whole.rpartition(b"\n")[2] if end else None), size - len(torn), len(torn)


def _head(lines: int, last: bytes, size: int) -> Entry:
    return {"lines": lines, "hash": _hash(last), "bytes": size}


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def table(entries: Iterable[Entry]) -> list[dict[str, object]]:
    """A row per message, for people."""
    return [
        {
            "line": entry["number"],
            "time (UTC)": entry["time"][:19].replace("T", " "),
            "asked": f"{entry['kind']} {entry['round']}",
            "run": entry["run"],
            "bytes out": entry["reply"]["bytes"],
            "tensors": len(entry["tensors"]),
            "numbers": len(entry["numbers"]),
            "blanked": len(entry["blanked"]),
            "refused": (entry["failure"] or {}).get("message", ""),
        }
        for entry in entries
    ]


def _parsed(line: bytes, where: str) -> Entry:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise _broken(where, "it is no JSON") from error
    if not isinstance(found, dict):
        raise _broken(where, "it is no table")
    return found


def _broken(where: str, why: str) -> StateError:
    remedy = "keep the file as it is, and find out who changed it; move it away only after that"
    return StateError("the journal is not as it was written", where=where, received=why, remedy=remedy)


def _text(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"))
