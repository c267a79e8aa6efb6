"""Composition: what a study leaves. In: jobs and the result.json of finished runs. Out: study.json and tidy tables.

Everything is rewritten, each file in one step, whenever a run ends, so that a running study can be looked at. Where
values are selected, nothing of the test split enters any of these files.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from consilium import __version__, checkpoint, registry, results, surroundings
from consilium.config import Config
from consilium.study import chosen
from consilium.study.axes import Label
from consilium.study.plan import Plan
from consilium.study.prepare import Job
from consilium.study.runner import Status

STUDY, UNSEEN = "study.json", "unseen.json"
LEVELS = ("pooled", "mean", "worst")
COUNTS = ("image_passes", "peak_memory_bytes")
SPENT = ("parameters.backbone", "parameters.trainable", "parameters.exchanged", "bytes.up", "bytes.down", "bytes.total")
Row = dict[str, Any]


@dataclass
class Outcome:
    """How a run stands."""

    status: Status = "waiting"
    error: str = ""


@dataclass
class Collection:
    """The outcome of a study so far, and its files."""

    plan: Plan
    out: Path
    jobs: Sequence[Job]
    folders: Mapping[str, Path]  # run -> its folder
    warnings: Sequence[str] = ()
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    _numbers: dict[str, Row] = field(default_factory=dict)  # run -> columns of runs.parquet that a finished run has
    _tidy: dict[str, list[Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for job in self.jobs:
            self.outcomes[job.run] = Outcome("refused", job.refused) if job.refused else Outcome()

    @property
    def selects(self) -> bool:
        """Whether values are chosen, so that the test split is out of bounds."""
        return self.plan.study.select is not None

    def mark(self, run: str, status: Status, error: str = "") -> None:
        """Note how a run stands; of a finished one, its numbers are read."""
        self.outcomes[run] = Outcome(status, error)
        if status == "done":
            result = checkpoint.read_json(self.folders[run] / "result.json")
            config = next(job.config for job in self.jobs if job.run == run)
            self._numbers[run] = _numbers(result, self._majority(result)) | _unknown(config)
            splits = ("val",) if self.selects else results.SPLITS
            self._tidy[run] = [*_tidy(result, splits), *_of_unseen(self.folders[run] / UNSEEN, splits)]

    def stopped(self) -> None:
        """Note that what ran was ended, and can be resumed."""
        for run in [run for run, outcome in self.outcomes.items() if outcome.status == "running"]:
            self.mark(run, "waiting")
        self.write()

    def count(self, status: Status) -> int:
        """Number of runs that stand so."""
        return sum(outcome.status == status for outcome in self.outcomes.values())

    def write(self) -> None:
        """Replace all files. The tables come first: study.json never says more than they hold."""
        for name, table in (("runs", self.runs()), ("results", self.results())):
            checkpoint.write_bytes(self.out / f"{name}.parquet", table.to_parquet(index=False))
            checkpoint.write_bytes(self.out / f"{name}.csv", table.to_csv(index=False).encode())
        checkpoint.write_json(self.out / STUDY, self.about())

    def select(self) -> Path | None:
        """Write selected.toml once all runs have ended, where values are to be selected."""
        study, compare = self.plan.study, self.plan.compare
        if study.select is None or self.count("waiting") or self.count("running"):
            return None
        over = study.select.over
        planned = list({tuple(job.settings.items()): job.settings for job in self.jobs if not job.refused}.values())
        found = chosen.points(self.runs(), self.results(), planned, compare, over)
        facts: Row = {"study": study.name, "method": compare.method, "metric": compare.metric, "split": compare.split}
        facts |= {"level": compare.level, "model": compare.model, "seeds": study.seeds}
        searched = [axis for name in over for axis in self.plan.axes if axis.name == name]
        return chosen.write(self.out, found, searched, facts)

    # -------------------------------------------------------------------------------------------- tables
    def runs(self) -> pd.DataFrame:
        """One row per run."""
        names = [axis.name for axis in self.plan.axes]
        table = pd.DataFrame([self._row(job) for job in self.jobs])
        for name in names:
            if table[name].map(type).nunique() > 1 and not table[name].map(_is_number).all():
                table[name] = table[name].map(str)  # a column of a file has one type
        whole = [name for name in (*SPENT, *COUNTS) if name in table]
        return table.astype(dict.fromkeys(whole, "Int64") | {"seconds": "float64", "majority": "float64"})

    def _row(self, job: Job) -> Row:
        outcome = self.outcomes[job.run]
        folder = os.path.relpath(self.folders[job.run], self.out)
        head = {"run": job.run, "folder": folder, "status": outcome.status, "error": outcome.error}
        empty = dict.fromkeys((*SPENT, "seconds", *COUNTS, "majority"))
        return {**head, **job.settings, "seed": job.seed, **empty, **self._numbers.get(job.run, {})}

    def results(self) -> pd.DataFrame:
        """One row per number of a finished run."""
        names = [axis.name for axis in self.plan.axes]
        columns = ["run", *names, "seed", "split", "model", "metric", "level", "site", "value", "low", "high", "n"]
        types = {"value": "float64", "low": "float64", "high": "float64", "n": "Int64"}
        rows = [{"run": job.run, "seed": job.seed, **row} for job in self.jobs for row in self._tidy.get(job.run, ())]
        axes = self.runs().set_index("run")[names]
        table = pd.DataFrame(rows, columns=[name for name in columns if name not in names]).astype(types)
        return table.join(axes, on="run")[columns]

    def _majority(self, result: Mapping[str, Any]) -> float | None:
        if self.plan.compare.split != "test" or self.selects:
            return None
        tree = result.get("majority", {}).get("test", {}).get(self.plan.compare.metric, {})
        value = tree.get(self.plan.compare.level, {}).get("value")
        return None if value is None else float(value)

    # -------------------------------------------------------------------------------------------- study.json
    def about(self) -> dict[str, Any]:
        """Everything about the study but the numbers."""
        plan = self.plan
        return {
            "schema_version": 1,
            "name": plan.study.name,
            "consilium_version": __version__,
            "code": surroundings.code_digest(),
            "versions": surroundings.versions(),
            "hardware": {"cores": os.cpu_count(), "system": platform.platform(terse=True)},
            "notes": list(plan.study.notes),
            "warnings": list(self.warnings),
            "study": plan.study.model_dump(mode="json"),
            "compare": plan.compare.model_dump(mode="json"),
            "select": plan.study.select.model_dump(mode="json") if plan.study.select else None,
            "axes": [{"name": axis.name, "values": list(axis.values)} for axis in plan.axes],
            "excluded": [dict(cell) for cell in plan.excluded],
            "runs": [self._about_run(job) for job in self.jobs],
        }

    def _about_run(self, job: Job) -> dict[str, Any]:
        outcome = self.outcomes[job.run]
        return {
            "run": job.run,
            "folder": os.path.relpath(self.folders[job.run], self.out),
            "status": outcome.status,
            "error": outcome.error,
            "settings": dict(job.settings),
            "seed": job.seed,
            "identity": dict(job.identity),
        }


def _is_number(value: Label) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(result: Mapping[str, Any], majority: float | None) -> Row:
    sent = {f"bytes.{way}": result["bytes"][way]["total"] for way in ("up", "down")}
    return {
        **{
            f"parameters.{name}": count for name, count in result["parameters"].items() if f"parameters.{name}" in SPENT
        },
        **sent,
        "bytes.total": sum(sent.values()),
        "seconds": result["seconds"],
        "image_passes": result["image_passes"]["total"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "majority": majority,
    }


def _unknown(config: Config | None) -> Row:
    """What a strategy that has all images in one place sends are these, and no message of its simulation says so."""
    if config is None:
        return {}
    strategy = registry.build("strategies", config.strategy.name, config.strategy.options())
    return dict.fromkeys(("bytes.up", "bytes.down", "bytes.total")) if strategy.declares.pools_images else {}


def _tidy(result: Mapping[str, Any], splits: Sequence[str]) -> Iterator[Row]:
    """Rows of the run's own models, of its references ("local reference") and, of the test split, of held-out sites."""
    for split in splits:
        for model, tree in result["metrics"][split].items():
            yield from _of_tree(split, model, tree)
        for name, reference in result["references"].items():
            for model, tree in reference["metrics"][split].items():
                yield from _of_tree(split, f"{name} reference" if model == "personal" else f"{name} {model}", tree)
    for model, tree in ((result.get("held_out") or {}).get("metrics") or {}).items() if "test" in splits else ():
        yield from _of_tree("held_out", model, tree)


def _of_unseen(path: Path, splits: Sequence[str]) -> Iterator[Row]:
    """Rows of sites that took no part, by k: models "zero-shot", "4-shot", "local 4-shot", "4-shot - zero-shot"."""
    for row in checkpoint.read_json(path)["rows"] if path.is_file() else ():
        if row["split"] in splits:
            split = "unseen" if row["split"] == "test" else "unseen val"
            model = row["model"].replace("k-shot", f"{row['shots']}-shot")
            head = {"split": split, "model": model, "metric": row["metric"], "level": "site", "site": row["site"]}
            yield {**head, **_value(row)}


def _of_tree(split: str, model: str, tree: Mapping[str, Any]) -> Iterator[Row]:
    for metric, entry in tree.items():
        head = {"split": split, "model": model, "metric": metric}
        for level in LEVELS:
            yield {**head, "level": level, "site": "", **_value(entry[level])}
        for site, value in entry["per_site"].items():
            yield {**head, "level": "site", "site": site, **_value(value)}


def _value(value: Mapping[str, Any]) -> Row:
    return {key: value.get(key) for key in ("value", "low", "high", "n")}
