"""Composition: use of a finished run. In: a run folder, or an exported one, and images. Out: a row of probabilities per
image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from consilium import checkpoint, config, experiment, members, registry
from consilium.data import Examples, UInt8Array
from consilium.errors import BackboneError, ConfigError, DataError, StateError
from consilium.local import predict as inference
from consilium.run_folder import CONFIG
from consilium.sealing import Seal, read_key, sealed
from consilium.sites import images as files
from consilium.sites.store import transform_pixels
from consilium.tensors import Tensors
from consilium.tuners.compose import TunedModel

CHUNK = 256  # images in memory at a time
ADAPTER = "adapter.safetensors"  # of a folder that is a model without its run


@dataclass(frozen=True)
class Trained:
    """The model that one site, or all together, would use."""

    experiment: experiment.Experiment
    model: TunedModel
    variables: Tensors
    name: str  # of the site, or "global"


def load_trained(run: Path, site: str | None = None, device: str = "auto", weights: str | None = None) -> Trained:
    """Rebuild the model of a finished run, or of a folder that `export --format safetensors` or `merge` wrote, whose
    backbone may be a file, `weights`. StateError where there is none, or for another backbone."""
    if (run / ADAPTER).is_file():
        return _named(load_exported(run / ADAPTER, weights, device), run, site)
    if weights is not None:
        what = "a run names its own weights: this belongs to an exported or merged folder"
        raise ConfigError(what, where="--weights", received=weights)
    if not (run / CONFIG).is_file():
        raise StateError("this is no run folder", where=str(run), remedy="give the folder that `consilium run` wrote")
    stored = checkpoint.read_json(run / CONFIG)
    settings = config.from_dict(stored["config"])
    seal = None
    if site and stored.get("state_key"):
        key = read_key(settings.engine.state_key_file, settings.engine.state_key_variable)
        seal = sealed("model", key, stored["agreement_hash"], site)
    return rebuild(settings, stored["classes"], _adapter(run, site), site or "global", device, seal)


def load_exported(file: Path, weights: str | None = None, device: str = "auto") -> Trained:
    """The model of an exported file. `weights`: a file with the backbone's, left out: where the run had them from."""
    _, manifest = checkpoint.load(file)
    if "settings" not in manifest:
        raise StateError("this file is no exported model", where=str(file), remedy="export with --format safetensors")
    backbone = manifest["settings"]["backbone"]
    chosen = {**backbone, "weights": backbone["weights"] if weights is None else weights}
    settings = config.from_dict({**manifest["settings"], "backbone": chosen})
    try:
        return rebuild(settings, manifest["classes"], file, manifest["model"], device)
    except BackboneError as error:
        remedy = error.remedy if weights else "name the file of the backbone's weights, with --weights"
        raise BackboneError(error.what, where=str(file), received=error.received, remedy=remedy) from error


def _named(trained: Trained, folder: Path, site: str | None) -> Trained:
    if site not in (None, trained.name):
        raise StateError(
            "this folder has no model of this name", where=str(folder), allowed=trained.name, received=site
        )
    return trained


def rebuild(
    settings: config.Config,
    classes: Sequence[str],
    adapter: Path,
    name: str,
    device: str = "auto",
    seal: Seal | None = None,
) -> Trained:
    """The model of this configuration with the variables of a file; StateError where the two do not belong together,
    or the file is not encrypted as `seal` says."""
    engine = settings.engine.model_copy(update={"device": device, "compile": False})
    train = settings.train.model_copy(update={"precision": "float32"})
    pieces = experiment.assemble(settings.model_copy(update={"engine": engine, "train": train, "start": None}), classes)
    variables, meta = checkpoint.load(adapter, seal)
    if meta.get("backbone_digest", pieces.backbone.digest) != pieces.backbone.digest:
        what = "the backbone is not the one this run was trained on"
        raise StateError(what, where=str(adapter), allowed=meta["backbone_digest"], received=pieces.backbone.digest)
    ours = json.loads(json.dumps(vars(pieces.backbone.preprocessing)))
    if meta.get("preprocessing", ours) != ours:
        what = "the backbone's preprocessing is not the one this run was trained with"
        raise StateError(what, where=str(adapter), allowed=meta["preprocessing"], received=ours)
    model = cast(TunedModel, pieces.model)
    if missing := sorted((model.specs.keys() | pieces.frozen.keys()) - members.names(variables)):
        raise StateError("the adapter lacks tensors of the model", where=str(adapter), received=missing[:3])
    return Trained(pieces, model, {n: v.float() if v.dtype == torch.float64 else v for n, v in variables.items()}, name)


