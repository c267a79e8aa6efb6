"""Composition: the door of a hospital's service. In: bytes of a request. Out: bytes of what the hospital lets out.

    request -> gate -> resident (the site itself) -> gate -> journal -> reply

A reply that the journal cannot take does not leave; the caller then gets none, as if the service were away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from consilium import messages
from consilium.deployment.gate import Gate
from consilium.deployment.journal import Journal
from consilium.engines.resident import Resident
from consilium.errors import WireError
from consilium.messages import envelope_of, plain


@dataclass(frozen=True)
class Guard:
    """A resident behind the hospital's own rules."""

    resident: Resident
    gate: Gate
    journal: Journal

    def answer(self, data: bytes) -> bytes:
        """What leaves in answer to a request. StateError where it cannot be written down first."""
        digest, fields, inner = hashlib.sha256(data).hexdigest(), dict[str, Any](), b""
        why = None if len(data) <= self.gate.largest else "no request of this agreement is as large"
        if why is None:
            with suppress(WireError):
                fields = envelope_of(data)
        if fields:
            why = self.gate.refusal(fields, digest)
        if why is not None:
            reply, blanked = self.gate.refuse(fields, why), list[str]()
        else:
            inner = self.resident.answer(data)
            reply, blanked = self.gate.let_out(fields, inner)
        entry = self._entry(fields, {"bytes": len(data), "sha256": digest}, reply, blanked)
        self.journal.add(entry)
        if entry["failure"] is not None and (not inner or envelope_of(inner)["failure"] is None):
            about = {key: entry[key] for key in ("kind", "round", "run")}  # of what the site refused, it has told
            self.resident.tell({"event": "refused", **about, "message": entry["failure"]["message"]})
        return reply

    def _entry(
        self, fields: Mapping[str, Any], request: Mapping[str, Any], reply: bytes, blanked: list[str]
    ) -> dict[str, Any]:
        opened = messages.open_message(reply)
        handshake, said = fields.get("handshake"), opened.fields
        asked = handshake if isinstance(handshake, dict) else {}
        specs = self.resident.site.experiment.wire("up", int(said["round"]), said["site"])
        tensors = [[row[key] for key in ("name", "shape", "dtype", "bytes")] for row in messages.rows(opened, specs)]
        return {
            "site": said["site"],
            "kind": _word(fields.get("kind", "unreadable"), 20),
            "round": said["round"],
            "run": _word(asked.get("run", ""), 40),
            "agreement": _word(asked.get("agreement", ""), 64),
            "request": request,
            "reply": {"bytes": len(reply), "sha256": hashlib.sha256(reply).hexdigest()},
            "tensors": tensors,
            "numbers": _names(said.get("numbers", {})),
            "num_examples": said["num_examples"],
            "blanked": blanked,
            "failure": said["failure"],
        }


def _word(said: object, longest: int) -> str:
    """What the caller wrote, as it may stand in a file that people read and that must not fill the disk."""
    return plain(str(said), longest)


def _names(numbers: Mapping[str, Any], before: str = "") -> list[str]:
    """Dotted names of every number in a reply, down to the metric."""
    found = []
    for key, value in sorted(numbers.items()):
        inner = isinstance(value, Mapping) and "value" not in value
        found += _names(value, f"{before}{key}.") if inner else [before + key]
    return found
