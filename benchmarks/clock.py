"""Who spends the time of a round: functions wrapped from outside, so that the product has no timers.

A wrapped call inside another counts for the inner one alone. Only the thread that opened the clock is measured.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Place = tuple[str, str]  # "consilium.engines.site:Site", "_validate"

PLACES: dict[str, tuple[Place, ...]] = {
    "fit": (("consilium.local.train:Trainer", "fit"),),
    "validation": (("consilium.engines.site:Site", "_validate"),),
    "states, checkpoint, events": (
        ("consilium.engines.state:StateFolder", "save"),
        ("consilium.engines.state:StateFolder", "load"),
        ("consilium.coordinator:Coordinator", "_event"),
        ("consilium.rounds", "save"),
        ("consilium.rounds", "add_line"),
    ),
    "messages": (
        ("consilium.engines.site", "encode"),
        ("consilium.engines.site", "decode_request"),
        ("consilium.engines.site", "open_message"),
        ("consilium.exchange:_News", "request"),
        ("consilium.exchange", "decode_reply"),
        ("consilium.exchange", "digest"),
    ),
    "combine": (("consilium.strategies.fedavg:Averaging", "combine"),),
}


@dataclass
class Clock:
    """Seconds by category, without what inner categories spent, and the number of calls."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    missing: list[str] = field(default_factory=list)
    inner: list[float] = field(default_factory=list)  # one sum of inner calls per open call

    def take(self) -> dict[str, float]:
        """What was measured since the last call of this."""
        found = dict(self.seconds)
        self.seconds.clear()
        return found

    def wrap(self, function: Callable[..., Any], category: str) -> Callable[..., Any]:
        """The same function, measured."""
        owner = threading.get_ident()

        @functools.wraps(function)
        def measured(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != owner:
                return function(*arguments, **named)
            started = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                spent = time.perf_counter() - started
                self.seconds[category] += spent - self.inner.pop()
                self.calls[category] += 1
                if self.inner:
                    self.inner[-1] += spent

        return measured


@contextmanager
def watching(places: dict[str, tuple[Place, ...]] = PLACES) -> Iterator[Clock]:
    """Measure while it is open; `missing` names what the product no longer has."""
    clock, before = Clock(), list[tuple[Any, str, Any]]()
    for category, found in places.items():
        for where, name in found:
            owner = _owner(where)
            if not hasattr(owner, name):
                clock.missing.append(f"{where}.{name}")
                continue
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, clock.wrap(getattr(owner, name), category))
    try:
        yield clock
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _owner(where: str) -> Any:
    module, _, name = where.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name, None) if name else found
