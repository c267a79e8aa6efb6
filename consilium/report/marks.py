"""Stage 10, report. In: numbers in data units. Out: what figures are made of: axes, grids, words, markers, as SVG.

A series has a class s0, s1, ... that sets its colour, and a marker; colour and shape together tell 36 series apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from consilium.report.text import short

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


def whole_ticks(last: int) -> list[float]:
    """Rounds to name on an axis from 0 to `last`."""
    step = max(1, math.ceil(last / 6))
    return [float(k) for k in range(0, max(last, 1) + 1, step)]


# ------------------------------------------------------------------------------------------------ marks
def svg(width: float, height: float, title: str, parts: Sequence[str]) -> Markup:
    """A drawing; `title` tells it to those who do not see it."""
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}{''.join(parts)}</svg>")  # every text in it was escaped where it was made


def word(x: float, y: float, text: str, anchor: str) -> str:
    """Text; the anchor is start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def name_text(x: float, y: float, name: str, anchor: str) -> str:
    """A name of any length, cut where it would leave the figure; the whole one is its tooltip."""
    short_name = name if len(name) <= 24 else name[:23] + "…"
    return f"<g><title>{escape(name)}</title>{word(x, y, short_name, anchor)}</g>"


def grid_y(axis: Axis, left: float, right: float, text: Callable[[float], str] = short) -> str:
    """Horizontal lines with their values."""
    lines = []
    for value in ticks(axis.low, axis.high, 4):
        at = axis(value)
        lines.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(word(left - 5, at + 4, text(value), "end"))
    return "".join(lines)


def grid_x(axis: Axis, top: float, bottom: float) -> str:
    """Vertical lines with their values."""
    lines = []
    for value in ticks(axis.low, axis.high, 6):
        at = axis(value)
        lines.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
        lines.append(word(at, bottom + 16, short(value), "middle"))
    return "".join(lines)


def axis_x(axis: Axis, y: float, values: Sequence[float], text: Callable[[float], str]) -> str:
    """A horizontal axis with values below it."""
    labels = "".join(word(axis(value), y + 16, text(value), "middle") for value in values)
    return f'<line class="axis" x1="{axis.start}" x2="{axis.stop}" y1="{y}" y2="{y}"/>{labels}'


def stage_marks(axis: Axis, top: float, bottom: float, begins: Sequence[tuple[int, str]]) -> list[str]:
    """A line where each stage begins, and its name to the right as far as there is room; the whole is its tooltip."""
    parts = []
    ends = [*(axis(at) for at, _ in begins[1:]), axis.stop]
    for (at, name), end in zip(begins, ends, strict=False):
        x, room = axis(at), int((end - axis(at) - 6) / 6)
        if at:
            parts.append(f'<line class="diagonal" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        cut = name if len(name) <= room else f"{name[: max(room - 1, 0)]}…" if room > 2 else ""
        parts.append(f"<g><title>{escape(name)}</title>{word(x + 4, top + 10, cut, 'start')}</g>")
    return parts


def polyline(series: int, points: Sequence[Pair | None]) -> str:
    """A line that None breaks."""
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


def marker(series: int, x: float, y: float, size: float) -> str:
    """The shape of a series, in its colour."""
    shape = _SHAPES[(series + series // NUM_SERIES) % len(_SHAPES)]
    place = f"translate({x:.1f} {y:.1f}) scale({size:.2f})"
    return f'<path class="s{series % NUM_SERIES} mark" d="{shape}" transform="{place}"/>'


def key(series: int) -> Markup:
    """The marker of a series, for a legend."""
    return Markup(f'<svg class="key" viewBox="-6 -6 12 12" aria-hidden="true">{marker(series, 0, 0, 4)}</svg>')


def whisker(series: int, axis: Axis, y: float, point: Point) -> str:
    """A value with its interval from left to right."""
    if point.value is None:
        return ""
    line = ""
    if point.low is not None and point.high is not None:
        ends = f'x1="{axis(point.low):.1f}" x2="{axis(point.high):.1f}"'
        line = f'<line class="s{series % NUM_SERIES} whisker" {ends} y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + marker(series, axis(point.value), y, 3.6)


def labelled(number: int, name: str, x: float, axis: Axis, point: Point, below: bool = False) -> str:
    """A value with its interval from bottom to top, and its number to the upper right, or to the lower left."""
    line = ""
    if point.low is not None and point.high is not None:
        ends = f'y1="{axis(point.low):.1f}" y2="{axis(point.high):.1f}"'
        line = f'<line class="s{number % NUM_SERIES} whisker" x1="{x:.1f}" x2="{x:.1f}" {ends}/>'
    y = axis(point.value or 0.0)
    place = f'x="{x - 7:.1f}" y="{y + 15:.1f}" text-anchor="end"' if below else f'x="{x + 8:.1f}" y="{y - 6:.1f}"'
    label = f'<text class="number" {place}>{number + 1}</text>'
    return f"<g><title>{escape(name)}</title>{line}{marker(number, x, y, 4)}{label}</g>"
