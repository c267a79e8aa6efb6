"""Composition: the runs of a study. In: a study file. Out: a `Plan`: every configuration, validated, none run yet.

A mistake in the file stops here: an unknown key, a value that is wrong in every combination, two equal variants. What
only some combination makes impossible is refused there and noted, and the rest goes on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilium.config import NO_EFFECT, Config, from_dict
from consilium.errors import ConfigError
from consilium.study import axes as varied
from consilium.study import chosen
from consilium.study.axes import Axis, Settings, named
from consilium.study.file import CompareConfig, Loaded, StudyFile, load


@dataclass(frozen=True)
class Cell:
    """A combination of the axes' values, before seeds; `refused` says why there is no such configuration."""

    settings: Settings
    config: Config | None
    refused: str = ""


@dataclass(frozen=True)
class Plan:
    """A study whose configurations are known to be valid by themselves; data and models were not looked at."""

    study: StudyFile
    compare: CompareConfig  # every key given
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    excluded: tuple[Settings, ...]


def plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a study file; ConfigError for whatever is wrong with it."""
    loaded = load(path, overrides)
    study = loaded.study
    axes = varied.axes(study)
    if study.use is not None:
        axes = chosen.use(axes, study.use)
    varied.check_keys(axes)
    _check_overrides(overrides, axes)
    compare = _compare(study, axes)
    kept, excluded = varied.cells(axes, study.exclude)
    if not kept:
        raise ConfigError("every combination is excluded", where="exclude")
    cells = [_cell(loaded, axes, settings) for settings in kept]
    _check_mistakes(cells)
    _check_different(cells)
    made = Plan(study, compare, tuple(axes), tuple(cell for cell, _ in cells), tuple(excluded))
    if study.select is not None:
        chosen.check_budget([cell.settings for cell in made.cells if not cell.refused], compare, study.select)
    return made


def _check_overrides(overrides: Sequence[str], axes: Sequence[Axis]) -> None:
    """ConfigError where --set gives a key that the study varies, which would have no effect."""
    words = [text.partition("=")[0].strip().removeprefix("base.").split(".") for text in overrides]
    given = [".".join(word for word in key if not word.isdecimal()) for key in words]
    for axis, key in itertools.product(axes, given):
        if any(varied.overlap(key, own) for own in varied.keys(axis)):
            remedy = f"change the axis {axis.name!r}, or leave this out"
            raise ConfigError("the study varies this key itself", where="--set", received=key, remedy=remedy)


def _compare(study: StudyFile, axes: Sequence[Axis]) -> CompareConfig:
    """What is compared, with nothing left open."""
    names, given, select = [axis.name for axis in axes], study.compare, study.select
    method = given.method or ("tuner" if "tuner" in names else names[0])
    searched = select.over if select is not None else ()
    rest = tuple(name for name in names if name != method and name not in searched)
    within = rest if given.within is None else given.within
    _known("compare.method", [method], names)
    _known("compare.within", within, [name for name in names if name != method])
    labels = [str(label) for axis in axes if axis.name == method for label in axis.values]
    for key, label in (("baseline", given.baseline), ("references", given.references)):
        if label is not None:
            _known(f"compare.{key}", [label], labels)
    if select is not None:
        _check_select(given, searched, names, method)
    split = given.split or ("val" if select is not None else "test")
    return given.model_copy(update={"method": method, "within": within, "split": split})


def _check_select(given: CompareConfig, searched: Sequence[str], names: Sequence[str], method: str) -> None:
    _known("select.over", searched, [name for name in names if name != method])
    if given.split == "test":
        remedy = "use split = 'val': what is chosen on test images says nothing about new ones"
        raise ConfigError("values are selected on validation images", where="compare.split", remedy=remedy)


def _known(where: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise ConfigError("no such axis or value", where=where, allowed=", ".join(allowed) or None, received=unknown[0])


def _cell(loaded: Loaded, axes: Sequence[Axis], settings: Settings) -> tuple[Cell, ConfigError | None]:
    tables = [axis.values[settings[axis.name]] for axis in axes]
    try:
        return Cell(settings, from_dict(varied.apply(loaded.base, tables), loaded.home)), None
    except ConfigError as error:
        return Cell(settings, None, str(error)), error


def _check_mistakes(cells: Sequence[tuple[Cell, ConfigError | None]]) -> None:
    """Raise what no combination can mend: an unknown key, or a value that nothing goes with."""
    for cell, error in cells:
        if error is not None and (error.what.startswith("unknown key") or _never_right(cell, cells)):
            where = f"{error.where}, with {named(cell.settings)}" if error.where else named(cell.settings)
            raise ConfigError(
                error.what, where=where, allowed=error.allowed, received=error.received, remedy=error.remedy
            )


def _never_right(cell: Cell, cells: Sequence[tuple[Cell, ConfigError | None]]) -> bool:
    return any(
        all(error is not None for other, error in cells if other.settings[name] == value)
        for name, value in cell.settings.items()
    )


def _check_different(cells: Sequence[tuple[Cell, ConfigError | None]]) -> None:
    seen: dict[str, Cell] = {}
    for cell, _ in cells:
        if cell.config is None:
            continue
        other = seen.setdefault(essence(cell.config), cell)
        if other is not cell:
            received = f"({named(other.settings)}) and ({named(cell.settings)})"
            remedy = "remove one, or exclude it with [[exclude]]"
            raise ConfigError("two variants are the same configuration", received=received, remedy=remedy)


def essence(config: Config) -> str:
    """All that can change a result, as text."""
    plain: dict[str, Any] = config.to_dict()
    engine: Mapping[str, Any] = plain["engine"]
    plain["engine"] = {key: value for key, value in engine.items() if key not in NO_EFFECT}
    return json.dumps(plain, sort_keys=True)
