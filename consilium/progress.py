"""Common: the displays of a run. In: the events a run emits, plain mappings. Out: a live view, lines, or JSON lines.

Events: prepare (what, done, total), warning (text), start (name, sites, rounds, out), site (kind, round, site, status,
numbers, done and total of those asked; again where a reply is refused once its peers are known), round (a line of
events.jsonl), reference (name, kind: start, round or reused), finish (result, report, headline). A display is a
function of one event and keeps nothing of a run that the run itself would need.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Event = Mapping[str, Any]
Display = Callable[[Event], None]
_BARS = "▁▂▃▄▅▆▇█"
_METRIC = "balanced_accuracy"


@contextmanager
def live(console: Console | None = None) -> Iterator[Display]:
    """Rounds, time left and a row per site, redrawn in place; plain lines where the output is no terminal."""
    console = console or Console(markup=False)
    if not console.is_terminal:
        yield lambda event: _print(console, line(event))
        return
    board = _Board(console)
    with Live(board, console=console, refresh_per_second=4, transient=False):
        yield board.take
    for text in board.closing:
        _print(console, text)


@contextmanager
def quiet(console: Console | None = None) -> Iterator[Display]:
    """The outcome only."""
    console = console or Console(markup=False)
    yield lambda event: _print(console, line(event)) if event["event"] == "finish" else None


@contextmanager
def json_lines() -> Iterator[Display]:
    """One JSON object per event and line on standard output; a number that is no number becomes null."""
    yield lambda event: print(json.dumps(_plain(event)), flush=True)


@contextmanager
def plain() -> Iterator[Display]:
    """A line per event, for services: the words that a log of them needs."""

    def show(event: Event) -> None:
        text = line(event) if event["event"] in ("prepare", "warning") else _words(event)
        if text is not None:
            print(text, flush=True)

    yield show


def _words(event: Event) -> str:
    rest = " ".join(f"{key}={value}" for key, value in event.items() if key != "event" and value is not None)
    return f"{event['event']} {rest}".rstrip()


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of (done, total) on standard error, so that standard output stays clean."""
    with live(Console(stderr=True, markup=False)) as display:
        yield lambda done, total: display({"event": "prepare", "what": what, "done": done, "total": total})


def one_at_a_time(display: Display | None) -> Display:
    """Runs that report from several threads show one event after the other; None shows nothing."""
    lock = Lock()

    def show(event: Event) -> None:
        with lock:
            if display is not None:
                display(event)

    return show


def line(event: Event) -> str | None:
    """One event as a line of a log; None for what a log does not need."""
    words: Mapping[str, Callable[[Event], str | None]] = {
        "prepare": _prepare,
        "warning": _warning,
        "start": _start,
        "site": _tested,
        "round": _round,
        "reference": _reference,
        "finish": _finish,
    }
    word = words.get(event["event"])
    return word(event) if word is not None else None


def sparkline(shares: Sequence[float]) -> str:
    """Numbers from 0 to 1 as a row of small bars; a blank where a number is undefined."""
    return "".join(map(_bar, shares))


def estimate(value: object) -> str:
    """A number, or a value with its interval, in three digits; a dash where it is undefined."""
    if isinstance(value, Mapping):
        interval = [value.get("low"), value.get("high")]
        bounds = "" if None in interval else f" [{', '.join(map(estimate, interval))}]"
        return estimate(value.get("value")) + bounds
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "-"
    return "-" if value is None else str(value)


def _bar(share: float) -> str:
    return " " if math.isnan(share) else _BARS[int(min(max(share, 0.0), 1.0) * (len(_BARS) - 1) + 0.5)]


def _prepare(event: Event) -> str | None:
    return f"{event['what']}: {event['total']}" if event["done"] == event["total"] else None


def _warning(event: Event) -> str:
    return f"warning: {event['text']}"


def _start(event: Event) -> str:
    return f"{event['name']}: {len(event['sites'])} sites, {event['rounds']} rounds, in {event['out']}"


def _round(event: Event) -> str:
    failed = [f"{name}: {site['status']}" for name, site in event["sites"].items() if site["status"] not in _QUIET]
    parts = [f"round {event['round']}", f"{event['seconds']:.1f} s", f"loss {estimate(_mean_loss(event))}"]
    value = (event.get("val_mean") or {}).get(_METRIC)
    return ", ".join([*parts, f"validation balanced accuracy {estimate(value)}", *failed])


