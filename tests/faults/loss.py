"""What a fault cost, measured: a look at the disks before it, and another one afterwards.

**Bytes lost** are bytes of what lay on a disk before the fault and was good, and is afterwards neither there, byte for
byte, nor a later version of it: at the coordinator the lines of closed rounds, their newest checkpoint with its totals
of bytes, and the identity of the run; at every site each line of the journal and of the list of failures, the secret,
the states, and the model that it serves.
**Rounds lost** are rounds closed without a site, each such site counted, and closed rounds that were done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from consilium import checkpoint, run_folder
from consilium.deployment import files, journal
from consilium.engines import failures
from consilium.errors import StateError
from tests.faults.loopback import SITES, Loopback

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Look:
    """What was good at a moment. `grows`: whole lines at the beginning of a file; `same`: a file that never changes;
    `numbered`: (tensors, bytes, totals of bytes) of the newest file of a folder, which a later one may replace."""

    grows: dict[Path, bytes] = field(default_factory=dict)
    same: dict[Path, bytes] = field(default_factory=dict)
    numbered: dict[Path, tuple[dict[str, Any], int, Any]] = field(default_factory=dict)
    closed: int = 0

    @classmethod
    def at(cls, made: Loopback) -> Look:
        """All disks of a federation, while it runs."""
        look = cls()
        for path in [*made.run.glob("checkpoints/round-*"), *_of_sites(made, "state/*/s*.safetensors")]:
            try:
                size, (tensors, meta) = path.stat().st_size, checkpoint.load(path)
            except (StateError, FileNotFoundError):  # damaged before the fault, or replaced since it was listed
                continue
            look.numbered[path] = tensors, size, meta.get("ledger")
        rounds = [_number(path) for path in look.numbered if path.parent.name == "checkpoints"]
        grows = [*_of_sites(made, journal.JOURNAL), *_of_sites(made, f"state/*/{failures.LOG}")]
        look.grows.update({path: _whole_lines(path) for path in grows})
        events = _whole_lines(made.run / "events.jsonl").splitlines(keepends=True)
        look.grows[made.run / "events.jsonl"] = b"".join(events[: max(rounds, default=0)])
        same = [made.run / run_folder.CONFIG, *_of_sites(made, files.SECRET)]
        look.same.update({path: path.read_bytes() for path in same if path.is_file()})
        return cls(look.grows, look.same, look.numbered, max(rounds, default=0))

    def missing(self) -> dict[str, int]:
        """Bytes by file, of all that is neither there now nor in a later version."""
        found = {path: _changed(path, data) for path, data in self.grows.items()}
        found |= {path: 0 if _bytes(path) == data else len(data) for path, data in self.same.items()}
        found |= {path: 0 if _kept(path, *kept[::2]) else kept[1] for path, kept in self.numbered.items()}
        return {str(path): size for path, size in found.items() if size}

    def repeated(self, made: Loopback) -> int:
        """Closed rounds whose lines are others now."""
        path = made.run / "events.jsonl"
        return sum(not same for same in _same_lines(path, self.grows[path]))


def without(made: Loopback, rounds: Collection[int]) -> int:
    """Sites' rounds among these that were closed without the site, though it was drawn."""
    rows = [row for event in made.rounds() if event["round"] in rounds for row in event["sites"].values()]
    return sum(row["status"] not in ("ok", "not_drawn") for row in rows)


@dataclass
class Lost:
    """Notes faults for the figures: that one was tried, and, once it is over, what it cost."""

    note: Callable[[str, object], None]
    open: dict[str, tuple[Loopback, Look, dict[str, Any]]] = field(default_factory=dict)

    def before(self, made: Loopback, *faults: str) -> None:
        """These are about to happen to a federation."""
        look = Look.at(made)
        for fault in faults:
            row: dict[str, Any] = {"rounds_lost": None, "bytes_lost": None}
            self.note(f"fault: {fault}", row)
            self.open[fault] = made, look, row

    def after(self, *faults: str, rounds: Collection[int] | None = None) -> None:
        """All, or these, are over. Of the rounds given, if not of all since then, sites that are missing are counted;
        AssertionError where bytes are lost."""
        for fault in faults or tuple(self.open):
            made, look, row = self.open.pop(fault)
            since = [event["round"] for event in made.rounds() if event["round"] > look.closed]
            missing = look.missing()
            row["rounds_lost"] = without(made, since if rounds is None else rounds) + look.repeated(made)
            row["bytes_lost"] = sum(missing.values())
            assert not missing, f"{fault}: {missing}"


# ------------------------------------------------------------------------------------------------ files
def _of_sites(made: Loopback, pattern: str) -> Iterator[Path]:
    return (path for site in SITES for path in made.at(site).glob(pattern))


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _whole_lines(path: Path) -> bytes:
    data = _bytes(path)
    return data[: data.rfind(b"\n") + 1]


def _same_lines(path: Path, data: bytes) -> list[bool]:
    now, before = (each.splitlines(keepends=True) for each in (_bytes(path), data))
    return [number < len(now) and now[number] == line for number, line in enumerate(before)]


def _changed(path: Path, data: bytes) -> int:
    lines = data.splitlines(keepends=True)
    return sum(len(line) for line, same in zip(lines, _same_lines(path, data), strict=True) if not same)


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2]) if "-" in path.stem else 0


def _kept(path: Path, tensors: dict[str, Any], totals: Any) -> bool:
    """Whether these tensors are in a file now, or a later one is there, whose totals are no smaller."""
    for there in path.parent.glob(f"{path.stem.partition('-')[0]}*{path.suffix}"):
        if _number(there) >= _number(path):
            try:
                found, meta = checkpoint.load(there)
            except StateError:
                continue
            if _number(there) > _number(path) or _equal(found, tensors):
                return _at_least(meta.get("ledger"), totals)
    return False


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _at_least(now: Any, before: Any) -> bool:
    """Numbers in nested tables."""
    if isinstance(before, dict):
        return isinstance(now, dict) and all(_at_least(now.get(key), value) for key, value in before.items())
    return before is None or (now is not None and now >= before)


# ------------------------------------------------------------------------------------------------ figures
def figures(rows: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What `make faults` writes. What a fault cost that was not recovered from is not known."""
    lost = {key: sum(row[key] or 0 for row in rows.values()) for key in ("rounds_lost", "bytes_lost")}
    recovered = sum(row["recovered"] for row in rows.values())
    return {"tried": len(rows), "recovered": recovered, **lost, "seconds": round(seconds), "faults": rows}


def write(path: Path, found: dict[str, Any]) -> None:
    """As JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
