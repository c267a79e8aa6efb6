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
    """Methods by groups: the compared level and the worst site, then what they cost on average over the groups."""
    levels = list(dict.fromkeys([str(study.compare.level), "worst"]))
    rows = []
    for name in study.methods:
        holding = [group for group in groups if name in group.methods]
        cells = [measured(f.estimates.get(name, {}).get(level, Estimate(None))) for f in found for level in levels]
        size, sent, time = (_fact(holding, name, fact) for fact in ("exchanged", "bytes", "seconds"))
        rows.append([Cell(name), *cells, _count(size), _bytes(sent), _seconds(time)])
    named = [f"{group.name}, {LEVEL_NAMES[level]}" for group in groups for level in levels]
    head = ["method", *named, "exchanged parameters", "bytes per site and round", "time of a run"]
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


def slope_overview(groups: Sequence[Group], found: Sequence[Findings]) -> Table:
    """Change of the metric per tenfold cost, groups side by side."""
    wanted = list(
        dict.fromkeys((s.subset, s.cost) for f in found for s in f.slopes if s.cost in ("bytes", "trainable"))
    )
    known = [{(s.subset, s.cost): s.change for s in f.slopes} for f in found]
    rows = [
        [
            Cell(subset, f"over {COSTS[cost]}"),
            *(points(changes.get((subset, cost), Estimate(None))) for changes in known),
        ]
        for subset, cost in wanted
    ]
    head = ["methods", *(group.name for group in groups)]
    return Table("Fitted slope in points of a hundred per tenfold", head, rows)


def fronts(study: Study, groups: Sequence[Group], found: Sequence[Findings]) -> Table:
    """Whether each method is on the front of each group, and in what share of replicates."""
    rows = [[Cell(name), *(_on_front(f.front, name) for f in found)] for name in study.methods]
    return Table("On the Pareto front of bytes and metric", ["method", *(group.name for group in groups)], rows)


def _on_front(found: Front, name: str) -> Cell:
    if name not in found.methods:
        return _none()
    at = found.methods.index(name)
    share = found.share[at]
    detail = "" if share is None else f"{100 * share:.0f} % of replicates"
    return Cell("yes" if found.on_front[at] else "no", detail, sort=(2 if found.on_front[at] else 1) + (share or 0) / 2)


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


def harms(group: Group, found: Findings, baseline: str) -> Table:
    """How many sites each method serves worse than the baseline, and which."""
    rows = []
    for harm in found.harms:
        count = harm.count
        limits = "" if count.low is None or count.high is None else f"{count.low:.0f} to {count.high:.0f}"
        number = _none() if count.value is None else Cell(str(count.value), limits, sort=count.value)
        named = [Cell(", ".join(names) or "none") for names in (harm.harmed, harm.corrected)]
        rows.append([Cell(harm.method, harm.refused), number, *(named if not harm.refused else [_none(), _none()])])
    head = ["method", f"sites below {baseline}", "whole interval below", "after Holm"]
    return Table(f"Sites worse off than with {baseline}, of {len(group.sites)}, {group.name}", head, rows)


def site_differences(group: Group, found: Findings, baseline: str) -> Table:
    """Methods minus the baseline at every site."""
    rows = [
        [Cell(harm.method, harm.refused), *(points(harm.differences.get(site, Estimate(None))) for site in group.sites)]
        for harm in found.harms
    ]
    caption = f"Differences to {baseline} at each site, in points, {group.name}"
    return Table(caption, ["method", *group.sites], rows)


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
    """A metric with its interval."""
    value = Value(value=found.value, low=found.low, high=found.high)
    return replace(tables.interval(value), sort=found.value)


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


def _decimal(value: float, digits: int = 1) -> Cell:
    return Cell(f"{value:.{digits}f}", sort=float(value))


def _none() -> Cell:
    return Cell(UNDEFINED)
