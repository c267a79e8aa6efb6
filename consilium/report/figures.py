"""Stage 10, report. In: numbers. Out: figures as inline SVG, coloured by the page, each with a text alternative.

Drawn by hand and not by a plotting library, so that a figure follows light and dark, keeps its text selectable and
costs a few kilobytes. A series has a class s0, s1, ... that sets its colour, and a marker of its own shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from consilium.report.text import bytes_text, short, whole

Pair = tuple[float, float]
NUM_SERIES = 6  # colours in the style sheet


@dataclass(frozen=True)
class Point:
    """A number with an interval; None where undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axis:
    """Maps numbers of [low, high] to pixels of [start, stop]."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)


def learning_curves(
    title: str, series: Mapping[str, Sequence[tuple[int, float | None]]], last_round: int, span: Pair
) -> Markup:
    """Lines over rounds, one per series [(round, value)]; a missing value breaks the line."""
    x, y = Axis(0, max(last_round, 1), 38, 292), Axis(*span, 160, 10)
    parts = [_grid_y(y, 38, 292), _axis_x(x, 160, _whole_ticks(last_round), whole)]
    for number, points in enumerate(series.values()):
        parts.append(_line(number, [(x(at), y(v)) if v is not None else None for at, v in points]))
        parts += [_marker(number, x(at), y(v), 2.6) for at, v in points if v is not None]
    parts.append(_text(165, 191, "round", "middle"))
    return _svg(300, 196, title, parts)


def forest(title: str, rows: Mapping[str, Sequence[Point]], unit: str, width: float) -> Markup:
    """Values with intervals: one band per row, one line per series in it; names stand on top where there is no room."""
    known = [v for points in rows.values() for p in points for v in (p.value, p.low, p.high) if v is not None]
    roomy = width > 500
    bands = [(18 if roomy else 34) + 13 * len(points) for points in rows.values()]
    bottom = 10 + sum(bands)
    x = Axis(*padded(known), 170 if roomy else 14, width - 14)
    parts = [_grid_x(x, 10, bottom)]
    top = 10.0
    for (name, points), height in zip(rows.items(), bands, strict=True):
        parts.append(f'<line class="rule" x1="4" x2="{width - 4:.0f}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(_name(160, top + height / 2 + 4, name, "end") if roomy else _name(4, top + 15, name, "start"))
        parts += [_whisker(i, x, top + height - 2.5 - 13 * (len(points) - i), p) for i, p in enumerate(points)]
        top += height
    parts.append(_text((x.start + x.stop) / 2, bottom + 34, unit, "middle"))
    return _svg(width, bottom + 42, title, parts)


def scatter(title: str, points: Sequence[tuple[str, float, Point]], x_label: str, y_label: str, width: float) -> Markup:
    """Values with intervals over bytes on a logarithmic axis; none at all is the left edge. Points are numbered."""
    known = [v for _, _, p in points for v in (p.value, p.low, p.high) if v is not None]
    sent = [at for _, at, _ in points if at > 0] or [1.0]
    low, high = 10 ** math.floor(math.log10(min(sent))), 10 ** math.ceil(math.log10(max(sent) * 1.001))
    x, y = Axis(low, max(high, low * 10), 100, width - 24, log=True), Axis(*padded(known), 300, 24)
    decades = [10.0**e for e in range(round(math.log10(x.low)), round(math.log10(x.high)) + 1)]
    every = math.ceil(len(decades) * 60 / (width - 124))
    parts = [_grid_y(y, 38, width - 24), _axis_x(x, 300, decades[::every], bytes_text)]
    if any(at <= 0 for _, at, _ in points):
        parts.append(_text(56, 316, "none", "middle"))
    for number, (name, at, point) in enumerate(points):
        if point.value is not None:
            parts.append(_labelled(number, name, x(at) if at > 0 else 56.0, y, point))
    parts += [_text((x.start + x.stop) / 2, 336, x_label, "middle"), _text(4, 12, y_label, "start")]
    return _svg(width, 344, title, parts)


def reliability(title: str, confidence: Sequence[float], accuracy: Sequence[float], n: Sequence[float]) -> Markup:
    """Accuracy over confidence per bin, the diagonal, and below how many images fall into each bin."""
    x, y, total = Axis(0, 1, 38, 292), Axis(0, 1, 254, 10), max(sum(n), 1)
    parts = [_grid_y(y, 38, 292), _axis_x(x, 300, [0, 0.25, 0.5, 0.75, 1], short)]
    parts.append(f'<line class="diagonal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    width = 254 / len(n)
    for index, (c, a, count) in enumerate(zip(confidence, accuracy, n, strict=True)):
        if count:
            height = 36 * count / max(n)
            at = 38 + index * width
            parts.append(f'<rect class="s0 bar" x="{at + 1:.1f}" y="{298 - height:.1f}" width="{width - 2:.1f}" '
                         f'height="{height:.1f}"><title>{count:.0f} of {total:.0f} images</title></rect>')  # fmt: skip
            parts.append(_marker(0, x(c), y(a), 2.5 + 5 * math.sqrt(count / total)))
    filled = [(x(c), y(a)) for c, a, count in zip(confidence, accuracy, n, strict=True) if count]
    parts.append(_line(0, list(filled)))
    parts.append(_text(165, 332, "confidence", "middle"))
    return _svg(300, 338, title, parts)


def bars(title: str, rounds: Sequence[int], series: Mapping[str, Sequence[float]], width: float) -> Markup:
    """Bytes per round, one bar per series."""
    highest = max([v for values in series.values() for v in values] + [1])
    y, left = Axis(0, highest * 1.05, 160, 12), 62
    step = (width - left - 12) / max(len(rounds), 1)
    thick = max(min(step * 0.8, 48) / len(series), 0.8)
    parts = [_grid_y(y, left, width - 10, bytes_text)]
    for number, (name, values) in enumerate(series.items()):
        for index, value in enumerate(values):
            at = left + 2 + step * (index + 0.5) + thick * (number - len(series) / 2)
            parts.append(f'<rect class="s{number} solid" x="{at:.1f}" y="{y(value):.1f}" width="{thick:.1f}" '
                         f'height="{160 - y(value):.1f}"><title>round {rounds[index]}, {escape(name)}: '
                         f"{bytes_text(value)}</title></rect>")  # fmt: skip
    every = max(1, math.ceil(len(rounds) * 28 / (width - left)))
    labels = [(index, number) for index, number in enumerate(rounds) if index % every == 0]
    parts += [_text(left + 2 + step * (index + 0.5), 176, str(number), "middle") for index, number in labels]
    parts.append(_text((left + width) / 2, 194, "round", "middle"))
    return _svg(width, 200, title, parts)


# ------------------------------------------------------------------------------------------------ scales
def padded(values: Sequence[float]) -> Pair:
    """A span around the values with a little air; never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    air = 0.06 * (high - low) or 0.05
    return low - air, high + air


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _whole_ticks(last: int) -> list[float]:
    step = max(1, math.ceil(last / 6))
    return [float(k) for k in range(0, max(last, 1) + 1, step)]


