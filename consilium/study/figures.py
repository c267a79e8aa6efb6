"""Composition: a study's figures. In: groups and findings. Out: drawings for the page, in the report's own style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from consilium.report import figures
from consilium.report.marks import (
    Axis,
    Pair,
    Point,
    axis_x,
    grid_y,
    labelled,
    marker,
    padded,
    polyline,
    svg,
    ticks,
    word,
)
from consilium.report.sections import Figure
from consilium.report.text import bytes_text, short
from consilium.study.comparison import Findings, Front, Ranking, Slope
from consilium.study.groups import COSTS, Group
from consilium.study.statistics import Estimate

WIDTH, HEIGHT = 380, 300


@dataclass(frozen=True)
class Cloud:
    """One method of a scatter: its number, its runs [(cost, value)] and their mean with an interval."""

    number: int
    name: str
    runs: Sequence[Pair]
    at: float
    mean: Point


def against(groups: Sequence[Group], found: Sequence[Findings], methods: Sequence[str], cost: str, unit: str) -> Figure:
    """The metric over log10 of a cost, a panel per group; runs small, their mean large, the line of all methods."""
    caption = f"{unit} over {COSTS[cost]}, on a logarithmic axis"
    return _panels(caption, groups, found, methods, cost, unit, False)


def fronts(groups: Sequence[Group], found: Sequence[Findings], methods: Sequence[str], unit: str) -> Figure:
    """The same over bytes with the Pareto front as steps, without runs and line."""
    caption = f"Pareto front: {unit.lower()} over {COSTS['bytes']}"
    return _panels(caption, groups, found, methods, "bytes", unit, True)


def _panels(
    caption: str, groups: Sequence[Group], found: Sequence[Findings], methods: Sequence[str], cost: str, unit: str,
    steps: bool,
) -> Figure:  # fmt: skip
    clouds = [_clouds(group, findings, methods, cost) for group, findings in zip(groups, found, strict=True)]
    everything = [cloud for panel in clouds for cloud in panel]
    costs = [at for cloud in everything for at, _ in cloud.runs]
    values = [
        v for c in everything for v in (*(value for _, value in c.runs), c.mean.low, c.mean.high) if v is not None
    ]
    x, y = Axis(*decades(costs), 44, WIDTH - 16, log=True), Axis(*padded(values), HEIGHT - 46, 26)
    panels = [
        (group.name, _scatter(group.name, panel, findings, x, y, cost, unit, steps))
        for group, panel, findings in zip(groups, clouds, found, strict=True)
    ]
    shown = {cloud.name for cloud in everything}
    return Figure(caption, panels, [f"{at + 1}. {name}" if name in shown else "" for at, name in enumerate(methods)])


def _clouds(group: Group, findings: Findings, methods: Sequence[str], cost: str) -> list[Cloud]:
    made, logs = [], group.log_cost(cost)
    for index, name in enumerate(group.methods):
        mean = findings.estimates[name][group.level]
        runs = _runs(group, index, cost)
        if runs and mean.value is not None:
            made.append(Cloud(methods.index(name), name, runs, float(10 ** logs[index]), point(mean)))
    return made


def _runs(group: Group, index: int, cost: str) -> list[Pair]:
    """(cost, value) of a method's runs; those that exchange nothing have no place on a logarithmic axis."""
    rows = group.facts[group.facts["method"] == group.methods[index]]
    values = group.values[group.level][index, :, 0]
    pairs = [
        (float(at), float(values[group.seeds.index(int(seed))]))
        for at, seed in zip(rows[cost], rows["seed"], strict=True)
    ]
    return [(at, value) for at, value in pairs if at > 0 and math.isfinite(value)]


def _line_of(findings: Findings, cost: str) -> Slope:
    return next(slope for slope in findings.slopes if slope.cost == cost and slope.subset == "all methods")


def decades(values: Sequence[float]) -> Pair:
    """A span of a logarithmic axis around the values with a little air."""
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (0.0, 1.0)
    air = 0.06 * (high - low) or 0.5
    return 10 ** (low - air), 10 ** (high + air)


def _scatter(
    name: str, clouds: Sequence[Cloud], found: Findings, x: Axis, y: Axis, cost: str, unit: str, steps: bool
) -> Markup:
    label, amount = COSTS[cost], _amount if cost == "trainable" else bytes_text
    whole = [10.0**e for e in range(math.ceil(math.log10(x.low)), math.floor(math.log10(x.high)) + 1)]
    parts = [grid_y(y, 44, WIDTH - 10), axis_x(x, y.start, whole or [x.low, x.high], amount)]
    if steps:
        parts.append(_steps(clouds, found.front, x, y))
    else:
        parts.append(_fit(clouds, _line_of(found, cost), x, y))
        parts += [_faint(marker(c.number, x(at), y(value), 2.4)) for c in clouds for at, value in c.runs]
    parts += _numbered(clouds, x, y)
    parts += [word((x.start + x.stop) / 2, HEIGHT - 10, label, "middle"), word(4, 12, unit, "start")]
    told = "; ".join(f"{c.name} {amount(c.at)}, {c.mean.value:.3f}" for c in clouds) or "no run to show"
    return svg(WIDTH, HEIGHT, f"{unit} over {label}, {name}: {told}", parts)


