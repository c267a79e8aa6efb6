"""Composition: the choice of a scale. In: models for several scales, sites' validation images. Out: what each is worth.

A site looks at every candidate on its own validation images and tells a few numbers of each. In one place that is a
simulation; apart, every site writes its numbers to a file (`merge.json`), and the files are read where the merge is
made. Test images are never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from consilium import checkpoint, config, run
from consilium.coordinator import LOWER_IS_BETTER
from consilium.data import SiteData
from consilium.errors import ConfigError, StateError
from consilium.exchange import Display
from consilium.experiment import load_backbone
from consilium.local import predict as inference
from consilium.metrics import without_nan
from consilium.predict import Trained

Table = dict[str, dict[str, dict[str, float | None]]]  # site -> candidate -> metric -> value
DEFAULT = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of mean, ties, dare; a sum of K vectors is K means
START = "start"


@dataclass(frozen=True)
class Question:
    """What is compared: `candidates` by name, of which scales can be chosen; `of`: which vectors, by which rule."""

    of: str
    candidates: Mapping[str, Callable[[], Trained]]
    like: Trained  # any of them: what images must look like, and the classes


def scales(given: Sequence[float] | None, rule: str, count: int) -> tuple[float, ...]:
    """The candidates, rising. ConfigError for one that is no positive number."""
    chosen = given or [scale / (count if rule == "sum" else 1) for scale in DEFAULT]
    if not all(math.isfinite(scale) and scale > 0 for scale in chosen):
        raise ConfigError("a scale is a positive number", where="--scales", received=list(chosen))
    return tuple(sorted(set(chosen)))


def ask(question: Question, sources: Sequence[Path], show: Display) -> Table:
    """The table of all sites: of those that a configuration (TOML) names, and of those that told (JSON)."""
    found: Table = {}
    for source in sources:
        rows = _told(question, source) if source.suffix == ".json" else _looked(question, source, show)
        if twice := sorted(found.keys() & rows.keys()):
            raise ConfigError("a site validates once", where=str(source), received=", ".join(twice))
        found |= rows
    if not found:
        raise ConfigError("no site has validation images", where="--validate", received=", ".join(map(str, sources)))
    return found


def _looked(question: Question, source: Path, show: Display) -> Table:
    settings = config.load(source)
    prepared = run.prepare(settings, show)
    model = question.like.experiment
    if tuple(prepared.classes) != tuple(model.task.classes):
        what = "the classes of this configuration are not those of the adapters"
        raise ConfigError(what, where=str(source), allowed=model.task.classes, received=prepared.classes)
    theirs = load_backbone(settings.backbone).preprocessing
    if theirs != model.backbone.preprocessing:
        what = "the images of this configuration are prepared in another way than those of the adapters"
        raise ConfigError(what, where=str(source), allowed=model.backbone.preprocessing, received=theirs)
    there = {name: data for name, data in prepared.sites.items() if len(data.val)}
    found: Table = {name: {} for name in there}
    for candidate, build in question.candidates.items():  # one model in memory at a time
        trained = build()
        for name, data in there.items():
            found[name][candidate] = validated(trained, data)
    return found


def validated(trained: Trained, data: SiteData) -> dict[str, float | None]:
    """Metrics of a model on a site's validation images."""
    pieces = trained.experiment
    setting = pieces.setting
    found = inference.outputs(
        trained.model, trained.variables, data.val, setting.preprocessing, setting.device, "float32"
    )
    metrics = pieces.task.validation(pieces.task.probabilities(found).numpy(), data.val.labels)
    return {name: without_nan(float(value)) for name, value in metrics.items()}


def _told(question: Question, source: Path) -> Table:
    told = checkpoint.read_json(source).get("validation") or {}
    if told.get("of") != question.of:
        what = "these numbers are of other adapters, or of another rule"
        remedy = "every site validates the same adapters with the same options"
        raise StateError(what, where=str(source), allowed=question.of, received=told.get("of"), remedy=remedy)
    rows: Table = told["sites"]
    if missing := sorted({name for row in rows.values() for name in question.candidates.keys() - row.keys()}):
        raise StateError("these numbers lack candidates", where=str(source), received=", ".join(missing))
    return rows


def means(table: Table, select: str) -> dict[str, float]:
    """Of every candidate, the mean over the sites where the metric is defined; ConfigError for one that nobody has."""
    known = sorted({name for row in table.values() for numbers in row.values() for name in numbers})
    if select not in known:
        raise ConfigError("no such validation metric", where="--select", allowed=", ".join(known), received=select)
    found: dict[str, float] = {}
    for name in next(iter(table.values())):
        values = [value for row in table.values() if (value := row[name][select]) is not None]
        if not values:
            remedy = "choose another --select"
            raise ConfigError(f"no site's validation images define {select}", where="--select", remedy=remedy)
        found[name] = math.fsum(values) / len(values)
    return found


def best(found: Mapping[str, float], scales: Sequence[float], select: str) -> float:
    """The scale with the best mean; of equal ones the smallest."""
    sign = -1 if select in LOWER_IS_BETTER else 1
    return max(scales, key=lambda scale: (sign * found[label(scale)], -scale))


def label(scale: float) -> str:
    """A scale as a candidate's name."""
    return f"{scale:.6g}"
