"""Tables and figures of docs/results/performance.md, and one of deployment.md. In: benchmarks/results.json. Out: pages.

    python -m benchmarks.page

What stands outside a page's markers is written by hand and stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.frame import Estimate, Row
from benchmarks.measure import ROOT
from consilium.report.marks import Axis, Point, axis_x, marker, polyline, svg, whisker, word
from consilium.report.sections import Figure
from consilium.study import drawing

RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "results" / "performance.md"
APART = ROOT / "docs" / "results" / "deployment.md"  # what concerns hospitals in processes of their own
FIGURES = ROOT / "docs" / "results" / "figures"
START, END = "<!-- tables: written by `python -m benchmarks.page` -->", "<!-- end of tables -->"


def write() -> None:
    """Renew the pages and their figures."""
    found = json.loads(RESULTS.read_text())
    APART.write_text(renewed(APART.read_text(), {name: found[name] for name in ("deployment",) if name in found}))
    PAGE.write_text(renewed(PAGE.read_text(), found))
    FIGURES.mkdir(parents=True, exist_ok=True)
    figures = {"performance": targets_figure(found)}
    if found.get("growth", {}).get("samples"):
        figures["growth"] = growth_figure(found)
    for name, figure in figures.items():
        (FIGURES / f"{name}.svg").write_bytes(drawing.svg(drawing.sheet(figure)) + b"\n")


def renewed(text: str, found: Mapping[str, Any]) -> str:
    """The page with new tables."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{tables(found)}\n{END}{rest.split(END)[1]}"


def tables(found: Mapping[str, Any]) -> str:
    """Machines, then a table per benchmark."""
    parts = [machines(found)]
    for name, entry in found.items():
        parts.append(f"### {entry['title']}\n\n`make bench ONLY={name}`, {entry['seconds']:.0f} s.\n")
        reason = entry.get("skipped") or entry.get("failed")
        if reason:
            parts.append(f"Not measured: {reason}\n")
            continue
        lines = ["| what | target | measured | met |", "| --- | --- | --- | --- |"]
        lines += [_line(row(plain)) for plain in entry["rows"]]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(row: Row) -> str:
    what = f"{row.what} ({row.note})" if row.note else row.what
    met = {None: "", True: "yes", False: "**no**"}[row.met]
    return f"| {what} | {target(row)} | {measured(row)} | {met} |"


