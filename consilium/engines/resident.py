"""Engine: a hospital's service. In: bytes of requests, for as long as it lives. Out: bytes of replies.

It holds the backbone and the decoded images, so that a message costs neither. A request that comes twice, because a
reply was lost or the coordinator repeats a round, gets the reply of the first time, also after a restart. One process
at a time may serve a site's folder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from consilium import checkpoint
from consilium.engines.site import Site
from consilium.errors import StateError, WireError
from consilium.messages import envelope_of, is_count, plain

ANSWERS, NAMELESS = "answers", "nameless"
_RUN = re.compile("[0-9a-f]{16}")
REMEMBERED = 2  # replies of rounds that may be asked for again: a coordinator repeats one at most
Tell = Callable[[Mapping[str, object]], None]


@dataclass(frozen=True)
class Resident:
    """Answers for one site; `site.folder` holds a folder for every run. `tell` hears of all, for the site's own log."""

    site: Site
    tell: Tell

    def answer(self, data: bytes) -> bytes:
        """The reply to a request: that of the first time, where it came before."""
        torch.set_num_threads(self.site.experiment.config.engine.threads)  # bits depend on it; it is of this thread
        fields = _fields(data)
        about, site = _about(fields), replace(self.site, folder=self.site.folder / run_of(fields))
        path = site.folder / ANSWERS / f"{hashlib.sha256(data).hexdigest()}.reply"
        if path.is_file():
            reply = path.read_bytes()
            if _about(_fields(reply)).get("site") == site.data.name:  # whole, and ours
                self.tell({"event": "repeated", **about})
                return reply
        self.tell({"event": "asked", **about, "bytes": len(data)})
        reply = site.handle(data)
        failure = _about(_fields(reply)).get("failure")
        self.tell({"event": "answered", **about, "bytes": len(reply), "failure": failure})
        if failure is None:
            self._remember(path, reply)
        return reply

    def _remember(self, path: Path, reply: bytes) -> None:
        with suppress(StateError):  # a full disk: then the same request is worked on again, from the same state
            checkpoint.write_bytes(path, reply)
        newest = sorted(path.parent.glob("*.reply"), key=lambda each: each.stat().st_mtime_ns)
        for old in newest[:-REMEMBERED]:
            old.unlink()


def _fields(data: bytes) -> dict[str, Any]:
    """The envelope of a message, read once as all its bytes are hashed for it; of what is none, that it is none."""
    try:
        return envelope_of(data)
    except WireError:
        return {"kind": "unreadable"}


def _about(fields: Mapping[str, Any]) -> dict[str, object]:
    """What a message says of itself, in short and plain words: they come from elsewhere, and go to log and terminal."""
    return {key: _short(fields[key]) for key in ("kind", "round", "site", "failure") if key in fields}


def _short(value: object) -> object:
    """As it is, where it is what it should be."""
    if value is None or is_count(value):
        return value
    if isinstance(value, dict):
        return {plain(str(key), 20): plain(str(each), 300) for key, each in value.items()}
    return plain(str(value), 80)


def run_of(fields: Mapping[str, Any]) -> str:
    """Folder of the run that a message names; one of its own for what names none."""
    handshake = fields.get("handshake")
    name = handshake.get("run") if isinstance(handshake, dict) else None
    return name if isinstance(name, str) and _RUN.fullmatch(name) else NAMELESS
