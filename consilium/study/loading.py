"""Composition: a study's folder, read. In: study.json, runs.parquet, results.parquet. Out: a `Study`.

A method is the axis that the study compares, with every other axis that is neither the group within which it compares
nor the seed: nothing that was varied is averaged over in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from consilium import checkpoint
from consilium.errors import StateError
from consilium.study.file import CompareConfig

WHOLE = "all runs"  # the group of a study that compares within nothing
RUN_COLUMNS = ("run", "folder", "status", "seed")
RESULT_COLUMNS = ("run", "seed", "split", "model", "metric", "level", "site", "value", "low", "high", "n")


@dataclass(frozen=True)
class Study:
    """`runs` has a row per run, planned or finished, with the labels `method` and `group`; `results` is tidy."""

    folder: Path
    about: Mapping[str, Any]
    compare: CompareConfig
    runs: pd.DataFrame
    results: pd.DataFrame

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.about.get("name", self.folder.name))

    @property
    def notes(self) -> list[str]:
        """What the study wants said wherever it is shown."""
        return [str(note) for note in self.about.get("notes") or []]

    @cached_property
    def methods(self) -> list[str]:
        """Labels in the order of the plan."""
        return list(dict.fromkeys(self.runs["method"]))

    @cached_property
    def groups(self) -> list[str]:
        """Labels in the order of the plan."""
        return list(dict.fromkeys(self.runs["group"]))

    @cached_property
    def finished(self) -> pd.DataFrame:
        """The runs that have results."""
        return self.runs[self.runs["run"].isin(set(self.results["run"]))]

    @cached_property
    def failed(self) -> pd.DataFrame:
        """The runs without results that left an error."""
        rest = self.runs[~self.runs["run"].isin(set(self.results["run"]))]
        status = rest["status"].astype(str)
        return rest[(rest["error"] != "") | status.str.contains("fail|refus|error", case=False)]

    @property
    def num_missing(self) -> int:
        """Planned runs that have neither finished nor failed."""
        return len(self.runs) - len(self.finished) - len(self.failed)


def load(folder: Path) -> Study:
    """Read a study's folder; StateError that names the file that is missing or lacks columns."""
    about = checkpoint.read_json(folder / "study.json")
    compare = _compare(about, folder / "study.json")
    runs = _table(folder / "runs.parquet", [*RUN_COLUMNS, str(compare.method), *(compare.within or ())])
    results = _table(folder / "results.parquet", RESULT_COLUMNS)
    varied = [name for name in axes(about) if name not in searched(about)]
    return Study(folder, about, compare, _labelled(runs, compare, varied), results)


def with_references(study: Study) -> Study:
    """The study in which the references of `compare.references` stand as runs of their own, "pooled reference" and so
    on; they exchange nothing and what they cost is not known."""
    asked = study.runs[study.runs["method"] == study.compare.references]
    costs = ("bytes.", "parameters.exch", "seconds", "image")
    unknown = {str(name): nan for name in study.runs if str(name).startswith(costs)}
    rows: list[dict[str, Any]] = []
    results: list[pd.DataFrame] = []
    for row in asked.to_dict("records"):
        run: dict[str, Any] = {str(name): value for name, value in row.items()}
        own = study.results[study.results["run"] == run["run"]]
        for model in sorted({name for name in own["model"] if str(name).endswith(" reference")}):
            kind, name = str(model).removesuffix(" reference"), f"{run['run']}/{model}"
            place = {"run": name, "method": model, "folder": f"{run['folder']}/references/{kind}"}
            rows.append({**run, **unknown, **place})
            results.append(own[own["model"] == model].assign(run=name, model="personal"))
    if not rows:
        return study
    runs = pd.concat([study.runs, pd.DataFrame(rows)])
    return replace(study, runs=runs.reset_index(drop=True), results=pd.concat([study.results, *results]))


def axes(about: Mapping[str, Any]) -> list[str]:
    """Names of the axes, however study.json lists them."""
    given = about.get("axes") or []
    return [str(axis["name"] if isinstance(axis, Mapping) else axis) for axis in given]


def searched(about: Mapping[str, Any]) -> list[str]:
    """Axes over which values are selected."""
    return [str(name) for name in (about.get("select") or {}).get("over", ())]


def _compare(about: Mapping[str, Any], path: Path) -> CompareConfig:
    try:
        compare = CompareConfig.model_validate(about.get("compare") or {})
    except ValidationError as error:
        raise StateError("a study does not say what it compares", where=str(path), received=str(error)) from error
    if compare.method is None:
        raise StateError("a study does not say what it compares", where=f"{path}, compare.method")
    split = compare.split or ("val" if about.get("select") else "test")
    return compare.model_copy(update={"split": split, "within": compare.within or ()})


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    if not path.is_file():
        raise StateError("a table of the study is missing", where=str(path))
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise StateError("a table of the study cannot be read", where=str(path), received=str(error)) from error
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise StateError("a table of the study lacks columns", where=str(path), received=missing)
    return table


def _labelled(runs: pd.DataFrame, compare: CompareConfig, varied: Sequence[str]) -> pd.DataFrame:
    within = list(compare.within or ())
    extra = [name for name in varied if name in runs.columns and name not in (compare.method, *within)]
    method = runs[str(compare.method)].map(label)
    for name in extra:
        if runs[name].nunique() > 1:
            method = method + f", {name.rsplit('.', 1)[-1]} " + runs[name].map(label)
    group = runs[within].map(label).agg(", ".join, axis=1) if within else WHOLE
    error = runs["error"].fillna("").astype(str) if "error" in runs.columns else ""
    return runs.assign(method=method, group=group, error=error)


def label(value: object) -> str:
    """A value of an axis as text; whole numbers without a point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
