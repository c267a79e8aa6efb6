"""Composition: a study's tables. In: groups and findings. Out: rows of cells for the page and for files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from consilium.report import tables
from consilium.report.load import Value
from consilium.report.tables import Cell, Table
from consilium.report.text import UNDEFINED, bytes_text, count, duration
from consilium.study.comparison import Findings, Front, Pair, Ranking, Slope
from consilium.study.groups import COSTS, Group
from consilium.study.loading import Study
from consilium.study.samples import LEVELS
from consilium.study.statistics import Estimate

LEVEL_NAMES = {"mean": "mean over sites", "worst": "worst site", "pooled": "all images pooled"}


def overview(study: Study, groups: Sequence[Group], found: Sequence[Findings], unit: str) -> Table:
    """Methods by groups."""
    rows = []
    for name in study.methods:
        holding = [group for group in groups if name in group.methods]
        values = [f.estimates.get(name, {}).get(study.compare.level, Estimate(None)) for f in found]
        sizes = [_fact(holding, name, fact) for fact in ("trainable", "exchanged")]
        sent = _fact(holding, name, "bytes")
        rows.append([Cell(name), *map(measured, values), *(_count(size) for size in sizes), _bytes(sent)])
    head = ["method", *(group.name for group in groups), "trainable parameters", "exchanged parameters", COSTS["bytes"]]
    return Table(f"{unit} by method, mean over seeds", head, rows)


def _fact(groups: Sequence[Group], name: str, fact: str) -> float:
    known = [float(group.mean(fact)[group.methods.index(name)]) for group in groups]
    return float(np.mean([value for value in known if np.isfinite(value)] or [np.nan]))


def main(group: Group, found: Findings, unit: str) -> Table:
    """Everything about each method of a group."""
    facts = {name: group.mean(name) for name in ("trainable", "exchanged", "bytes", "total", "seconds")}
    levels = [group.level, *(level for level in LEVELS if level != group.level)]
    rows = []
    for at, name in enumerate(group.methods):
        values = [measured(found.estimates[name][level]) for level in levels]
        sizes = [_count(facts["trainable"][at]), _count(facts["exchanged"][at])]
        sent = [_bytes(facts["bytes"][at]), _bytes(facts["total"][at])]
        cells = [Cell(name), *values, _count(group.num_seeds[at]), *sizes, *sent, _seconds(facts["seconds"][at])]
        rows.append(cells)
    head = ["method", *(LEVEL_NAMES[level] for level in levels), "seeds", "trainable parameters",
            "exchanged parameters", COSTS["bytes"], "bytes of the run", "time of a run"]  # fmt: skip
    return Table(f"{unit}, {group.name}", head, rows)


def sites(group: Group, found: Findings, unit: str) -> Table:
    """Methods by sites."""
    rows = [
        [Cell(name), *(measured(found.estimates[name][f"site:{site}"]) for site in group.sites)]
        for name in group.methods
    ]
    return Table(f"{unit} at each site, {group.name}", ["method", *group.sites], rows)


def slopes(group: Group, found: Findings) -> Table:
    """Change of the metric per tenfold cost."""
    head = ["methods", "over log10 of", "number", "points per tenfold", "p", "interval that resamples methods too",
            "variance explained"]  # fmt: skip
    rows = [_slope_row(slope) for slope in found.slopes]
    return Table(f"Fitted slope, {group.name}", head, rows, num_text=2)


def _slope_row(slope: Slope) -> list[Cell]:
    wide = slope.with_methods
    other = Cell(f"{100 * wide[0]:.2f} to {100 * wide[1]:.2f}" if wide else UNDEFINED, sort=wide[0] if wide else None)
    explained = Cell(f"{100 * slope.explained:.0f} %", sort=slope.explained) if slope.explained is not None else _none()
    number = Cell(str(len(slope.methods)), sort=len(slope.methods))
    return [Cell(slope.subset), Cell(COSTS[slope.cost]), number, points(slope.change), _p(slope.change.p), other,
            explained]  # fmt: skip


def front(group: Group, found: Front) -> Table:
    """Methods in order of cost."""
    cost = dict(zip(group.methods, group.mean("bytes"), strict=True))
    rows = [
        [Cell(name), _bytes(cost[name]), Cell("yes" if on else "no"), _share(share)]
        for name, on, share in zip(found.methods, found.on_front, found.share, strict=True)
    ]
    head = ["method", COSTS["bytes"], "on the front", "share of replicates on it"]
    return Table(f"Pareto front of bytes and metric, {group.name}", head, rows)


def pairs(group: Group, found: Sequence[Pair], title: str) -> Table:
    """Differences of methods on the same images."""
    rows = [
        [Cell(pair.first), Cell(f"minus {pair.second}"), points(pair.difference),
         _p(pair.difference.p), _p(pair.p_holm), Cell(pair.refused)]
        for pair in found
    ]  # fmt: skip
    refused = any(pair.refused for pair in found)
    head = ["method", "", "difference in points", "p", "p after Holm", *(["not compared, because"] if refused else [])]
    return Table(f"{title}, {group.name}", head, [row[: len(head)] for row in rows], num_text=2)


def ranking(found: Ranking) -> Table:
    """Methods by mean rank."""
    table = np.array(found.ranks)
    rows = [
        [Cell(found.methods[at]), _decimal(table[:, at].mean(), 2), _decimal(table[:, at].min()),
         _decimal(table[:, at].max())]
        for at in np.argsort(table.mean(axis=0), kind="stable").tolist()
    ]  # fmt: skip
    return Table(f"Ranks over {len(found.blocks)} blocks", ["method", "mean rank", "best", "worst"], rows)


def failed(study: Study) -> Table:
    """Runs that left an error."""
    rows = [
        [Cell(str(row.run)), Cell(str(row.method)), Cell(str(row.group)), Cell(str(row.seed)), Cell(str(row.status)),
         Cell(str(row.error))]
        for row in study.failed.itertuples()
    ]  # fmt: skip
    return Table(
        "Runs that failed or were refused", ["run", "method", "group", "seed", "status", "why"], rows, num_text=6
    )


# ------------------------------------------------------------------------------------------------ cells
def measured(found: Estimate) -> Cell:
    """A metric with its interval; one that the metric cannot leave is cut at 0 and 1."""
    low, high = ((None if v is None else min(max(v, 0.0), 1.0)) for v in (found.low, found.high))
    return replace(tables.interval(Value(value=found.value, low=low, high=high)), sort=found.value)


def points(found: Estimate) -> Cell:
    """A difference in points of a hundred with its interval."""
    if found.value is None:
        return _none()
    known = found.low is not None and found.high is not None
    limits = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}" if known else "no interval"  # type: ignore[operator]
    return Cell(f"{100 * found.value:+.2f}", limits, sort=found.value)


def _p(value: float | None) -> Cell:
    if value is None:
        return _none()
    return Cell("< 0.0001" if value < 1e-4 else f"{value:.4f}", sort=value)


def _count(value: float) -> Cell:
    return Cell(count(round(value)), sort=float(value)) if np.isfinite(value) else _none()


def _bytes(value: float) -> Cell:
    return Cell(bytes_text(value), sort=float(value)) if np.isfinite(value) else _none()


def _seconds(value: float) -> Cell:
    return Cell(duration(float(value)), sort=float(value)) if np.isfinite(value) else _none()


def _share(value: float | None) -> Cell:
    return Cell(f"{100 * value:.0f} %", sort=value) if value is not None else _none()


def _decimal(value: float, digits: int = 1) -> Cell:
    return Cell(f"{value:.{digits}f}", sort=float(value))


def _none() -> Cell:
    return Cell(UNDEFINED)
