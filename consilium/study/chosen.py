"""Composition: values chosen on validation images. In: the results of a tuning study. Out: selected.toml, or its use.

Per method, the point of the searched keys with the best mean over seeds (first within each combination of the other
axes, then over those) wins; a point that lacks a run cannot. Equal budget: every method has the same points.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium import checkpoint, config_file
from consilium.errors import ConfigError
from consilium.metrics import LOWER_IS_BETTER
from consilium.study.axes import Axis, Label, Settings, assignments
from consilium.study.file import CompareConfig, SelectConfig, Table

if TYPE_CHECKING:
    import pandas as pd

FILE = "selected.toml"
Values = tuple[Label, ...]  # of the searched keys, in their order


@dataclass(frozen=True)
class Point:
    """One try of a method. `mean` is None where runs are missing; `spread` is over seeds, of the mean over the rest."""

    method: Label
    values: Values
    num_runs: int
    mean: float | None
    spread: float | None


def check_budget(cells: Sequence[Settings], compare: CompareConfig, select: SelectConfig) -> None:
    """ConfigError where one method would be given more tries than another."""
    tries = {name: len(own) for name, own in _by_method(cells, compare).items()}
    if len(set(tries.values())) > 1:
        received = ", ".join(f"{name}: {count}" for name, count in tries.items())
        remedy = f"give every method the same values of {', '.join(select.over)}, excluded ones too"
        raise ConfigError("methods are tuned with unequal budgets", where="select", received=received, remedy=remedy)


def _by_method(cells: Sequence[Settings], compare: CompareConfig) -> dict[Label, list[Settings]]:
    found: dict[Label, list[Settings]] = {}
    for cell in cells:
        found.setdefault(cell[str(compare.method)], []).append(cell)
    return found


# ------------------------------------------------------------------------------------------------ choosing
def points(
    runs: pd.DataFrame, results: pd.DataFrame, planned: Sequence[Settings], compare: CompareConfig, over: Sequence[str]
) -> list[Point]:
    """All tries in the order of the plan."""
    rows = runs.merge(values_of(results, compare), on="run", how="left")
    found = []
    for method, cells in _by_method(planned, compare).items():
        for values in dict.fromkeys(tuple(cell[key] for key in over) for cell in cells):
            chosen = rows[rows[str(compare.method)] == method]
            for key, value in zip(over, values, strict=True):
                chosen = chosen[chosen[key] == value]
            found.append(_point(method, values, chosen[chosen["status"] != "refused"]))
    return found


def values_of(results: pd.DataFrame, compare: CompareConfig) -> pd.DataFrame:
    """[run, value] of the compared number; the personal model where there is no model of that name."""
    rows = results[(results["split"] == compare.split) & (results["metric"] == compare.metric)]
    rows = rows[rows["level"] == compare.level]
    named = rows[rows["model"] == compare.model]
    rest = rows[(rows["model"] == "personal") & ~rows["run"].isin(set(named["run"]))]
    both = [part for part in (named, rest) if len(part)]
    import pandas as pd

    return pd.concat(both)[["run", "value"]] if both else rows[["run", "value"]]


def _point(method: Label, values: Values, rows: pd.DataFrame) -> Point:
    done = rows["value"].notna()
    if not len(rows) or not done.all():
        return Point(method, values, int(done.sum()), None, None)
    per_seed = rows.groupby("seed")["value"].mean()  # every seed has the same cells
    spread = float(per_seed.std()) if len(per_seed) > 1 else None
    return Point(method, values, len(rows), float(per_seed.mean()), spread)


def best(found: Sequence[Point], metric: str) -> dict[Label, Point]:
    """The chosen try of each method that has one; of equal ones, the first."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    chosen: dict[Label, Point] = {}
    for point in found:
        if point.mean is not None:
            held = chosen.setdefault(point.method, point)
            if sign * point.mean > sign * (held.mean or 0.0):
                chosen[point.method] = point
    return chosen


