"""Common: bytes that crossed the wire. In: sizes of encoded messages. Out: totals per direction and site.

`payload` is the serialised tensors; `envelope` is the JSON around them, counted apart since its numbers vary in length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from consilium.messages import Size

Direction = Literal["up", "down"]


@dataclass
class Ledger:
    """Running totals in bytes: {direction: {site: bytes}}."""

    payload: dict[str, dict[str, int]] = field(default_factory=lambda: {"up": {}, "down": {}})
    envelope: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})

    def add(self, direction: Direction, site: str, size: Size) -> None:
        """Count one message."""
        sites = self.payload[direction]
        sites[site] = sites.get(site, 0) + size.payload
        self.envelope[direction] += size.envelope

    def summary(self) -> dict[str, Any]:
        """The `bytes` table of result.json."""
        found: dict[str, Any] = {
            direction: {"total": sum(sites.values()), "per_site": dict(sorted(sites.items()))}
            for direction, sites in self.payload.items()
        }
        return {**found, "control": dict(self.envelope)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"payload": self.payload, "envelope": self.envelope}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Ledger:
        """The ledger of `to_dict`."""
        return cls({key: dict(value) for key, value in plain["payload"].items()}, dict(plain["envelope"]))
