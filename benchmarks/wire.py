"""Bytes on the wire: what a site's reply takes for every tuner, over the raw bytes of its tensors; what codecs save."""

from __future__ import annotations

import torch

from benchmarks import job
from benchmarks.frame import Estimate, Result, Scale
from benchmarks.job import Job
from consilium import registry
from consilium.config import Config
from consilium.errors import ConsiliumError
from consilium.experiment import Experiment, assemble
from consilium.messages import Reply, encode, size

NAME, TITLE = "wire", "Bytes on the wire"
CLASSES = ("a", "b", "c", "d")


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
        _codecs(result)
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


def _codecs(result: Result) -> None:
    result.facts["codecs"] = "not measured"
