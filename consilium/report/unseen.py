"""Stage 10, report. In: unseen.json of a run folder. Out: what sites that took no part make of a few images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from markupsafe import Markup
from pydantic import Field

from consilium.report.load import Plain, Value, parse, text_of
from consilium.report.marks import Axis, Point, axis_x, grid_y, marker, padded, polyline, svg, word
from consilium.report.sections import Block, Figure, Section
from consilium.report.tables import NAMES, Cell, Table, interval
from consilium.report.text import count, whole

ZERO, K_SHOT, LOCAL = "zero-shot", "k-shot", "local k-shot"
TITLES = {K_SHOT: "With the federation's model", LOCAL: "Alone, from the pre-trained backbone"}
SHOWN = ("balanced_accuracy", "macro_auroc")
Curve = Sequence[tuple[int, Point]]  # k, value; k = 0 is zero-shot


class Row(Value):
    """A number of one model after training on k images of every class."""

    split: str
    site: str
    model: str
    shots: int
    metric: str
    draws: int
    sd: float | None = None
    least: float | None = None
    greatest: float | None = None


class Trains(Plain):
    """What the images train."""

    what: str = ""
    parameters: int = 0


class ZeroShot(Plain):
    """Whether there is a model before the first image."""

    measured: bool = True
    reason: str = ""


class Options(Plain):
    """How it was measured."""

    shots: tuple[int, ...] = ()
    draws: int = 0
    steps: int = 0


class Unseen(Plain):
    """unseen.json."""

    schema_version: Literal[1]
    options: Options = Options()
    trains: Trains = Trains()
    zero_shot: ZeroShot = ZeroShot()
    sites: Mapping[str, object] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()


def load(folder: Path) -> Unseen | None:
    """The numbers of a run folder, None where there are none; StateError for a file that cannot be read."""
    path = folder / "unseen.json"
    return parse(Unseen, path, text_of(path)) if path.is_file() else None


def sections(folder: Path) -> list[Section]:
    """One section, or none."""
    found = load(folder)
    if found is None:
        return []
    main, *more = SHOWN
    folded: list[tuple[str, Sequence[Block]]] = [(NAMES[metric], _blocks(found, metric)) for metric in more]
    return [Section("Sites that took no part", _blocks(found, main), folded, _note(found))]


def _blocks(found: Unseen, metric: str) -> list[Block]:
    return [_figure(found, metric), *(_table(found, site, metric) for site in found.sites)]


def _note(found: Unseen) -> str:
    options, draws = found.options, f"mean over {found.options.draws} draws of the images"
    text = (
        f"Test images, {draws}, {options.steps} steps for every k. Trained: {found.trains.what} "
        f"({count(found.trains.parameters)} numbers change). Intervals are 95\u00a0%, over patients; "
        "the spread over draws is from the least to the greatest. A class with fewer than k images gives all."
    )
    reason = "" if found.zero_shot.measured else f" There is no zero-shot number: {found.zero_shot.reason}."
    return f"{text}{reason} {' '.join(f'{note}.' for note in found.notes)}".strip()


def _pick(found: Unseen, site: str, metric: str) -> dict[tuple[str, int], Row]:
    chosen = [row for row in found.rows if (row.split, row.site, row.metric) == ("test", site, metric)]
    return {(row.model, row.shots): row for row in chosen}


def _table(found: Unseen, site: str, metric: str) -> Table:
    rows = _pick(found, site, metric)
    models = [K_SHOT, LOCAL, f"{K_SHOT} - {LOCAL}", f"{K_SHOT} - {ZERO}"]
    shown = [model for model in models if any(name == model for name, _ in rows)]
    lines = [[Cell(str(k)), *(_cell(rows.get((model, k))) for model in shown)] for k in found.options.shots]
    if (ZERO, 0) in rows:
        lines.insert(0, [Cell("0"), *(_cell(rows[ZERO, 0] if model == K_SHOT else None) for model in shown)])
    head = {K_SHOT: "federation", LOCAL: "alone", models[2]: "gain over alone", models[3]: "gain over zero-shot"}
    title = f"{NAMES[metric]} at {site}, by images of each class"
    return Table(title, ["k", *(head[model] for model in shown)], lines)


def _cell(row: Row | None) -> Cell:
    spread = row is not None and row.draws > 1 and row.least is not None and row.greatest is not None
    return interval(row, f"draws {row.least:.3f} to {row.greatest:.3f}" if row and spread else "")


def _figure(found: Unseen, metric: str) -> Figure:
    series = {site: _curves(_pick(found, site, metric)) for site in found.sites}
    caption = f"{NAMES[metric]} over k, images of each class; 0 and the dotted line: as it came"
    shots, legend = found.options.shots, list(TITLES.values())
    if len(series) == 1:
        [(site, own)] = series.items()
        wide, narrow = (curves(f"{NAMES[metric]} at {site}", own, shots, width) for width in (720, 380))
        return Figure(f"{caption}: {site}", [("", wide)], legend, narrow)
    drawn = [(site, curves(f"{NAMES[metric]} at {site}", own, shots)) for site, own in series.items()]
    return Figure(caption, drawn, legend)


def _curves(rows: Mapping[tuple[str, int], Row]) -> dict[str, Curve]:
    def points(model: str) -> Curve:
        own = sorted((k, row) for (name, k), row in rows.items() if name in (model, ZERO if model == K_SHOT else model))
        return [(k, Point(row.value, row.low, row.high)) for k, row in own]

    return {title: points(model) for model, title in TITLES.items()}


def curves(title: str, series: Mapping[str, Curve], shots: Sequence[int], width: float = 300) -> Markup:
    """Values with intervals over k on a logarithmic axis; k = 0 stands at the left, and its level goes on as a line."""
    known = [v for points in series.values() for _, p in points for v in (p.value, p.low, p.high) if v is not None]
    low, high, right = min(shots), max(shots), width - 10
    x, y = Axis(low, max(high, low * 2), 92, right - 18, log=True), Axis(*padded(known), 240, 24)
    parts = [grid_y(y, 38, right), axis_x(x, 240, [float(k) for k in shots], whole), word(_NONE, 256, "0", "middle")]
    for number, points in enumerate(series.values()):
        shift = 3.0 * (number - (len(series) - 1) / 2)  # so that intervals do not hide one another
        places = [(k, (x(k) if k else _NONE) + shift, p) for k, p in points if p.value is not None]
        for at in (y(p.value or 0) for k, _, p in places if k == 0):
            parts.append(f'<line class="diagonal" x1="{_NONE}" x2="{right:.0f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(polyline(number, [(at, y(p.value or 0)) for k, at, p in places if k]))
        parts += [_bar(number, at, y, p) + marker(number, at, y(p.value or 0), 3.4) for _, at, p in places]
    parts.append(word((38 + right) / 2, 276, "training images of each class, k", "middle"))
    return svg(width, 282, f"{title}: {_told(series)}", parts)


_NONE = 60.0  # where k = 0 stands


def _bar(number: int, at: float, y: Axis, point: Point) -> str:
    if point.low is None or point.high is None:
        return ""
    ends = f'y1="{y(point.low):.1f}" y2="{y(point.high):.1f}"'
    return f'<line class="s{number % 6} whisker" x1="{at:.1f}" x2="{at:.1f}" {ends}/>'


def _told(series: Mapping[str, Curve]) -> str:
    """Curves in words, for those who do not see them."""
    said = [
        f"{name} {', '.join(f'{p.value:.3f} with {k}' for k, p in points if p.value is not None)}"
        for name, points in series.items()
        if points
    ]
    return "; ".join(said) or "nothing measured"
