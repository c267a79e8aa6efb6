"""Common: what is known after a closed round. In: a coordinator's progress. Out: its files in the run folder, and back.

A round is closed by its checkpoint, which is written after its line in events.jsonl. Lines are added at the end of that
file, each flushed to the disk; whatever lies beyond the newest checkpoint is dropped when a run is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consilium import checkpoint
from consilium.errors import StateError
from consilium.ledger import Ledger
from consilium.protocols import ServerState
from consilium.tensors import Tensors

Versions = Mapping[str, str]  # name -> digest
_PLAIN = ("builds_on", "class_counts", "num_examples", "passes", "site_seconds", "best", "seconds")


@dataclass(frozen=True)
class Broadcast:
    """What a coordinator remembers of what it sent as coded steps. `residual`: what the steps left unsaid; `news`: the
    step that last led to each tensor's value; `steps`: digests of the value before and after it."""

    residual: Tensors = field(default_factory=dict)
    news: Tensors = field(default_factory=dict)
    steps: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass
class Progress:
    """All the coordinator knows after a closed round; what a checkpoint holds."""

    server: ServerState
    receipts: dict[str, Versions] = field(default_factory=dict)  # site -> what its state holds; equal ones are one
    builds_on: dict[str, int] = field(default_factory=dict)  # site -> round of its last state
    ledger: Ledger = field(default_factory=Ledger)
    class_counts: list[int] = field(default_factory=list)
    num_examples: dict[str, int] = field(default_factory=dict)  # site -> training images, as it first said
    passes: dict[str, int] = field(default_factory=dict)  # site -> images it has trained on
    site_seconds: dict[str, float] = field(default_factory=dict)  # site -> time it worked in rounds, as it said
    best: dict[str, Any] = field(default_factory=dict)  # round, value and builds_on of the best validated round
    seconds: float = 0.0
    chosen: dict[str, Any] = field(default_factory=dict)  # after the last round, where a strategy has candidates
    broadcast: Broadcast = field(default_factory=Broadcast)
    tested: Mapping[str, Any] = field(default_factory=dict)  # site -> metrics, where sites send them; in no checkpoint

    def take_receipts(self, versions: Mapping[str, Versions]) -> None:
        """Note what the states of these sites hold now; sites that share their versions share the note."""
        merged: dict[tuple[int, int], Versions] = {}
        for site, news in versions.items():
            old = self.receipts.get(site, {})
            key = (id(old), id(news)) if old else (0, id(news))
            if key not in merged:
                merged[key] = {**old, **news}
            self.receipts[site] = merged[key]


# ------------------------------------------------------------------------------------------------ checkpoints
def path_of(folder: Path, number: int) -> Path:
    """The checkpoint of a round."""
    return folder / "checkpoints" / f"round-{number:05d}.safetensors"


def save(folder: Path, progress: Progress, agreement: str) -> None:
    """Write the checkpoint of the round and drop those that nothing needs: two rounds are kept, and the best one."""
    server, number, sent = progress.server, progress.server.round, progress.broadcast
    tensors = {**_under("shared", server.shared), **_under("memory", server.memory)}
    tensors |= {**_under("residual", sent.residual), **_under("news", sent.news)}
    known = {key: getattr(progress, key) for key in _PLAIN} | {"ledger": progress.ledger.to_dict(), "steps": sent.steps}
    meta = {"round": number, "sites": server.sites, "agreement": agreement, "receipts": _folded(progress.receipts)}
    checkpoint.save(path_of(folder, number), tensors, {**meta, **known})
    for path in path_of(folder, number).parent.glob("round-*.safetensors"):
        if _number(path) not in (number - 1, number, progress.best.get("round")):
            path.unlink()


def load(path: Path, agreement: str) -> Progress:
    """The progress of `save`; StateError where it is damaged or belongs to another run."""
    tensors, meta = checkpoint.load(path)
    if meta["agreement"] != agreement:
        raise StateError("this checkpoint belongs to another configuration", where=str(path))
    server = ServerState(meta["round"], tuple(meta["sites"]), _within("shared", tensors), _within("memory", tensors))
    known = {key: meta[key] for key in _PLAIN} | {"ledger": Ledger.from_dict(meta["ledger"])}
    steps = {name: (before, after) for name, (before, after) in meta["steps"].items()}
    sent = Broadcast(_within("residual", tensors), _within("news", tensors), steps)
    return Progress(server, receipts=_unfolded(meta["receipts"]), broadcast=sent, **known)


def numbers(folder: Path) -> list[int]:
    """Of the checkpoints that a run has, whole or not."""
    return sorted(map(_number, (folder / "checkpoints").glob("round-*.safetensors")))


def newest(folder: Path, agreement: str, damaged: Callable[[Path], None]) -> Progress | None:
    """The newest checkpoint that can be read: sites keep what the round after it builds on, so it is repeated bit by
    bit, unless some had begun the round after the damaged one: they say that they lack the state. `damaged` is told
    what was passed over; StateError where none can be read, None where there is none."""
    errors = []
    for path in sorted((folder / "checkpoints").glob("round-*.safetensors"), key=_number, reverse=True):
        try:
            return load(path, agreement)
        except StateError as error:
            errors.append(error)
            damaged(path)
    if errors:
        raise errors[0]
    return None


def _folded(receipts: Mapping[str, Versions]) -> dict[str, Any]:
    """Each distinct mapping once: sites that are in step hold the same versions."""
    by_object: dict[int, int] = {}
    by_content: dict[tuple[tuple[str, str], ...], int] = {}
    maps: list[Versions] = []
    for _, versions in sorted(receipts.items()):
        if id(versions) not in by_object:
            content = tuple(sorted(versions.items()))
            if content not in by_content:
                by_content[content] = len(maps)
                maps.append(versions)
            by_object[id(versions)] = by_content[content]
    return {"versions": maps, "sites": {site: by_object[id(versions)] for site, versions in receipts.items()}}


def _unfolded(folded: Mapping[str, Any]) -> dict[str, Versions]:
    return {site: folded["versions"][place] for site, place in folded["sites"].items()}


def _under(part: str, tensors: Tensors) -> dict[str, Any]:
    return {f"{part}/{name}": value for name, value in tensors.items()}


def _within(part: str, tensors: Tensors) -> dict[str, Any]:
    return {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}


def _number(path: Path) -> int:
    return int(path.stem.split("-")[1])


# ------------------------------------------------------------------------------------------------ events.jsonl
def add_line(folder: Path, event: Mapping[str, object]) -> None:
    """Add a closed round's line, whole or not at all; StateError where the disk is full or not writable."""
    checkpoint.append_line(folder / "events.jsonl", json.dumps(event, allow_nan=False))


def drop_lines(folder: Path, last: int) -> Mapping[str, Any]:
    """Leave the lines of the rounds up to `last`, which are closed, and return that of `last`; StateError unless
    exactly these are there. A line without an end is what a killed process left, and belongs to a later round."""
    path = folder / "events.jsonl"
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        found = [json.loads(line) for line in lines if line.endswith(b"\n")]
        rounds = [line["round"] for line in found]
        kept = [line for line, number in zip(lines, rounds, strict=False) if number <= last]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError("this file cannot be read", where=str(path), received=str(error)) from error
    if rounds[: len(kept)] != [*range(1, last + 1)]:
        received = f"rounds {rounds}"
        raise StateError("this file cannot be read", where=str(path), allowed=f"rounds 1 to {last}", received=received)
    if kept != lines or not path.is_file():
        checkpoint.write_bytes(path, b"".join(kept))
    return found[len(kept) - 1] if kept else {}
