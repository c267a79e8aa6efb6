"""Composition: how a run stands. In: the coordinator's events. Out: `status.json`, always whole, and `log.jsonl`.

States of a run: starting, running, finished, failed, stopped; `office.status` adds died. Of a site: waiting (its turn
comes), training, done (it replied in this round), late, lost, absent, refused, or the code of another failure.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from consilium import checkpoint, run_folder
from consilium.deployment.log import Log, now
from consilium.errors import ConsiliumError, StateError

STATUS, LOG = "status.json", "log.jsonl"
STOPPED = "Flower was told to stop it; consilium coordinator resume goes on after the last closed round"
EVERY = 0.5  # seconds from one write of the state to the next at least, as each waits for the disk
AT_ONCE = ("start", "round")  # events that are written as they come


def _later(seconds: float, do: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()


@dataclass
class Board:
    """What `consilium coordinator status` prints. Every event is logged as it comes; the state that many of them leave
    is written once, half a second after the last time, and at the end of a round and of the run at once."""

    folder: Path
    table: dict[str, Any] = field(default_factory=lambda: {"state": "starting", "round": 0, "sites": {}})
    clock: Callable[[], float] = time.monotonic
    later: Callable[[float, Callable[[], None]], None] = _later

    def __post_init__(self) -> None:
        self.log = Log(self.folder / LOG)
        self._lock = threading.RLock()  # whoever was put off writes from a thread of its own
        self._due, self._waits = self.clock(), False  # when the next write may be; whether one was put off

    def show(self, event: Mapping[str, object]) -> None:
        """Take note of an event of the coordinator or of its transport."""
        self.log(event)
        with self._lock:
            self._note(dict(event))
            self._write() if event["event"] in AT_ONCE else self._write_in_time()

    def _note(self, event: dict[str, Any]) -> None:
        kind, sites = event.pop("event"), self.table["sites"]
        if kind == "start":
            self.table |= {"state": "running", "rounds": event["rounds"]}
            if event.get("closed"):  # by a process before this one
                self.table |= {"round": event["closed"], "closed": event["closed"]}
            sites |= {site: {"status": "waiting", "since": now()} for site in event["sites"]}
        elif kind == "link":
            status = self._work() if event["status"] in ("asked", "back") else event["status"]
            sites[event["site"]] = {"status": status, "since": now(), "message": event.get("message", "")}
        elif kind == "site":
            status = "done" if event["status"] == "ok" else event["status"]
            late = f"its reply to round {event['late_from']}, which came late" if "late_from" in event else ""
            sites[event["site"]] = {"status": status, "since": now(), "message": event.get("message", late)}
            self.table |= {"round": event["round"], "kind": event["kind"]}
        elif kind == "round":
            self.table |= {"closed": event["round"], "val_mean": event["val_mean"], "bytes": event["bytes"]}

    def _work(self) -> str:
        """Of a site that was asked: after the last round it reads its test images."""
        return "testing" if self.table.get("closed") == self.table.get("rounds") else "training"

    def handed_over(self) -> None:
        """Somebody asked for the run; its coordinator has yet to come."""
        self.table = {"state": "starting", "round": 0, "sites": {}}
        checkpoint.write_json(self.folder / STATUS, {**self.table, "time": now()})

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """The state of the run at the end, whatever it is: no runner's exit code is to be trusted. The folder is held
        from before the first word to after the last one: who finds it free has all that this process will ever say."""
        with run_folder.locked(self.folder):
            self._turn("starting", process=os.getpid())
            try:
                yield
            except SystemExit:  # by which Flower ends the process of a run that it was told to stop
                self.broke_off(STOPPED, "stopped")
                raise
            except BaseException as error:
                text = str(error) if isinstance(error, ConsiliumError) else f"{type(error).__name__}: {error}"
                self.broke_off(text)
                raise
            self.log({"event": "finished"})
            self._turn("finished", message="")

    def broke_off(self, why: str, state: str = "failed") -> None:
        """The run ends here, from outside."""
        self.log({"event": state, "message": why})
        self._turn(state, message=why)

    def _turn(self, state: str, **more: object) -> None:
        with self._lock:
            self.table |= {"state": state, **more}
            self._write()

    def _write_in_time(self) -> None:
        wait = self._due - self.clock()
        if wait <= 0:
            self._write()
        elif not self._waits:
            self._waits = True
            self.later(wait, self._put_off)

    def _put_off(self) -> None:
        """What was put off, unless it was written meanwhile: after the last word of a run nothing is."""
        with self._lock:
            if self._waits:
                self._waits = False
                self._write_in_time()

    def _write(self) -> None:
        self._due, self._waits = self.clock() + EVERY, False
        with suppress(StateError):  # a full disk: the run's own files say so
            checkpoint.write_json(self.folder / STATUS, {**self.table, "time": now()})


def read(folder: Path) -> dict[str, Any]:
    """The table as it was written last; StateError where there is none."""
    path = folder / STATUS
    if not path.is_file():
        raise StateError("no run was begun here", where=str(folder), remedy="consilium coordinator submit")
    found = checkpoint.read_json(path)
    return found if isinstance(found, dict) else {}


def lines(table: Mapping[str, Any]) -> list[str]:
    """The table for people."""
    head = f"{table['state']}: round {table.get('round', 0)} of {table.get('rounds', '?')}"
    head += f", {table['closed']} closed" if "closed" in table else ""
    rows = [
        f"  {site:<20} {row['status']:<10} since {row['since'][11:19]} UTC  {row.get('message') or ''}".rstrip()
        for site, row in sorted(table.get("sites", {}).items())
    ]
    message = [f"  {part}" for part in str(table.get("message") or "").splitlines()]
    return [head, *rows, *message]


def age(table: Mapping[str, Any]) -> float:
    """Seconds since the table was written."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(str(table["time"]))).total_seconds()
    except (KeyError, ValueError):
        return float("inf")
