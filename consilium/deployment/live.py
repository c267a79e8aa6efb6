"""Composition: how a run stands, in a terminal. In: the coordinator's folder. Out: a view that is drawn anew, or lines.

The same facts as the page (`page.py`): the bar of rounds, and of every site its state, for how long it has been in it,
in how many rounds it replied and what it sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from consilium.deployment import board, files, office, page
from consilium.progress import estimate, sparkline

COLOURS = {"good": "green", "busy": "blue", "bad": "red", "idle": "dim"}
HEAD = 5  # lines beside the sites'


def follow(folder: Path, console: Console | None = None, poll: float = 1.0) -> dict[str, Any]:
    """Show how the run stands until it has ended; that state. Plain lines, at changes, where this is no terminal."""
    console = console or Console(markup=False, highlight=False)
    if not console.is_terminal:
        return office.follow(folder, _changes(console), poll)
    with Live(console=console, auto_refresh=False) as view:
        return office.follow(
            folder, lambda table: view.update(picture(folder, table, console.height), refresh=True), poll
        )


def _changes(console: Console) -> Callable[[dict[str, Any]], None]:
    last: dict[str, Any] = {}

    def show(table: dict[str, Any]) -> None:
        if table != last:
            console.print("\n".join(board.lines(table)), soft_wrap=True)
            last.clear()
            last.update(table)

    return show


def picture(folder: Path, table: Mapping[str, Any], height: int = 40) -> RenderableType:
    """The view of this moment. `height`: lines of the screen; sites that need no attention are left out first."""
    closed = page.rounds(folder / files.RUN / "events.jsonl")
    parts: list[RenderableType] = [_head(page.name(folder), table), _bar(table, closed)]
    values = [value for line in closed if (value := (line.get("val_mean") or {}).get(page.METRIC)) is not None]
    if values:
        parts.append(Text(f"validation balanced accuracy {estimate(values[-1])} {sparkline(values[-24:])}"))
    if table.get("sites"):
        parts.append(_sites(table["sites"], closed, max(4, height - HEAD)))
    if table.get("message"):
        parts.append(Text(str(table["message"]), "red" if table["state"] in ("failed", "died") else "dim"))
    return Group(*parts)


def _head(name: str, table: Mapping[str, Any]) -> Text:
    return Text.assemble((name, "bold"), "  ", _state(str(table["state"])))


def _state(state: str) -> tuple[str, str]:
    return state, COLOURS[page.kind(state)]


def _bar(table: Mapping[str, Any], closed: list[dict[str, Any]]) -> RenderableType:
    """Closed rounds, and how long the others may take at the pace of the last ones."""
    total, done = int(table.get("rounds") or 0), int(table.get("closed") or len(closed))
    text = f"round {table.get('round') or 0} of {total or '?'}, {done} closed"
    if closed and done < total:
        text += f", about {_span((total - done) * median(line['seconds'] for line in closed[-8:]))} left"
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=total or 1, completed=done, width=40), text)
    return row


def _sites(sites: Mapping[str, Mapping[str, Any]], closed: list[dict[str, Any]], room: int) -> Table:
    table = Table("site", "state", "for", "replied", "sent", "what is said", box=None, pad_edge=False)
    order = sorted(
        sites, key=lambda site: (["bad", "busy", "idle", "good"].index(page.kind(sites[site]["status"])), site)
    )
    shown = order if len(order) <= room else order[: room - 1]
    for site in sorted(shown):
        row = sites[site]
        replied = sum(line["sites"].get(site, {}).get("status") == "ok" for line in closed)
        sent = decimal(sum(line["bytes"]["up"].get(site, 0) for line in closed))
        state = Text(*_state(str(row["status"])))
        said = Text(str(row.get("message") or ""))
        table.add_row(Text(site), state, _since(row["since"]), f"{replied} of {len(closed)}", sent, said)
    if len(order) > len(shown):
        table.add_row(f"and {len(order) - len(shown):,} more")
    return table


def _since(moment: str) -> str:
    return _span((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
