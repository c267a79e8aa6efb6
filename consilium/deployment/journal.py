"""Composition: what left a hospital. In: messages. Out: a file that only grows, each line sealed by the one before.

A line holds the SHA-256 of the line before it, so that none can be changed, taken out or put in without breaking every
line after it; the number of lines and the last hash stand in a file beside it, so that a cut end shows too. Whoever
keeps a copy of a hash, on paper or at another place, can tell later whether all lines up to it are still as they were.
Nothing leaves that could not be written here first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilium import checkpoint
from consilium.deployment.log import now
from consilium.errors import StateError

JOURNAL, HEAD, START = "journal.jsonl", "journal.head.json", "0" * 64
Entry = dict[str, Any]


@dataclass(frozen=True)
class Journal:
    """The file in a site's folder; one process at a time writes it, as one serves the folder."""

    folder: Path

    def add(self, entry: Mapping[str, Any]) -> str:
        """Write a line and flush it; its hash. StateError where it cannot be written: then nothing leaves."""
        head = self._head()
        self._drop_torn()
        line = _text({"number": head["lines"] + 1, "time": now(), "before": head["hash"], **entry})
        found = hashlib.sha256(line.encode()).hexdigest()
        checkpoint.append_line(self.folder / JOURNAL, line)
        checkpoint.write_json(self.folder / HEAD, {"lines": head["lines"] + 1, "hash": found})
        return found

    def entries(self) -> Iterator[Entry]:
        """Every line, checked; StateError at the first that is not as it was written."""
        path, before, count = self.folder / JOURNAL, START, 0
        for count, line in enumerate(self._lines(), start=1):
            entry = _parsed(line, path, count)
            if entry.get("before") != before or entry.get("number") != count:
                raise _broken(path, count, "it does not follow the line before it")
            before = hashlib.sha256(line).hexdigest()
            yield entry
        head = self._head()
        if (count, before) != (head["lines"], head["hash"]):
            raise _broken(path, count, f"the file ends here, and {HEAD} knows of {head['lines']} lines")

    def _lines(self) -> list[bytes]:
        """Whole lines; one without an end is what a power cut left, and what it speaks of never left the hospital."""
        path = self.folder / JOURNAL
        return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []

    def _drop_torn(self) -> None:
        """Before a line is added: it must not go on where a torn one ends."""
        path, size = self.folder / JOURNAL, sum(len(line) + 1 for line in self._lines())
        if path.is_file() and path.stat().st_size > size:
            checkpoint.cut(path, size)

    def _head(self) -> Entry:
        """The end of the file; a line that a crash left without its head is taken in, as it was written whole."""
        head, lines = self._read_head(), self._lines()
        if len(lines) == head["lines"] + 1:
            last = _parsed(lines[-1], self.folder / JOURNAL, len(lines))
            if last.get("before") == head["hash"]:
                return {"lines": len(lines), "hash": hashlib.sha256(lines[-1]).hexdigest()}
        if len(lines) != head["lines"]:
            raise _broken(self.folder / JOURNAL, len(lines), f"{HEAD} knows of {head['lines']} lines")
        return head

    def _read_head(self) -> Entry:
        path = self.folder / HEAD
        found = checkpoint.read_json(path) if path.is_file() else {"lines": 0, "hash": START}
        if not isinstance(found, dict) or not isinstance(found.get("lines"), int) or type(found.get("hash")) is not str:
            raise StateError("the end of the journal cannot be read", where=str(path))
        return found

    def last(self) -> str:
        """Hash of the last line, to be kept at another place."""
        return str(self._head()["hash"])


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


def _parsed(line: bytes, path: Path, number: int) -> Entry:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise _broken(path, number, "it is no JSON") from error
    if not isinstance(found, dict):
        raise _broken(path, number, "it is no table")
    return found


def _broken(path: Path, number: int, why: str) -> StateError:
    remedy = "keep the file as it is, and find out who changed it; move it away only after that"
    return StateError(
        "the journal is not as it was written", where=f"{path}, line {number}", received=why, remedy=remedy
    )


def _text(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"))
