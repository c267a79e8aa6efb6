"""Composition: what a study varies. In: a study file. Out: axes, and the cells of their grid without the excluded ones.

A grid key is an axis whose values set that one key. Nothing may be set by two axes, whatever their order.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consilium import config_file
from consilium.errors import ConfigError
from consilium.study.file import StudyFile, Table, flat

RESERVED = {"run", "folder", "status", "error", "seed", "split", "model", "metric", "level", "site", "value", "low"}
RESERVED |= {"high", "n", "method", "group", "parameters", "bytes", "seconds", "image_passes", "peak_memory_bytes"}
RESERVED |= {"majority"}
MEMBERS = {"sites": "source", "task": "name", "strategy": "name"}  # tables, and the key by which each names a member
Label = str | int | float | bool
Settings = Mapping[str, Label]  # axis -> value, as the columns of the outcome say it


@dataclass(frozen=True)
class Axis:
    """One thing that is varied: label of each value -> the configuration keys it sets."""

    name: str
    values: Mapping[Label, Table]


def axes(study: StudyFile) -> list[Axis]:
    """Axes of named variants, then the keys of the grid."""
    found = [Axis(name, _labelled(variants)) for name, variants in study.axes.items()]
    found += [_of_key(key, values) for key, values in study.grid.items()]
    if not found:
        raise ConfigError("a study varies something", where="study", remedy="give a [grid] or [axes]")
    for axis in found:
        _check_name(axis.name)
    doubled = {axis.name for axis in found if [other.name for other in found].count(axis.name) > 1}
    if doubled:
        raise ConfigError("two axes have one name", where="study", received=sorted(doubled))
    return found


def check_keys(found: Sequence[Axis]) -> None:
    """ConfigError where two axes set one key, or the run's seed."""
    for axis in found:
        for key in keys(axis):
            if key == "seed":
                raise _seed_is_no_axis(axis.name)
    for one, other in itertools.combinations(found, 2):
        for key, again in itertools.product(keys(one), keys(other)):
            if overlap(key, again):
                raise ConfigError(
                    "a configuration key is given twice",
                    where=f"{one.name} and {other.name}",
                    received=key if len(key) > len(again) else again,
                    remedy="vary it along one axis only",
                )


def keys(axis: Axis) -> list[str]:
    """The configuration keys that the values of an axis set, without the numbers that pick from lists."""
    every = [key for table in axis.values.values() for key, _ in assignments(table)]
    return list(dict.fromkeys(".".join(part for part in key.split(".") if not part.isdecimal()) for key in every))


def apply(base: Table, tables: Sequence[Table]) -> Table:
    """A copy of the base table in which each key of `tables` has its value."""
    made = copy.deepcopy(base)
    for table in tables:
        for key, value in assignments(table):
            config_file.put(made, key, copy.deepcopy(value))
    return made


def cells(found: Sequence[Axis], exclude: Sequence[Table]) -> tuple[list[Settings], list[Settings]]:
    """(kept, excluded) combinations of the values of all axes, in the order of the file."""
    _check_exclude(found, exclude)
    every: list[Settings] = [
        dict(zip([axis.name for axis in found], values, strict=True))
        for values in itertools.product(*(axis.values for axis in found))
    ]
    out = [cell for cell in every if any(_matches(cell, rule) for rule in exclude)]
    return [cell for cell in every if cell not in out], out


def named(settings: Settings) -> str:
    """One line for people."""
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


def _labelled(variants: Mapping[str, Table]) -> dict[Label, Table]:
    return dict(variants.items())


def _of_key(key: str, values: Sequence[Any]) -> Axis:
    labels = [value if isinstance(value, (str, int, float)) else json.dumps(value) for value in values]
    doubled = [label for label in labels if labels.count(label) > 1]
    if doubled:
        raise ConfigError("a value is given twice", where=f"grid.{key}", received=doubled[0])
    return Axis(key, {label: {key: value} for label, value in zip(labels, values, strict=True)})


def _check_name(name: str) -> None:
    if name == "seed":
        raise _seed_is_no_axis("axes")
    if not name.strip() or name.split(".")[0] in RESERVED:
        remedy = "give the axis another name"
        raise ConfigError("this name is a column of every study's tables", where="axes", received=name, remedy=remedy)


def _seed_is_no_axis(where: str) -> ConfigError:
    return ConfigError("the seed is no axis", where=where, remedy="list the seeds of the runs in `seeds`")


def assignments(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value): a table is entered once, so that what lies deeper is replaced as a whole, and so is a table
    that names another member, whose options are its own."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value and "." not in key and MEMBERS.get(key) not in value:
            yield from ((f"{key}.{inner}", held) for inner, held in value.items())
        else:
            yield key, value


def overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _check_exclude(found: Sequence[Axis], exclude: Sequence[Table]) -> None:
    known = {axis.name: list(axis.values) for axis in found}
    for rule in exclude:
        for name, value in flat(rule).items():
            if name not in known:
                raise ConfigError("no such axis", where="exclude", allowed=", ".join(known), received=name)
            unknown = [one for one in _many(value) if one not in known[name]]
            if unknown:
                raise ConfigError(
                    "no such value",
                    where=f"exclude.{name}",
                    allowed=", ".join(map(str, known[name])),
                    received=unknown[0],
                )
        if not rule:
            raise ConfigError("this would exclude everything", where="exclude", remedy="name an axis and its value")


def _matches(cell: Settings, rule: Table) -> bool:
    return all(cell[name] in _many(value) for name, value in flat(rule).items())


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
