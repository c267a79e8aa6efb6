"""Composition: what persons at a hospital have approved, and taken back. In: their words. Out: a file that only grows.

The last word on an agreement counts. It is read for every request, and again before a reply leaves, so that it needs no
restart of the service. A word that was taken back stays in the file, with who said what and when.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consilium import checkpoint
from consilium.deployment import files
from consilium.deployment.log import now
from consilium.errors import ConfigError, StateError

APPROVALS, APPROVED, WITHDRAWN = "approvals.jsonl", "approved", "withdrawn"
_KEYS = {"time", "agreement", "word", "by"}
Row = dict[str, Any]


def history(folder: Path) -> list[Row]:
    """Every word that was said: time, agreement, word, by whom. StateError for a file that is not whole."""
    path = folder / APPROVALS
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    rows = [_row(line) for line in lines]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or row.keys() != _KEYS or row["word"] not in (APPROVED, WITHDRAWN):
            raise _unreadable(path, f"line {number} is no approval")
    return rows


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def standing(folder: Path) -> dict[str, Row]:
    """agreement -> the last word on it."""
    return {row["agreement"]: row for row in history(folder)}


def approve(folder: Path, agreement: str, by: str) -> Mapping[str, Any]:
    """Note an approval; ConfigError for what is no digest of an agreement."""
    if len(agreement) != 64 or not set(agreement) <= set("0123456789abcdef"):
        raise ConfigError("this is no digest of an agreement", allowed="64 hexadecimal digits", received=agreement)
    return _note(folder, agreement, APPROVED, by)


def withdraw(folder: Path, by: str, digest: str | None = None) -> Mapping[str, Any]:
    """Take back an approval: the only one there is, or that of the agreement whose digest begins so."""
    files.check_digest(digest)
    approved = [agreement for agreement, row in standing(folder).items() if row["word"] == APPROVED]
    if not approved:
        remedy = "consilium site approvals lists what was said; to take part no longer, stop the site's services"
        raise ConfigError("no agreement is approved here", where=str(folder / APPROVALS), remedy=remedy)
    meant = [agreement for agreement in approved if agreement.startswith(digest or "")]
    if len(meant) != 1:
        what = "say which approval is meant" if meant else "this agreement is not approved here"
        remedy = "give --digest, as consilium site approvals lists it"
        raise ConfigError(what, where="--digest", allowed=", ".join(approved), received=digest, remedy=remedy)
    return _note(folder, meant[0], WITHDRAWN, by)


def _note(folder: Path, agreement: str, word: str, by: str) -> Mapping[str, Any]:
    if not by.strip():
        raise ConfigError("an approval has a name", where="--by", received=repr(by), remedy="give your own")
    history(folder)  # a file that cannot be read is mended before anything is added to it
    row = {"time": now(), "agreement": agreement, "word": word, "by": by.strip()}
    checkpoint.append_line(folder / APPROVALS, json.dumps(row))
    return row


def _unreadable(path: Path, why: str) -> StateError:
    remedy = "restore it from a backup, or move it away, and approve again; until then nothing leaves"
    return StateError("the approvals cannot be read", where=str(path), received=why, remedy=remedy)
