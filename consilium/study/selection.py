"""Composition: the page of a tuning study. In: a `Study` with [select]. Out: validation curves and chosen points.

Nothing here reads the test split: values are chosen and shown on validation images only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from consilium.report.marks import Axis, Pair, padded
from consilium.report.sections import Figure, Section
from consilium.report.tables import Cell, Table
from consilium.report.text import UNDEFINED
from consilium.study import chosen, figures
from consilium.study.axes import Label, Settings
from consilium.study.chosen import Point
from consilium.study.loading import Study, label, searched


def tried(study: Study) -> list[Point]:
    """Every point of every method, in the order of the plan."""
    names = [str(study.compare.method), *(study.compare.within or ()), *searched(study.about)]
    planned: list[Settings] = study.runs[names].drop_duplicates().to_dict("records")  # type: ignore[assignment]
    return chosen.points(_bare(study), study.results, planned, study.compare, searched(study.about))


def _bare(study: Study) -> pd.DataFrame:
    return study.runs.drop(columns=["method", "group"])


def section(study: Study, unit: str) -> Section:
    """Curves per method and searched key, the table of points, and warnings of the range."""
    found, over = tried(study), searched(study.about)
    best = chosen.best(found, study.compare.metric)
    at_edge = chosen.edges(found, best, over)
    curves = [_curves(study, found, best, at, unit) for at in range(len(over)) if _numeric(found, at)]
    note = (
        f"{unit} on the {study.compare.split} split, mean over seeds and over what is compared within. The ringed "
        "point is chosen: the best mean of a method, the first of equal ones; a point that lacks a run cannot be. "
        "Nothing on this page was measured on test images."
    )
    return Section("Selected values", [_chosen(found, best, at_edge, over, unit), *curves],
                   [("Every point", [_points(found, best, over, unit)])], note)  # fmt: skip


def warnings(study: Study) -> list[str]:
    """Searched keys whose best value lies at an end of the range; the worst possible surprise later."""
    found, over = tried(study), searched(study.about)
    at_edge = chosen.edges(found, chosen.best(found, study.compare.metric), over)
    missing = sum(point.mean is None for point in found)
    said = [f"{label(name)}: the best {', '.join(keys)} lies at an end of the range; search wider"
            for name, keys in at_edge.items() if keys]  # fmt: skip
    return said + ([f"{missing} of {len(found)} points lack runs and were not considered"] if missing else [])


def numbers(study: Study) -> dict[str, Any]:
    """What statistics.json says of a selection."""
    found, over = tried(study), searched(study.about)
    best = chosen.best(found, study.compare.metric)
    rows = [{"method": label(p.method), "values": dict(zip(over, p.values, strict=True)), "mean": p.mean,
             "sd_over_seeds": p.spread, "runs": p.num_runs, "chosen": best.get(p.method) == p}
            for p in found]  # fmt: skip
    edges = {label(name): keys for name, keys in chosen.edges(found, best, over).items() if keys}
    return {"points": rows, "at_edge": edges}


def _numeric(found: Sequence[Point], at: int) -> bool:
    values = [point.values[at] for point in found]
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _curves(study: Study, found: Sequence[Point], best: Mapping[Label, Point], at: int, unit: str) -> Figure:
    """A panel per method: the metric over one searched number; a line per setting of the others."""
    over = searched(study.about)
    every = [float(point.values[at]) for point in found]
    y = Axis(*padded([point.mean for point in found if point.mean is not None]), 200, 14)
    others = list(dict.fromkeys(_others(point, at) for point in found))
    panels = []
    for method in dict.fromkeys(point.method for point in found):
        own = [point for point in found if point.method == method and point.mean is not None]
        lines = [_line([point for point in own if _others(point, at) == rest], at) for rest in others]
        mark = (float(best[method].values[at]), best[method].mean or 0.0) if method in best else None
        title = f"{unit} of {label(method)} over {over[at]}"
        panels.append((label(method), figures.curve(title, lines, mark, every, y, over[at])))
    names = [key for key in over if key != over[at]]
    legend = [", ".join(f"{key} {label(v)}" for key, v in zip(names, rest, strict=True)) for rest in others]
    caption = f"{unit} on the {study.compare.split} split over {over[at]}"
    return Figure(caption, panels, legend if names else ())


def _others(point: Point, at: int) -> tuple[Label, ...]:
    return (*point.values[:at], *point.values[at + 1 :])


def _line(found: Sequence[Point], at: int) -> list[Pair]:
    return sorted((float(point.values[at]), point.mean or 0.0) for point in found)


def _chosen(
    found: Sequence[Point], best: Mapping[Label, Point], at_edge: Mapping[Label, Sequence[str]], over: Sequence[str],
    unit: str,
) -> Table:  # fmt: skip
    rows = []
    for method in dict.fromkeys(point.method for point in found):
        point, edges = best.get(method), at_edge.get(method, ())
        cells = [_value(point.values[at], key in edges) if point else Cell(UNDEFINED) for at, key in enumerate(over)]
        tries = sum(other.method == method for other in found)
        rows.append([Cell(label(method)), *cells, _mean(point), Cell(str(tries), sort=tries)])
    return Table("Chosen values", ["method", *over, unit, "points tried"], rows)


def _value(value: Label, edge: bool) -> Cell:
    sort = float(value) if isinstance(value, (int, float)) else None
    return Cell(label(value), badge="end of range" if edge else "", sort=sort)


def _mean(point: Point | None) -> Cell:
    if point is None or point.mean is None:
        return Cell(UNDEFINED)
    return Cell(f"{point.mean:.3f}", f"sd over seeds {point.spread:.3f}" if point.spread else "", sort=point.mean)


def _points(found: Sequence[Point], best: Mapping[Label, Point], over: Sequence[str], unit: str) -> Table:
    rows = [
        [Cell(label(p.method), badge="chosen" if best.get(p.method) == p else ""),
         *(_value(value, False) for value in p.values), _mean(p), Cell(str(p.num_runs), sort=p.num_runs)]
        for p in found
    ]  # fmt: skip
    return Table("Every point", ["method", *over, unit, "runs"], rows)
