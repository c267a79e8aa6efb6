"""Composition: what two adapters know. In: a finished run of a simulation. Out: mechanism.json, and its report again.

Does the personal part encode the site, and the shared one not? A linear probe (`probe.py`) is asked which site an image
of the validation split comes from, by the pooled features of the backbone alone, with the shared part alone, with one
site's personal part alone, and with a whole model; and by what a part alone adds to the features of the backbone, as
these tell sites apart before anything is trained. Every adapter is applied to the images of ALL sites: were each image
shown to its own site's adapter, the probe would tell the adapters apart and not what they see. Beside them stands what
the class label alone gives away, as sites differ in their classes, and the same probe for sites that were exchanged at
random between patients. And, of models that differ: what each site's model is worth on every site's images.
Simulation only: it needs the images of several sites in one process. No test image is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from consilium import checkpoint, config, predict, results, run
from consilium.data import Examples
from consilium.errors import DataError, StateError
from consilium.exchange import Display
from consilium.experiment import Experiment
from consilium.local.predict import outputs, pooled_features
from consilium.probe import FOLDS, PENALTY, Array, Question, shuffled
from consilium.run_folder import CONFIG, SPLIT
from consilium.sites.federation import Federation
from consilium.tensors import Tensors, digest_all

FILE = "mechanism.json"
SHUFFLES = 3
ADDS = "_adds"  # behind a part: the features with it minus those of the backbone alone
ORDER = ("label", "backbone", "shared", "personal", f"shared{ADDS}", f"personal{ADDS}", "whole")
CONTRASTS = (
    ("personal_adds", "shared_adds"),
    ("personal", "shared"),
    ("personal", "backbone"),
    ("shared", "backbone"),
    ("whole", "backbone"),
)


@dataclass(frozen=True)
class Asked:
    """One probe: `part` is label, backbone, shared, personal, these two with ADDS, or whole; `adapter` the site it is
    of, "" where all sites have the same."""

    part: str
    adapter: str
    accuracies: Array  # [1 + replicates]
    control: float  # of exchanged sites


def examine(folder: Path, display: Display | None = None) -> dict[str, Any]:
    """Probe a finished run, write mechanism.json into its folder, render its report again, and return what was found.

    Raises StateError for a folder that is not a finished simulation or whose data have changed, DataError where fewer
    than two sites have validation images of two patients.
    """
    if not (folder / "result.json").is_file():
        remedy = "give the folder of a finished run; an interrupted one goes on with --resume"
        raise StateError("this is no finished run: there is no result.json", where=str(folder), remedy=remedy)
    stored = checkpoint.read_json(folder / CONFIG)
    if "data_digest" not in stored or not (folder / SPLIT).is_file():
        what = "only a simulation can be asked this: it takes the images of several sites in one place"
        raise StateError(what, where=str(folder), remedy="give the folder that `consilium run` wrote")
    settings = config.from_dict(stored["config"])
    prepared = run.prepare(settings, display or (lambda _: None))
    _same_data(folder, stored, prepared)
    sites, left_out = _probed(prepared)
    trained = {site: predict.load_trained(folder, site) for site in prepared.sites}
    pieces = next(iter(trained.values())).experiment
    parts = list(_parts(pieces, {site: each.variables for site, each in trained.items()}))
    images = [prepared.sites[site].val for site in sites]
    labels = np.concatenate([np.full(len(each), at) for at, each in enumerate(images)]).astype(np.int64)
    groups = [str(group) for each in images for group in each.groups]
    question = Question.of(labels, groups, len(sites), settings.evaluation.bootstrap, settings.seed)
    shuffles = [shuffled(labels, groups, settings.seed, number) for number in range(SHUFFLES)]
    asked = [_ask(question, shuffles, "label", "", _one_hot(images, len(prepared.classes)))]
    plain = _features(pieces, {}, images)
    asked.append(_ask(question, shuffles, "backbone", "", plain))
    for part, adapter, variables in parts:
        features = _features(pieces, variables, images)
        asked.append(_ask(question, shuffles, part, adapter, features))
        if part != "whole":
            asked.append(_ask(question, shuffles, f"{part}{ADDS}", adapter, features - plain))
    cross = _cross(pieces, {site: each.variables for site, each in trained.items()}, images)
    found = {**_facts(settings, sites, left_out, images), **_summed(asked), "cross": cross}
    checkpoint.write_json(folder / FILE, found)
    results.report(folder)
    return found


def _same_data(folder: Path, stored: Mapping[str, Any], prepared: Federation) -> None:
    for key in ("data_digest", "split_hash"):
        if stored.get(key) != getattr(prepared, key):
            what, remedy = f"the data are not those of this run: {key}", "put the images and the split back in place"
            received = getattr(prepared, key)
            raise StateError(what, where=str(folder), allowed=stored.get(key), received=received, remedy=remedy)


def _probed(prepared: Federation) -> tuple[list[str], list[str]]:
    """Sites with validation images of two groups or more, so that a probe can learn and be asked; the others."""
    fits = {site: len(set(data.val.groups.tolist())) > 1 for site, data in prepared.sites.items()}
    sites, left_out = (sorted(s for s, fit in fits.items() if fit == wanted) for wanted in (True, False))
    if len(sites) < 2:
        what = "a probe of the site needs two sites with validation images of two patients each"
        raise DataError(what, allowed="2 or more", received=sites, remedy="give sites.split a larger val")
    return sites, left_out


# ------------------------------------------------------------------------------------------------ features
def _parts(pieces: Experiment, served: Mapping[str, Tensors]) -> Iterator[tuple[str, str, Tensors]]:
    """(part, site, variables): what else is missing adds nothing. Adapters that all sites share are asked about once.

    Shared and personal are told apart where a strategy sums two parts; elsewhere whole models are all there is.
    """
    declares, specs = pieces.strategy.declares, pieces.model.specs
    own = frozenset(name for name, spec in specs.items() if spec.tag.part in declares.personal_parts)
    two = declares.combination == "sum" and any(part.personal for part in declares.parts)
    every = frozenset(specs)
    for part, names in {**({"shared": every - own, "personal": own} if two else {}), "whole": every}.items():
        inside = names - {name for name in names if specs[name].tag.role == "head"}  # no features depend on a head
        of = {site: {n: v for n, v in values.items() if n in inside} for site, values in served.items()}
        alike = len({digest_all(values) for values in of.values()}) == 1
        yield from ((part, "" if alike else site, of[site]) for site in ([min(of)] if alike else sorted(of)))


def _features(pieces: Experiment, variables: Tensors, images: Sequence[Examples]) -> Tensor:
    setting = pieces.setting
    found = [pooled_features(pieces.model, variables, each, setting.preprocessing, setting.device) for each in images]
    return torch.cat(found)


def _one_hot(images: Sequence[Examples], num: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(np.concatenate([each.labels for each in images])), num).float()


def _cross(pieces: Experiment, served: Mapping[str, Tensors], images: Sequence[Examples]) -> dict[str, Any]:
    """{model of a site: {site of the images: balanced accuracy}}; nothing where all models are one."""
    if len({digest_all(variables) for variables in served.values()}) == 1:
        return {}
    evaluation, seed = pieces.config.evaluation, pieces.config.seed
    found = {}
    for site, variables in sorted(served.items()):
        table = pd.concat([_predictions(pieces, variables, each) for each in images], ignore_index=True)
        tree = pieces.task.metrics(table, bootstrap=evaluation.bootstrap, seed=seed, sites=sorted(set(table["site"])))
        found[site] = tree["balanced_accuracy"]["per_site"]
    return found


def _predictions(pieces: Experiment, variables: Tensors, images: Examples) -> pd.DataFrame:
    setting = pieces.setting
    device, precision = setting.device, "float32"
    found = outputs(pieces.model, variables, images, setting.preprocessing, device, precision)
    scores = pieces.task.probabilities(found).numpy()
    rows = {"site": images.origins, "id": images.ids, "group": images.groups, "label": images.labels}
    return pd.DataFrame({**rows, **{f"p.{name}": scores[:, at] for at, name in enumerate(pieces.task.classes)}})


# ------------------------------------------------------------------------------------------------ numbers
def _ask(question: Question, shuffles: Sequence[Any], part: str, adapter: str, features: Tensor) -> Asked:
    accuracies = question.balanced_accuracy(features)
    controls = [question.control(features, exchanged) for exchanged in shuffles]
    return Asked(part, adapter, accuracies, float(np.mean(controls)))


def _facts(
    settings: config.Config, sites: list[str], left_out: list[str], images: Sequence[Examples]
) -> dict[str, Any]:
    numbers = {"folds": FOLDS, "penalty": PENALTY, "shuffles": SHUFFLES, "bootstrap": settings.evaluation.bootstrap}
    sizes = {
        site: {"images": len(each), "groups": len(set(each.groups.tolist()))}
        for site, each in zip(sites, images, strict=True)
    }
    return {
        "schema_version": 1,
        "split": "val",
        "strategy": settings.strategy.name,
        "sites": sizes,
        "left_out": left_out,
        "chance": 1 / len(sites),
        "probe": numbers,
    }


def _summed(asked: Sequence[Asked]) -> dict[str, Any]:
    """Every probe, the mean over the adapters of a part, and paired differences of these means."""
    kinds = sorted({each.part for each in asked}, key=ORDER.index)
    means = {part: np.mean([each.accuracies for each in asked if each.part == part], axis=0) for part in kinds}
    controls = {part: float(np.mean([each.control for each in asked if each.part == part])) for part in kinds}
    pairs = [(a, b) for a, b in CONTRASTS if a in means and b in means]
    return {
        "probes": [
            {"part": each.part, "adapter": each.adapter, **_value(each.accuracies), "control": each.control}
            for each in asked
        ],
        "parts": {part: {**_value(means[part]), "control": controls[part]} for part in kinds},
        "differences": {f"{a} - {b}": _value(means[a] - means[b]) for a, b in pairs},
    }


def _value(replicates: Array) -> dict[str, float | None]:
    if len(replicates) < 2:
        return {"value": float(replicates[0]), "low": None, "high": None}
    low, high = np.percentile(replicates[1:], [2.5, 97.5]).tolist()
    return {"value": float(replicates[0]), "low": low, "high": high}
