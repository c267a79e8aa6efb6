"""Composition: what happened. In: events. Out: lines of JSON at the end of a file, with the time in UTC."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

Show = Callable[[Mapping[str, object]], None]


def now() -> str:
    """Time in UTC to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Log:
    """A file that only grows."""

    path: Path

    def __call__(self, event: Mapping[str, object]) -> None:
        """Add a line; an event that cannot be written stops nobody's training."""
        line = json.dumps({"time": now(), **event}, default=str) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            print(line, end="", flush=True)

    def before(self, show: Show) -> Show:
        """Whoever is told, as `show` is, once a line is here."""

        def tell(event: Mapping[str, object]) -> None:
            self(event)
            show(event)

        return tell
