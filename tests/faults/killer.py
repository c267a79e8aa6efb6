"""A coordinator that dies at a named moment: installed in its process, it reads from a file which one, and dies once.

A moment is ("start", a round or "finish"; name). Names: "asked", when the first site was asked; "first reply" and "last
reply", when one was taken out of Flower and not yet looked at; "FILE half", with half of a file or of a line written,
"FILE whole", before it takes the place of the earlier one, and "FILE there", right after that. FILE: events, round (a
checkpoint with its ledger), config, result, summary, report.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from consilium import checkpoint
from consilium.coordinator import Coordinator
from consilium.engines import flower

AT_THE_START = ("config half", "config there")
IN_ROUNDS = ("asked", "first reply", "last reply", "events half", "events there", "round half", "round whole")
IN_ROUNDS += ("round there",)
AT_THE_END = ("first reply", "last reply", "result half", "result there", "summary half", "summary there")
AT_THE_END += ("report half",)


class _Killer:
    def __init__(self, plan: Path) -> None:
        self.plan = plan
        self.now: int | str = "start"
        self.moment = json.loads(plan.read_text()) if plan.is_file() else None

    def at(self, name: str) -> bool:
        now = "finish" if name.startswith("report") else self.now  # all that is left to do of a run that is closed
        return self.moment == [now, name]

    def die(self) -> NoReturn:
        self.plan.rename(self.plan.with_suffix(".done"))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def passes(self, name: str) -> None:
        if self.at(name):
            self.die()


def install(plan: Path) -> None:
    """In this process, from now on."""
    killer = _Killer(plan)
    _watch_rounds(killer)
    _watch_messages(killer)
    _watch_files(killer)


def _watch_rounds(killer: _Killer) -> None:
    close_round, finish = Coordinator._close_round, Coordinator._finish

    def closing(self: Coordinator, progress: Any, number: int) -> Any:
        killer.now = number
        return close_round(self, progress, number)

    def finishing(self: Coordinator, progress: Any) -> Any:
        killer.now = "finish"
        return finish(self, progress)

    Coordinator._close_round, Coordinator._finish = closing, finishing  # type: ignore[method-assign]


def _watch_messages(killer: _Killer) -> None:
    ask, read = flower._Asked._ask, flower._Asked._read

    def asking(self: flower._Asked, site: str, node: int) -> None:
        ask(self, site, node)
        killer.passes("asked")

    def reading(self: flower._Asked, site: str, message: Any) -> Any:
        if len(self.open) == len(self.requests):
            killer.passes("first reply")
        if len(self.open) == 1:
            killer.passes("last reply")
        return read(self, site, message)

    flower._Asked._ask, flower._Asked._read = asking, reading  # type: ignore[method-assign]


def _watch_files(killer: _Killer) -> None:
    write, append = checkpoint._write, checkpoint.append_line

    def writing(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
        data, name = b"".join(map(bytes, pieces)), path.stem.partition("-")[0]
        for moment, size in (("half", len(data) // 2), ("whole", len(data))):
            if killer.at(f"{name} {moment}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(data[:size])
                killer.die()
        write(path, [data])
        killer.passes(f"{name} there")

    def appending(path: Path, text: str) -> None:
        if killer.at(f"{path.stem} half"):
            with path.open("a") as file:
                file.write(text[: len(text) // 2])
            killer.die()
        append(path, text)
        killer.passes(f"{path.stem} there")

    checkpoint._write, checkpoint.append_line = writing, appending
