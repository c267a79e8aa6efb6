"""Runs in stages for tests: small, and made once for whoever asks for the same again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from consilium import checkpoint, config, run
from consilium.experiment import Experiment, assemble

LORA = {"name": "lora", "rank": 2}
LINEAR = {"name": "linear", "tuner": "linear"}
TUNE = {"name": "tune", "tuner": LORA}
PERSONAL = {
    "name": "own",
    "tuner": LORA,
    "part": "personal",
    "strategy": {"name": "local"},
    "head": {"share": "frozen"},
}
TABLE: Mapping[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "sites": {"source": "phantom", "num_images": 48, "image_size": 32, "num_sites": 3},
    "backbone": {"name": "test_vit", "weights": "random", "image_size": 32},
    "train": {"rounds": 2, "batch_size": 8, "learning_rate": 0.01},
    "evaluation": {"bootstrap": 0},
    "engine": {"device": "cpu"},
}


def configured(*each: Mapping[str, Any], **tables: Any) -> config.Config:
    """The stages, over tables of which some are changed."""
    merged = {name: {**TABLE.get(name, {}), **value} if isinstance(value, dict) else value
              for name, value in tables.items()}  # fmt: skip
    return config.from_dict({**TABLE, **merged, **({"stages": list(each)} if each else {})})


@lru_cache(maxsize=1)
def _kept() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@lru_cache(maxsize=16)
def _made(text: str) -> Path:
    """The folder of a run, made once."""
    out = Path(_kept().name) / str(abs(hash(text)))
    return run.run(config.from_dict(json.loads(text)), out)


def finished(*each: Mapping[str, Any], **tables: Any) -> Path:
    """The folder of a run of `configured`."""
    return _made(json.dumps(configured(*each, **tables).to_dict(), sort_keys=True))


def served(folder: Path, site: str = "alpine") -> dict[str, Tensor]:
    """The model that a site uses at the end of a run or stage."""
    return checkpoint.load(folder / "sites" / site / "served.safetensors")[0]


def assembled(*each: Mapping[str, Any], **tables: Any) -> Experiment:
    """The last stage, before anything runs."""
    return assemble(configured(*each, **tables), ("a", "b", "c"))
