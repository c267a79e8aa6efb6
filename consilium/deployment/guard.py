"""Composition: the door of a hospital's service. In: bytes of a request. Out: bytes of what the hospital lets out.

    request -> gate -> resident (the site itself) -> gate -> journal -> reply

A reply that the journal cannot take does not leave; the caller then gets none, as if the service were away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consilium import messages
from consilium.deployment.gate import Gate
from consilium.deployment.journal import Journal
from consilium.engines.resident import Resident
from consilium.errors import WireError
from consilium.messages import envelope_of


@dataclass(frozen=True)
class Guard:
    """A resident behind the hospital's own rules."""

    resident: Resident
    gate: Gate
    journal: Journal

    def answer(self, data: bytes) -> bytes:
        """What leaves in answer to a request. StateError where it cannot be written down first."""
        try:
            fields = envelope_of(data)
        except WireError:
            fields = {}
        why = self.gate.refusal(fields) if fields else None
        if why is not None:
            reply, blanked = self.gate.refuse(fields, why), list[str]()
        else:
            reply, blanked = self.gate.let_out(fields, self.resident.answer(data))
        self.journal.add(self._entry(fields, data, reply, blanked))
        return reply

    def _entry(self, fields: Mapping[str, Any], data: bytes, reply: bytes, blanked: list[str]) -> dict[str, Any]:
        handshake, said = fields.get("handshake"), envelope_of(reply)
        asked = handshake if isinstance(handshake, dict) else {}
        specs = self.resident.site.experiment.wire("up", int(said["round"]))
        return {
            "site": said["site"],
            "kind": fields.get("kind", "unreadable"),
            "round": said["round"],
            "run": asked.get("run", ""),
            "agreement": asked.get("agreement", ""),
            "request": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
            "reply": {"bytes": len(reply), "sha256": hashlib.sha256(reply).hexdigest()},
            "tensors": [[row["name"], row["shape"], row["dtype"], row["bytes"]] for row in messages.rows(reply, specs)],
            "numbers": _names(said.get("numbers", {})),
            "num_examples": said["num_examples"],
            "blanked": blanked,
            "failure": said["failure"],
        }


def _names(numbers: Mapping[str, Any], before: str = "") -> list[str]:
    """Dotted names of every number in a reply, down to the metric."""
    found = []
    for key, value in sorted(numbers.items()):
        inner = isinstance(value, Mapping) and "value" not in value
        found += _names(value, f"{before}{key}.") if inner else [before + key]
    return found