def edges(found: Sequence[Point], chosen: Mapping[Label, Point], over: Sequence[str]) -> dict[Label, list[str]]:
    """Searched keys whose chosen number is the smallest or largest tried, so that a better one may lie outside."""
    numbers: dict[Label, list[str]] = {method: [] for method in chosen}
    for method, point in chosen.items():
        for at, key in enumerate(over):
            tried = [other.values[at] for other in found if other.method == method]
            plain = [value for value in tried if isinstance(value, (int, float)) and not isinstance(value, bool)]
            if len(plain) == len(tried) and point.values[at] in (min(plain), max(plain)):
                numbers[method].append(key)
    return numbers


def write(folder: Path, found: Sequence[Point], searched: Sequence[Axis], facts: Mapping[str, Any]) -> Path:
    """Write selected.toml; `facts` say of which study, method and metric it is."""
    over, metric = [axis.name for axis in searched], str(facts["metric"])
    chosen = best(found, metric)
    at_edge = edges(found, chosen, over)
    lines = ["# Values chosen on validation images; another study applies them with `use`.", *_rows(facts)]
    for method, point in chosen.items():
        lines += ["", f"[values.{_key(str(method))}]", *_rows(_keys(searched, point.values))]
    lines += ["", "[at_edge]  # chosen at an end of the searched range: search wider"]
    lines += _rows({str(method): keys for method, keys in at_edge.items()})
    for point in found:
        row = {"method": str(point.method), **dict(zip(over, point.values, strict=True))}
        numbers = {"mean": point.mean, "sd_over_seeds": point.spread, "runs": point.num_runs}
        lines += ["", "[[tried]]", *_rows({**row, **numbers, "chosen": chosen.get(point.method) == point})]
    checkpoint.write_bytes(folder / FILE, ("\n".join(lines) + "\n").encode())
    return folder / FILE


def _keys(searched: Sequence[Axis], values: Values) -> Table:
    """The configuration keys that the values of these axes set."""
    tables = [axis.values[value] for axis, value in zip(searched, values, strict=True)]
    return {key: value for table in tables for key, value in assignments(table)}


def _rows(values: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_text(value)}" for key, value in values.items() if value is not None]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _text(value: Any) -> str:
    """A value as TOML; strings as JSON writes them are TOML too."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_rows(value))} }}"
    return repr(value) if isinstance(value, float) else json.dumps(value)


# ------------------------------------------------------------------------------------------------ using
def use(axes: Sequence[Axis], path: Path) -> list[Axis]:
    """The axes, in which each method also sets the values that another study chose for it."""
    table = config_file.read(path)
    name, values = table.get("method"), table.get("values")
    if not isinstance(values, dict) or not isinstance(name, str):
        raise ConfigError("this file holds no selected values", where=str(path), remedy=f"give a study's {FILE}")
    if name not in [axis.name for axis in axes]:
        allowed = ", ".join(axis.name for axis in axes)
        raise ConfigError("no axis of the name that was tuned", where=f"use, {path}", allowed=allowed, received=name)
    return [_with_values(axis, values, path) if axis.name == name else axis for axis in axes]


def _with_values(axis: Axis, values: Mapping[str, Table], path: Path) -> Axis:
    made: dict[Label, Table] = {}
    for label, table in axis.values.items():
        if str(label) not in values:
            remedy = "tune it in that study too, so that all methods have an equal chance"
            raise ConfigError(
                f"nothing was selected for {axis.name} = {label}",
                where=str(path),
                allowed=", ".join(values),
                remedy=remedy,
            )
        own, new = dict(assignments(table)), values[str(label)]
        if own.keys() & new.keys():
            received = ", ".join(sorted(own.keys() & new.keys()))
            raise ConfigError(f"{axis.name} = {label} sets what was selected", where=str(path), received=received)
        made[label] = {**own, **new}
    return Axis(axis.name, made)
