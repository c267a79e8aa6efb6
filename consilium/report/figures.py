"""Stage 10, report. In: numbers. Out: figures as inline SVG, coloured by the page, each with a text alternative.

Drawn by hand and not by a plotting library, so that a figure follows light and dark, keeps its text selectable and
costs a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from markupsafe import Markup

from consilium.report.marks import (
    Axis,
    Pair,
    Point,
    axis_x,
    grid_x,
    grid_y,
    labelled,
    marker,
    name_text,
    padded,
    polyline,
    stage_marks,
    svg,
    whisker,
    whole_ticks,
    word,
)
from consilium.report.text import bytes_text, short, whole


def learning_curves(
    title: str,
    series: Mapping[str, Sequence[tuple[int, float | None]]],
    last_round: int,
    span: Pair,
    level: float | None = None,
    begins: Sequence[tuple[int, str]] = (),
) -> Markup:
    """Lines over rounds, one per series [(round, value)]; a missing value breaks the line. `level` is drawn dotted;
    `begins`: the rounds after which stages begin, with their names."""
    x, y = Axis(0, max(last_round, 1), 38, 292), Axis(*span, 160, 10)
    parts = [grid_y(y, 38, 292), axis_x(x, 160, whole_ticks(last_round), whole), *stage_marks(x, 10, 160, begins)]
    if level is not None:
        parts.append(f'<line class="diagonal" x1="38" x2="292" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
    for number, points in enumerate(series.values()):
        parts.append(polyline(number, [(x(at), y(v)) if v is not None else None for at, v in points]))
        parts += [marker(number, x(at), y(v), 2.6) for at, v in points if v is not None]
    parts.append(word(165, 191, "round", "middle"))
    return svg(300, 196, title, parts)


def forest(title: str, rows: Mapping[str, Sequence[Point]], unit: str, width: float) -> Markup:
    """Values with intervals: one band per row, one line per series in it; names stand on top where there is no room."""
    known = [v for points in rows.values() for p in points for v in (p.value, p.low, p.high) if v is not None]
    roomy = width > 500
    bands = [(18 if roomy else 34) + 13 * len(points) for points in rows.values()]
    bottom = 10 + sum(bands)
    x = Axis(*padded(known), 170 if roomy else 14, width - 14)
    parts = [grid_x(x, 10, bottom)]
    top = 10.0
    for (name, points), height in zip(rows.items(), bands, strict=True):
        parts.append(f'<line class="rule" x1="4" x2="{width - 4:.0f}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(
            name_text(160, top + height / 2 + 4, name, "end") if roomy else name_text(4, top + 15, name, "start")
        )
        parts += [whisker(i, x, top + height - 2.5 - 13 * (len(points) - i), p) for i, p in enumerate(points)]
        top += height
    parts.append(word((x.start + x.stop) / 2, bottom + 34, unit, "middle"))
    return svg(width, bottom + 42, title, parts)


def scatter(title: str, points: Sequence[tuple[str, float, Point]], x_label: str, y_label: str, width: float) -> Markup:
    """Values with intervals over bytes on a logarithmic axis; none at all is the left edge. Points are numbered."""
    known = [v for _, _, p in points for v in (p.value, p.low, p.high) if v is not None]
    sent = [at for _, at, _ in points if at > 0] or [1.0]
    low, high = 10 ** math.floor(math.log10(min(sent))), 10 ** math.ceil(math.log10(max(sent) * 1.001))
    x, y = Axis(low, max(high, low * 10), 100, width - 24, log=True), Axis(*padded(known), 300, 24)
    decades = [10.0**e for e in range(round(math.log10(x.low)), round(math.log10(x.high)) + 1)]
    every = math.ceil(len(decades) * 60 / (width - 124))
    parts = [grid_y(y, 38, width - 24), axis_x(x, 300, decades[::every], bytes_text)]
    if any(at <= 0 for _, at, _ in points):
        parts.append(word(56, 316, "none", "middle"))
    for number, (name, at, point) in enumerate(points):
        if point.value is not None:
            parts.append(labelled(number, name, x(at) if at > 0 else 56.0, y, point))
    parts += [word((x.start + x.stop) / 2, 336, x_label, "middle"), word(4, 12, y_label, "start")]
    return svg(width, 344, title, parts)


def reliability(title: str, confidence: Sequence[float], accuracy: Sequence[float], n: Sequence[float]) -> Markup:
    """Accuracy over confidence per bin, the diagonal, and below how many images fall into each bin."""
    x, y, total = Axis(0, 1, 38, 292), Axis(0, 1, 254, 10), max(sum(n), 1)
    parts = [grid_y(y, 38, 292), axis_x(x, 300, [0, 0.25, 0.5, 0.75, 1], short)]
    parts.append(f'<line class="diagonal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    width = 254 / len(n)
    for index, (c, a, count) in enumerate(zip(confidence, accuracy, n, strict=True)):
        if count:
            height = 36 * count / max(n)
            at = 38 + index * width
            parts.append(f'<rect class="s0 bar" x="{at + 1:.1f}" y="{298 - height:.1f}" width="{width - 2:.1f}" '
                         f'height="{height:.1f}"><title>{count:.0f} of {total:.0f} images</title></rect>')  # fmt: skip
            parts.append(marker(0, x(c), y(a), 2.5 + 5 * math.sqrt(count / total)))
    filled = [(x(c), y(a)) for c, a, count in zip(confidence, accuracy, n, strict=True) if count]
    parts.append(polyline(0, list(filled)))
    parts.append(word(165, 332, "confidence", "middle"))
    return svg(300, 338, title, parts)


def bars(
    title: str,
    rounds: Sequence[int],
    series: Mapping[str, Sequence[float]],
    width: float,
    begins: Sequence[tuple[int, str]] = (),
) -> Markup:
    """Bytes per round, one bar per series. `begins`: the rounds after which stages begin, with their names."""
    highest = max([v for values in series.values() for v in values] + [1])
    y, left = Axis(0, highest * (1.15 if begins else 1.05), 160, 12), 62
    step = (width - left - 12) / max(len(rounds), 1)
    thick = max(min(step * 0.8, 48) / len(series), 0.8)
    parts = [grid_y(y, left, width - 10, bytes_text)]
    parts += stage_marks(Axis(0, max(len(rounds), 1), left + 2, left + 2 + step * len(rounds)), 12, 160, begins)
    for number, (name, values) in enumerate(series.items()):
        for index, value in enumerate(values):
            at = left + 2 + step * (index + 0.5) + thick * (number - len(series) / 2)
            parts.append(f'<rect class="s{number} solid" x="{at:.1f}" y="{y(value):.1f}" width="{thick:.1f}" '
                         f'height="{160 - y(value):.1f}"><title>round {rounds[index]}, {escape(name)}: '
                         f"{bytes_text(value)}</title></rect>")  # fmt: skip
    every = max(1, math.ceil(len(rounds) * 28 / (width - left)))
    labels = [(index, number) for index, number in enumerate(rounds) if index % every == 0]
    parts += [word(left + 2 + step * (index + 0.5), 176, str(number), "middle") for index, number in labels]
    parts.append(word((left + width) / 2, 194, "round", "middle"))
    return svg(width, 200, title, parts)
