"""Runs that report from several threads."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from consilium.progress import one_at_a_time


def test_a_display_sees_one_event_after_the_other() -> None:
    meet, inside, together = Barrier(4), [], []

    def display(event: Mapping[str, object]) -> None:
        inside.append(event)
        for _ in range(2000):
            together.append(len(inside))
        inside.pop()

    show = one_at_a_time(display)

    def report(number: int) -> None:
        meet.wait()
        show({"event": "round", "round": number})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(report, range(4)))
    assert set(together) == {1}
    assert len(together) == 8000
    one_at_a_time(None)({"event": "round"})
