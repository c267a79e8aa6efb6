"""Composition: sites that took no part, over a study. In: a `Study`. Out: a section of its page, or none.

A value is the mean over unseen sites and seeds. Its interval is Student's, with degrees of freedom after Satterthwaite:
the patients of each site, as each run's bootstrap saw them (the same for all seeds), and the spread over seeds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pandas as pd

from consilium.report.load import Value
from consilium.report.marks import Point
from consilium.report.sections import Block, Figure, Section
from consilium.report.tables import Cell, Table, interval
from consilium.report.unseen import Curve, curves
from consilium.study.loading import Study
from consilium.study.statistics import t_quantile

Z = 1.959964  # of 95 %
TABLES = {
    "{k}-shot": "{unit} at unseen sites, by images of each class{where}",
    "{k}-shot - local {k}-shot": "Gain over training alone on the same images{where}",
    "{k}-shot - zero-shot": "Gain over the model as it came{where}",
}
NOTE = (
    "Mean over the sites that took no part, each in its own runs, and over seeds. k = 0 is the model as it came; a "
    "dash is where a newcomer's head is untrained, or no model is there to train. Alone: from the pre-trained "
    "backbone, on the same images. The 95\u00a0% interval covers the patients of each site and the spread over seeds, "
    "few of which make it wide; sites and the number of draws are fixed."
)


def sections(study: Study, unit: str) -> list[Section]:
    """One section where runs measured unseen sites with a few images."""
    every = study.results[study.results["split"] == "unseen"]
    held = list(study.compare.within or ())
    own = every[every["metric"] == study.compare.metric].drop(columns=held, errors="ignore")
    table = own.merge(study.runs[["run", "method", *held]], on="run")
    if not len(table):
        return []
    blocks: list[Block] = []
    folded: list[Block] = []
    for where, part in _groups(study, table):
        found = {name: part[part["method"] == name] for name in study.methods if (part["method"] == name).any()}
        shots = sorted({k for model in part["model"].unique() if (k := shots_of(model)) > 0})
        blocks.append(_figure(found, shots, unit, where))
        first, *more = (
            _table(found, shots, form, text.format(unit=unit, where=where)) for form, text in TABLES.items()
        )
        blocks.append(first)
        folded += more
    return [Section("Sites that took no part", blocks, [("Gains", folded)], NOTE)]


def shots_of(model: str) -> int:
    """k of a model's name; 0 for the zero-shot model."""
    found = re.match(r"(?:local )?(\d+)-shot", model)
    return int(found.group(1)) if found else 0


def _groups(study: Study, table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """By the axes that are held fixed, but for one that says which site takes no part."""
    held = [axis for axis in study.compare.within or () if not _is_the_site(table, axis)]
    if not held:
        return [("", table)]
    parts = table.groupby(held, sort=False)
    return [(f", {', '.join(map(str, key))}", part) for key, part in parts]


def _is_the_site(table: pd.DataFrame, axis: str) -> bool:
    sites = [set(part["site"]) for _, part in table.groupby(axis)]
    return len(set().union(*sites)) == sum(map(len, sites))


def estimate(rows: pd.DataFrame) -> Value | None:
    """The mean over seeds and sites of rows (seed, site, value, low, high); None where a site lacks a seed."""
    values = rows.pivot_table(index="seed", columns="site", values="value")
    if not len(values) or values.isna().any(axis=None):
        return None
    errors = rows.assign(error=(rows["high"] - rows["low"]) / (2 * Z)).groupby("site")["error"].mean()
    means = values.mean(axis=1)
    mean, patients = float(means.mean()), float((errors**2).sum()) / len(errors) ** 2
    if errors.isna().any():
        return Value(value=mean)
    seeds = float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0
    freedom = (patients + seeds) ** 2 / (seeds**2 / (len(means) - 1)) if seeds > 0 else math.inf
    half = (t_quantile(0.95, freedom) if math.isfinite(freedom) else Z) * math.sqrt(patients + seeds)
    return Value(value=mean, low=mean - half, high=mean + half)


def _of(rows: pd.DataFrame, model: str) -> Value | None:
    return estimate(rows[rows["model"] == model])


def _table(found: dict[str, pd.DataFrame], shots: Sequence[int], form: str, title: str) -> Table:
    names = {k: form.format(k=k) for k in shots}
    plain = form == "{k}-shot"
    lines = []
    for method, rows in found.items():
        zero = [interval(_of(rows, "zero-shot"))] if plain else []
        lines.append([Cell(method), *zero, *(interval(_of(rows, names[k])) for k in shots)])
    if plain:
        first, rows = next(iter(found.items()))
        alone = [interval(_of(rows, f"local {k}-shot")) for k in shots]
        lines.append([Cell("alone", f"as in the runs of {first}"), interval(None), *alone])
    head = ["method", *(["k = 0"] if plain else []), *(f"k = {k}" for k in shots)]
    return Table(title, head, lines, num_summary=1 if plain else 0)


def _figure(found: dict[str, pd.DataFrame], shots: Sequence[int], unit: str, where: str) -> Figure:
    series = {name: _curve(rows, shots, "{k}-shot") for name, rows in found.items()}
    series["alone"] = _curve(next(iter(found.values())), shots, "local {k}-shot")
    caption = f"{unit} at unseen sites over k, images of each class{where}"
    wide, narrow = (curves(caption, series, shots, width) for width in (720, 380))
    return Figure(caption, [("", wide)], list(series), narrow)


def _curve(rows: pd.DataFrame, shots: Sequence[int], form: str) -> Curve:
    names = {**({0: "zero-shot"} if form == "{k}-shot" else {}), **{k: form.format(k=k) for k in shots}}
    known = [(k, value) for k, name in names.items() if (value := _of(rows, name)) is not None]
    return [(k, Point(value.value, value.low, value.high)) for k, value in known]