def predict(run: Path, images: Sequence[Path], site: str | None = None, weights: str | None = None) -> pd.DataFrame:
    """One row per image, in the order given: id, p.<class>, predicted, error.

    A folder stands for the images in it. An unreadable image has an error and no numbers. DataError where none can be
    read, or there is none.
    """
    trained = load_trained(run, site, weights=weights)
    paths = list(_expand(images))
    if not paths:
        raise DataError("there are no images to predict", received=", ".join(map(str, images)) or "nothing")
    parts = [_chunk(trained, paths[start : start + CHUNK]) for start in range(0, len(paths), CHUNK)]
    table = pd.concat(parts, ignore_index=True)
    if table["error"].notna().all():
        received = f"{table['id'][0]}: {table['error'][0]}"
        raise DataError(f"not one of {len(table)} images can be read", received=received)
    return table


def _adapter(run: Path, site: str | None) -> Path:
    path = run / "adapters" / f"{site or 'global'}.safetensors"
    if not path.is_file():
        there = sorted(file.stem for file in (run / "adapters").glob("*.safetensors"))
        if not there:
            raise StateError("this run is not finished", where=str(run), remedy="finish it first, with --resume")
        what = "this run has no model of this name" if site else "the strategy of this run leaves no global model"
        remedy = None if site else "name a site"
        raise StateError(what, where=str(run), allowed=", ".join(there), received=site, remedy=remedy)
    return path


def _expand(images: Sequence[Path]) -> Iterator[Path]:
    for path in images:
        if path.is_dir():
            yield from (path / name for name in files.Archive(path).paths)
        else:
            yield path


def _chunk(trained: Trained, paths: Sequence[Path]) -> pd.DataFrame:
    read = [_read(trained, path) for path in paths]
    pixels = [found for found in read if isinstance(found, np.ndarray)]
    table = pd.DataFrame({"id": [str(path) for path in paths]})
    good = np.array([isinstance(found, np.ndarray) for found in read])
    classes = list(trained.experiment.task.classes)
    numbers = np.full((len(paths), len(classes)), np.nan)
    if pixels:
        numbers[good] = _probabilities(trained, np.stack(pixels))
    for index, name in enumerate(classes):
        table[f"p.{name}"] = numbers[:, index]
    best = [classes[int(row.argmax())] if ok else None for row, ok in zip(numbers, good, strict=True)]
    table["predicted"] = pd.Series(best, dtype=object)
    table["error"] = pd.Series([found if isinstance(found, str) else None for found in read], dtype=object)
    return table


def _read(trained: Trained, path: Path) -> UInt8Array | str:
    """Pixels as the model wants them, or why there are none."""
    sites = trained.experiment.config.sites
    options = registry.parse_options(registry.get("sources", sites.source), sites.options())
    try:
        decoded = files.decode(path.read_bytes(), getattr(options, "bits", 16))
        return transform_pixels(decoded, trained.experiment.backbone.preprocessing)
    except FileNotFoundError:
        return "there is no such file"
    except (OSError, DataError) as error:
        return " ".join(str(error).split())


def _probabilities(trained: Trained, pixels: UInt8Array) -> np.ndarray:
    pieces, count = trained.experiment, len(pixels)
    nothing = np.full(count, "")
    rows = np.arange(count)
    examples = Examples(pixels, rows, np.zeros(count, dtype=np.int64), nothing, nothing, nothing)
    setting = pieces.setting

    def one(model: Tensors) -> Tensor:
        return inference.outputs(trained.model, model, examples, setting.preprocessing, setting.device, "float32")

    return members.probabilities(trained.variables, one, pieces.task.probabilities).numpy()