def machines(found: Mapping[str, Any]) -> str:
    """Each machine and version set once, with the benchmarks that ran there."""
    by_words: dict[str, list[str]] = {}
    for name, entry in found.items():
        at = entry["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in at["versions"].items())
        hardware = f"{at['processor']}, {at['cores']} cores, {at['memory_gib']:g} GiB of memory"
        words = f"{hardware}; Python {at['python']}, {versions}. Threads: {at['threads']}."
        by_words.setdefault(words, []).append(f"{name} ({entry['at']}, load {at['load'][0]:g} before it)")
    return "\n".join(f"{words} Ran here: {'; '.join(names)}.\n" for words, names in by_words.items())


def row(plain: Mapping[str, Any]) -> Row:
    """A row of the JSON file."""
    target = tuple(plain["target"]) if plain["target"] else None
    return Row(plain["what"], Estimate(**plain["measured"]), plain["unit"], target, plain["note"])  # type: ignore[arg-type]


def target(row: Row) -> str:
    """In words; empty where there is none."""
    if row.target is None:
        return ""
    way, limit = row.target
    return f"{'at most' if way == '<=' else 'at least'} {number(limit)} {_unit(row.unit)}".strip()


def measured(row: Row) -> str:
    """The median, and the range where there is one."""
    value, low, high = (number(each) for each in (row.measured.value, row.measured.low, row.measured.high))
    spread = f" ({low} to {high})" if (low, high) != (value, value) else ""
    return f"{value}{spread} {_unit(row.unit)}".strip()


def _unit(unit: str) -> str:
    return "\N{MULTIPLICATION SIGN}" if unit == "x" else unit


def number(value: float) -> str:
    """Three significant digits, five close to one, never in powers of ten where a reader expects a plain number."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    close = 2 if abs(value - 1) < 0.02 else 0  # 1.003 is not 1
    digits = max(0, 2 - math.floor(math.log10(abs(value))) + close)
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


# ------------------------------------------------------------------------------------------------ figures
def targets_figure(found: Mapping[str, Any]) -> Figure:
    """How many times better than its target each row is, on a logarithmic axis."""
    rows = [row(plain) for entry in found.values() for plain in entry["rows"] if plain["target"]]
    known = [(each, *_margins(each)) for each in rows]
    drawn = [line for line in known if all(value > 0 and math.isfinite(value) for value in line[1:])]
    caption = "Measured against target: right of 1 is better than asked, with the range over repeats"
    return Figure(caption, [("", _margins_drawing(drawn))])


def _margins(row: Row) -> tuple[float, float, float]:
    assert row.target is not None
    way, limit = row.target
    values = (row.measured.value, row.measured.low, row.measured.high)
    if way == ">=":
        return (values[0] / limit, values[1] / limit, values[2] / limit)
    return (_over(limit, values[0]), _over(limit, values[2]), _over(limit, values[1]))


def _over(limit: float, value: float) -> float:
    return limit / value if value > 0 else math.inf


def _margins_drawing(rows: Sequence[tuple[Row, float, float, float]]) -> Any:
    left, width, step = 470.0, 860.0, 19.0
    values = [value for line in rows for value in line[1:]] + [0.5, 2.0]
    x = Axis(min(values) / 1.15, max(values) * 1.15, left, width - 14, log=True)
    bottom = 8 + step * len(rows)
    marks = [at for at in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if x.low <= at <= x.high]
    parts = [_grid(x, marks, bottom)]
    for at, (row, value, low, high) in enumerate(rows):
        y = 8 + step * (at + 0.5)
        parts.append(word(left - 8, y + 4, _short(row.what), "end"))
        parts.append(whisker(0 if row.met else 1, x, y, Point(value, low, high)))
    parts.append(word((left + width) / 2, bottom + 32, "times better than the target", "middle"))
    return svg(width, bottom + 40, "Measured against target", parts)


def _grid(x: Axis, marks: Sequence[float], bottom: float) -> str:
    lines = []
    for at in marks:
        style = "axis" if at == 1 else "grid"
        lines.append(f'<line class="{style}" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="4" y2="{bottom:.1f}"/>')
        lines.append(word(x(at), bottom + 15, f"{at:g}", "middle"))
    return "".join(lines)


def growth_figure(found: Mapping[str, Any]) -> Figure:
    """Seconds of a round over sites, images and parameters, both axes logarithmic."""
    samples = found["growth"]["samples"]
    panels = [(f"seconds of a round over {name}", _curve(name, points)) for name, points in samples.items()]
    return Figure("How the time of a round grows", panels)


def _curve(name: str, points: Mapping[str, float]) -> Any:
    sizes, seconds = [float(size) for size in points], list(points.values())
    x = Axis(min(sizes) / 1.4, max(sizes) * 1.4, 52, 292, log=True)
    y = Axis(min(seconds) / 3, max(seconds) * 3, 170, 10, log=True)
    parts = [_across(y), axis_x(x, 170, sizes, lambda value: f"{value:,.0f}")]
    parts.append(polyline(0, [(x(size), y(value)) for size, value in zip(sizes, seconds, strict=True)]))
    parts += [marker(0, x(size), y(value), 3) for size, value in zip(sizes, seconds, strict=True)]
    parts.append(word(172, 204, name, "middle"))
    return svg(300, 210, f"seconds of a round over {name}", parts)


def _across(y: Axis) -> str:
    """Horizontal lines at whole powers of ten."""
    lines = []
    for power in range(math.ceil(math.log10(y.low)), math.floor(math.log10(y.high)) + 1):
        at = y(10.0**power)
        lines.append(f'<line class="grid" x1="52" x2="292" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(word(47, at + 4, f"{10.0**power:g}", "end"))
    return "".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= 74 else f"{text[:73]}…"


if __name__ == "__main__":
    write()