# ------------------------------------------------------------------------------------------------ marks
def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> Markup:
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}{''.join(parts)}</svg>")  # every text in it was escaped where it was made


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _name(x: float, y: float, name: str, anchor: str) -> str:
    """A name of any length, cut where it would leave the figure; the whole one is its tooltip."""
    short_name = name if len(name) <= 24 else name[:23] + "…"
    return f"<g><title>{escape(name)}</title>{_text(x, y, short_name, anchor)}</g>"


def _grid_y(axis: Axis, left: float, right: float, text: Callable[[float], str] = short) -> str:
    lines = []
    for value in ticks(axis.low, axis.high, 4):
        at = axis(value)
        lines.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(_text(left - 5, at + 4, text(value), "end"))
    return "".join(lines)


def _grid_x(axis: Axis, top: float, bottom: float) -> str:
    lines = []
    for value in ticks(axis.low, axis.high, 6):
        at = axis(value)
        lines.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
        lines.append(_text(at, bottom + 16, short(value), "middle"))
    return "".join(lines)


def _axis_x(axis: Axis, y: float, values: Sequence[float], text: Callable[[float], str]) -> str:
    labels = "".join(_text(axis(value), y + 16, text(value), "middle") for value in values)
    return f'<line class="axis" x1="{axis.start}" x2="{axis.stop}" y1="{y}" y2="{y}"/>{labels}'


def _line(series: int, points: Sequence[Pair | None]) -> str:
    pieces, pen = [], "M"
    for point in points:
        if point is not None:
            pieces.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "M" if point is None else "L"
    return f'<path class="s{series % NUM_SERIES} line" d="{" ".join(pieces)}"/>' if pieces else ""


_SHAPES = (
    "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1 -1 0Z",
    "M-.9-.9H.9V.9H-.9Z",
    "M0-1.3L1.3 0L0 1.3L-1.3 0Z",
    "M0-1.2L1.15.9H-1.15Z",
    "M0 1.2L1.15-.9H-1.15Z",
    "M-.4-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z",
)


def _marker(series: int, x: float, y: float, size: float) -> str:
    shape = _SHAPES[series % NUM_SERIES]
    place = f"translate({x:.1f} {y:.1f}) scale({size:.2f})"
    return f'<path class="s{series % NUM_SERIES} mark" d="{shape}" transform="{place}"/>'


def key(series: int) -> Markup:
    """The marker of a series, for a legend."""
    return Markup(f'<svg class="key" viewBox="-6 -6 12 12" aria-hidden="true">{_marker(series, 0, 0, 4)}</svg>')


def _whisker(series: int, axis: Axis, y: float, point: Point) -> str:
    if point.value is None:
        return ""
    line = ""
    if point.low is not None and point.high is not None:
        ends = f'x1="{axis(point.low):.1f}" x2="{axis(point.high):.1f}"'
        line = f'<line class="s{series % NUM_SERIES} whisker" {ends} y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _marker(series, axis(point.value), y, 3.6)


def _labelled(number: int, name: str, x: float, axis: Axis, point: Point) -> str:
    line = ""
    if point.low is not None and point.high is not None:
        ends = f'y1="{axis(point.low):.1f}" y2="{axis(point.high):.1f}"'
        line = f'<line class="s{number % NUM_SERIES} whisker" x1="{x:.1f}" x2="{x:.1f}" {ends}/>'
    y = axis(point.value or 0.0)
    label = f'<text class="number" x="{x + 8:.1f}" y="{y - 6:.1f}">{number + 1}</text>'
    return f"<g><title>{escape(name)}</title>{line}{_marker(number, x, y, 4)}{label}</g>"