def _tested(event: Event) -> str | None:
    """The end of a run, which may take as long as a round, in quarters."""
    done, total = event.get("done", 0), event.get("total", 0)
    quarter = event.get("kind") == "finish" and total and done * 4 // total > (done - 1) * 4 // total
    return f"finish: {done} of {total} sites" if quarter else None


def _reference(event: Event) -> str | None:
    words = {"start": "trains", "reused": f"taken from {event.get('from')}"}.get(event["kind"])
    return f"reference {event['name']}: {words}" if words else None


def _finish(event: Event) -> str:
    headline = [f"{name.replace('_', ' ')}: {estimate(value)}" for name, value in event.get("headline", {}).items()]
    return "\n".join([*headline, f"result: {event['result']}", f"report: {event['report']}"])


_QUIET = ("ok", "not_drawn")
_FEWEST_ROWS = 4  # on however small a screen
_DONE = {"round": "trained", "evaluate": "validated", "finish": "tested"}  # kind of request -> status of its reply


def _mean_loss(event: Event) -> float | None:
    losses = [site["loss"] for site in event["sites"].values() if site.get("loss") is not None]
    return sum(losses) / len(losses) if losses else None


def _print(console: Console, text: str | None) -> None:
    if text is not None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, bool)) or value is None else str(value)


@dataclass
class _Row:
    """What the view shows of one site."""

    status: str = "waiting"
    loss: float | None = None
    history: deque[float] = field(default_factory=lambda: deque(maxlen=24))


class _Board:
    """The live view: what was last heard of the run, of its references and of the sites. It is drawn four times a
    second, so of many sites only as many as fit on the screen: those heard of last."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        left = (TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(*columns, *left, console=console, speed_estimate_period=3600)
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._rows: dict[str, _Row] = {}  # the last heard of is the last
        self.closing: list[str | None] = []

    def take(self, event: Event) -> None:
        """Change the view by one event."""
        handle = {
            "prepare": self._prepare,
            "start": self._start,
            "site": self._site,
            "round": self._round,
            "reference": self._reference,
            "warning": self._close,
            "finish": self._close,
        }.get(event["event"])
        if handle is not None:
            handle(event)

    def __rich__(self) -> RenderableType:
        if not self._rows:
            return self._progress
        table = Table("site", "status", "loss", "validation balanced accuracy", box=None, pad_edge=False)
        rows = list(self._rows.items())
        room = max(_FEWEST_ROWS, self._console.height - len(self._bars) - 2)  # beside the head and the line below
        shown = rows if len(rows) <= room else rows[-room:]
        for name, row in sorted(shown, key=lambda each: each[0]):
            history = list(row.history)
            last = estimate(history[-1]) if history else "-"
            table.add_row(name, row.status, estimate(row.loss), f"{last} {sparkline(history)}")
        if hidden := len(rows) - len(shown):
            table.add_row(f"and {hidden:,} more")
        return Group(self._progress, table)

    def _advance(self, name: str, done: int, total: int | None = None) -> None:
        """Move the bar of that name, made on first use; a resumed run's earlier rounds do not count for its speed."""
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total)
        elif done > 1 and not self._progress.tasks[self._bars[name]].completed:
            self._progress.reset(self._bars[name], completed=done - 1)
        self._progress.update(self._bars[name], completed=done)

    def _prepare(self, event: Event) -> None:
        self._advance(event["what"], event["done"], event["total"])

    def _start(self, event: Event) -> None:
        self._rows = {site: _Row() for site in reversed(event["sites"])}
        self._advance("rounds", 0, event["rounds"])

    def _site(self, event: Event) -> None:
        row = self._rows.pop(event["site"], None) or _Row()
        self._note(row, event)
        self._rows[event["site"]] = row
        if event.get("kind") == "finish" and "total" in event:
            self._advance("finish", event["done"], event["total"])

    def _note(self, row: _Row, event: Event) -> None:
        done = _DONE.get(event.get("kind", ""), "ok")
        row.status = done if event["status"] == "ok" else event["status"].replace("_", " ")
        row.loss = event.get("loss", row.loss)

    def _round(self, event: Event) -> None:
        for name, site in event["sites"].items():
            row = self._rows.setdefault(name, _Row())
            self._note(row, site)
            value = site.get("val", {}).get("outgoing", {}).get(_METRIC)
            row.history.append(math.nan if value is None else value)
        self._advance("rounds", event["round"])

    def _reference(self, event: Event) -> None:
        if event["kind"] != "reused":
            self._advance(f"reference {event['name']}", event.get("round", 0), event.get("rounds"))

    def _close(self, event: Event) -> None:
        self.closing.append(line(event))
