"""Hospitals that never meet: each has a finished run of its own, a key pair and a signed adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consilium import checkpoint, config, experiment, signing
from consilium.export import ADAPTER, export

CLASSES = ["dark", "green", "bright"]
BACKBONE = {"name": "test_vit", "weights": "random", "image_size": 32}
COUNTS = {"n": 30, "classes": {"dark": 10, "green": 10, "bright": 10}}


@dataclass(frozen=True)
class Hospital:
    """Where its adapter and its public key lie; the words for --trust."""

    name: str
    adapter: Path
    public: Path
    private: Path

    @property
    def trust(self) -> str:
        return f"{self.name}={self.public}"


def moved(variables: Mapping[str, torch.Tensor], seed: int, by: float = 0.05) -> dict[str, torch.Tensor]:
    """Training, as far as a merge can see."""
    draw = torch.Generator().manual_seed(seed)
    return {name: value + by * torch.randn(value.shape, generator=draw) for name, value in sorted(variables.items())}


def hospital(folder: Path, name: str, number: int = 0, *, counts: bool = False, **tables: Any) -> Hospital:
    """Run, key and adapter of one hospital; `tables` of its configuration beside the common ones."""
    run = finished(folder / name / "run", name, number, **tables)
    private = folder / name / f"{name}.key"
    public, _ = signing.new_key(private)
    out = export(run, "safetensors", folder / name / "out", name, sign=private, counts=counts)
    return Hospital(name, out / ADAPTER, public, private)


def finished(run: Path, name: str, number: int, **tables: Any) -> Path:
    """A run folder as `run.py` leaves it, with the model of one site."""
    plain = {"backbone": BACKBONE, "tuner": [{"name": "lora", "rank": 2}], **tables}
    classes = plain.pop("classes", CLASSES)
    settings = config.from_dict(plain)
    pieces = experiment.assemble(settings, classes)
    variables = moved(pieces.model.initial(settings.seed), number)
    checkpoint.write_json(run / "config.json", {"classes": classes, "config": settings.to_dict()})
    checkpoint.write_json(run / "result.json", {"sites": {name: {"train": {**COUNTS, "n": 10 * (number + 1)}}}})
    summary = {"image_passes": {"total": 3, "per_site": {name: 3}}, "served_round": 2}
    checkpoint.write_json(run / "summary.json", summary)
    meta = {"model": name, "backbone_digest": pieces.backbone.digest}
    checkpoint.save(run / "adapters" / f"{name}.safetensors", variables, meta)
    return run