def _numbered(clouds: Sequence[Cloud], x: Axis, y: Axis) -> list[str]:
    """Means with their numbers, which change sides where neighbours are close."""
    parts, last, below = [], -math.inf, False
    for cloud in sorted(clouds, key=lambda cloud: cloud.at):
        below = x(cloud.at) - last < 22 and not below
        parts.append(labelled(cloud.number, cloud.name, x(cloud.at), y, cloud.mean, below))
        last = x(cloud.at)
    return parts


def _steps(clouds: Sequence[Cloud], front: Front, x: Axis, y: Axis) -> str:
    on = [name for name, is_on in zip(front.methods, front.on_front, strict=True) if is_on]
    places = sorted((x(c.at), y(c.mean.value)) for c in clouds if c.name in on and c.mean.value is not None)
    path = "".join(f"H{px:.1f}V{py:.1f}" for px, py in places[1:])
    return f'<path class="steps" d="M{places[0][0]:.1f} {places[0][1]:.1f}{path}"/>' if places else ""


def _amount(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return short(value)


def _faint(mark: str) -> str:
    return mark.replace(' mark"', ' mark faint"')


def _fit(clouds: Sequence[Cloud], fit: Slope, x: Axis, y: Axis) -> str:
    used = [cloud.at for cloud in clouds if cloud.name in fit.methods]
    if fit.change.value is None or fit.intercept is None or not used:
        return ""
    first, last = min(used), max(used)
    low, high = (fit.intercept + fit.change.value * math.log10(at) for at in (first, last))
    ends = f'x1="{x(first):.1f}" y1="{y(low):.1f}" x2="{x(last):.1f}" y2="{y(high):.1f}"'
    return f'<line class="diagonal" {ends}/>'


# ------------------------------------------------------------------------------------------------ forests
def point(found: Estimate) -> Point:
    """An estimate as a figure has it."""
    return Point(found.value, found.low, found.high)


def forest(caption: str, rows: dict[str, list[Point]], unit: str, legend: Sequence[str]) -> Figure:
    """Values with intervals, drawn for wide and for narrow screens."""
    wide, narrow = (figures.forest(caption, rows, unit, width) for width in (720, 360))
    return Figure(caption, [("", wide)], legend if len(legend) > 1 else (), narrow)


def by_site(group: Group, found: Findings, unit: str) -> Figure:
    """Methods by sites."""
    rows = {name: [point(found.estimates[name][f"site:{site}"]) for site in group.sites] for name in group.methods}
    return forest(f"{unit} at each site, {group.name}", rows, unit, group.sites)


def slope_forest(groups: Sequence[Group], found: Sequence[Findings], cost: str) -> Figure:
    """The slope of each group and subset, in points per tenfold cost."""
    rows, names = {}, list(dict.fromkeys(s.subset for findings in found for s in findings.slopes))
    for group, findings in zip(groups, found, strict=True):
        chosen = {s.subset: s.change for s in findings.slopes if s.cost == cost}
        rows[group.name] = [_points(chosen.get(name)) for name in names]
    caption = f"Change for ten times the {COSTS[cost]}, in points of a hundred"
    return forest(caption, rows, "points per tenfold", names)


def _points(found: Estimate | None) -> Point:
    scaled = [None if v is None else 100 * v for v in (found.value, found.low, found.high)] if found else [None] * 3
    return Point(*scaled)


def rank_forest(ranking: Ranking) -> Figure:
    """Mean rank with the best and the worst rank of each method, best first."""
    table = np.array(ranking.ranks)
    order = np.argsort(table.mean(axis=0), kind="stable").tolist()
    rows = {
        ranking.methods[at]: [Point(*(float(v) for v in (table[:, at].mean(), table[:, at].min(), table[:, at].max())))]
        for at in order
    }
    return forest("Mean rank, with the best and the worst rank over the blocks", rows, "rank, 1 is best", [])


# ------------------------------------------------------------------------------------------------ selection
def curve(
    title: str, lines: Sequence[Sequence[Pair]], chosen: Pair | None, at: Sequence[float], y: Axis, label: str
) -> Markup:
    """The validation metric over one searched number, tried `at` these; the chosen point is ringed. The lines are of
    different settings of the other numbers. Logarithmic where the tries span a decade or more."""
    log = min(at) > 0 and max(at) / min(at) >= 10
    x = Axis(*(decades(at) if log else padded(at)), 44, WIDTH - 16, log=log)
    shown = sorted(set(at)) if len(set(at)) <= 6 else ticks(x.low, x.high)
    parts = [grid_y(y, 44, WIDTH - 10), axis_x(x, y.start, shown, short)]
    for number, line in enumerate(lines):
        parts.append(polyline(number, [(x(value), y(metric)) for value, metric in line]))
        parts += [marker(number, x(value), y(metric), 3) for value, metric in line]
    if chosen:
        parts.append(f'<circle class="ring" cx="{x(chosen[0]):.1f}" cy="{y(chosen[1]):.1f}" r="7"/>')
    parts.append(word((x.start + x.stop) / 2, y.start + 36, label, "middle"))
    return svg(WIDTH, y.start + 46, title, parts)
