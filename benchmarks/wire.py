"""Bytes on the wire: what a site's reply takes for every tuner, over the raw bytes of its tensors; what codecs save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import inside, job
from benchmarks.frame import Estimate, Result, Scale
from benchmarks.job import Job
from consilium import config, registry
from consilium import run as whole_run
from consilium.config import Config
from consilium.errors import ConsiliumError
from consilium.experiment import Experiment, assemble
from consilium.messages import Reply, encode, size

NAME, TITLE = "wire", "Bytes on the wire"
CLASSES = ("a", "b", "c", "d")
CODECS = {"float32": 1, "bfloat16": 2, "int8": 4}


def run(scale: Scale) -> Result:
    """Every tuner that works alone."""
    result = Result()
    found: dict[str, float] = {}
    names = [
        each.name for each in registry.members("tuners").values() if each.build.__module__.startswith("consilium.")
    ]
    for name in scale.pick(names, ["lora", "linear"]):
        try:
            experiment = assemble(_config(name), CLASSES)
        except ConsiliumError as error:
            result.facts[name] = str(error)
            continue
        found[name] = overhead(experiment)
    worst = max(found, key=lambda name: found[name])
    what = f"payload over the raw bytes of its tensors, every tuner (worst: {worst})"
    result.add(what, Estimate(found[worst], min(found.values()), found[worst]), target=("<=", 1.01))
    result.samples["payload over raw"] = found
    if "wire" in Config.model_fields:
        _codecs(result, scale)
    else:
        result.facts["codecs"] = "the table [wire] is not there yet"
    return result


def _config(name: str) -> Config:
    return Job(8, 64, 9, 18).config(tuner=[{"name": name}], engine=job.engine(prefix_cache=False))


def _reply(experiment: Experiment) -> Reply:
    specs = experiment.sent(1, "site-0000")
    torch.manual_seed(0)
    tensors = {name: torch.randn(spec.shape).to(spec.dtype) for name, spec in specs.items()}
    return Reply("site-0000", 1, 64, tensors, {})


def overhead(experiment: Experiment) -> float:
    """Serialised tensors over their raw bytes, of what a site sends in the first round."""
    reply = _reply(experiment)
    raw = sum(value.nbytes for value in reply.tensors.values())
    return size(encode(reply, experiment.up(1))).payload / raw


def _codecs(result: Result, scale: Scale) -> None:
    """Bytes that sites send and what it costs, on a federation that learns something: the quick start, smaller."""
    table = config.quick_start()
    table["sites"]["num_images"] = scale.pick(600, 60)
    table["train"]["rounds"] = scale.pick(5, 2)
    table["evaluation"] = {"references": []}
    table["engine"] = {"device": "cpu", "cache": str(job.FOLDER / "store")}
    found = {name: _learn({**table, "wire": {"codec": name}}) for name in CODECS}
    for name, factor in CODECS.items():
        if name == "float32":
            continue
        saved = found["float32"]["bytes"] / found[name]["bytes"]
        result.add(f"{name}: bytes sent by sites, float32 over it", saved, "x", (">=", 0.98 * factor))
        for metric in ("balanced_accuracy", "loss"):
            words = f"{name}: change of the mean validation {metric.replace('_', ' ')} after the last round"
            result.add(words, found[name][metric] - found["float32"][metric], "")
    result.samples["codecs"] = found


def _learn(table: dict[str, Any]) -> dict[str, float]:
    settings = config.from_dict(table)
    prepared = whole_run.prepare(settings, lambda _: None)
    means: list[dict[str, float]] = []

    def listen(event: Mapping[str, Any]) -> None:
        if event["event"] == "round":
            means.append(event["val_mean"])

    found = inside.federate(settings, prepared.sites, prepared.classes, listen=listen)
    return {"bytes": float(sum(found.progress.ledger.payload["up"].values())), **means[-1]}
