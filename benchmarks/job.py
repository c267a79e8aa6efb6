"""The job that contestants share. In: sites and images. Out: a folder with drawn images, a configuration, a store.

ViT-Tiny at 96 pixels with random weights, LoRA of rank 8 on qkv, batches of 16. The images are drawn and decoded once,
outside all timings.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.measure import ROOT
from consilium import config, run
from consilium.config import Config
from consilium.config_engine import EngineConfig
from consilium.sites.federation import Federation
from consilium.sites.phantom import CLASSES, Phantom, PhantomOptions

FOLDER = ROOT / "runs" / "bench"
BACKBONE = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SIZE, BATCH, RANK, RATE = 96, 16, 8, 1e-3


@dataclass(frozen=True)
class Job:
    """So many sites with so many images each."""

    sites: int
    train: int
    val: int
    test: int

    @property
    def name(self) -> str:
        """Names its folder."""
        return f"{self.sites}x{self.train}-{self.val}-{self.test}"

    @property
    def folder(self) -> Path:
        """Where its images lie."""
        return FOLDER / self.name

    def table(self) -> dict[str, Any]:
        """The configuration as a user would write it, with one round, one worker and no references."""
        columns = {key: key for key in ("image", "label", "site", "group", "split")}
        manifest = {"table": str(self.folder / "images.csv"), "images": str(self.folder / "images"), "columns": columns}
        schedule = {"name": "constant", "warmup": 0}
        train = {"rounds": 1, "batch_size": BATCH, "learning_rate": RATE, "augmentation": "dermoscopy"}
        return {
            "name": "bench",
            "sites": {"source": "manifest", **manifest},
            "task": {"classes": list(CLASSES)},
            "backbone": {"name": BACKBONE, "weights": "random", "image_size": SIZE},
            "tuner": [{"name": "lora", "rank": RANK}],
            "train": {**train, "schedule": schedule},
            "engine": {"device": "cpu", "cache": str(FOLDER / "store")},
        }

    def config(self, **tables: Mapping[str, Any] | Sequence[Any]) -> Config:
        """The same with some keys of its tables replaced."""
        merged = self.table()
        for name, value in tables.items():
            merged[name] = {**merged.get(name, {}), **value} if isinstance(value, Mapping) else value
        return config.from_dict(merged)

    def draw(self) -> None:
        """Draw the images unless they are there."""
        if (self.folder / "images.csv").is_file():
            return
        each = self.train + self.val + self.test
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        rows = ["image,label,site,group,split"]
        for number, (label, image) in enumerate(drawn(self.sites * each, SIZE)):
            site, place = divmod(number, each)
            split = "train" if place < self.train else "val" if place < self.train + self.val else "test"
            image.save(self.folder / "images" / f"{number:05d}.png")
            rows.append(f"{number:05d}.png,{label},site-{site:04d},p{number:05d},{split}")
        (self.folder / "images.csv").write_text("\n".join(rows) + "\n")

    def prepare(self) -> Federation:
        """Images drawn, decoded and split."""
        self.draw()
        return run.prepare(self.config(), lambda _: None)


def drawn(count: int, size: int) -> list[tuple[str, Image.Image]]:
    """So many labelled phantom images, the classes in turn as the phantom draws them."""
    source = Phantom(PhantomOptions(num_images=count, num_sites=4, image_size=size))
    records = source.records().sample(frac=1, random_state=0)
    pictures = ((str(row.label), source.content(str(row.id))) for row in records.itertuples())
    return [(label, Image.open(io.BytesIO(content))) for label, content in pictures]


def engine(**wanted: Any) -> dict[str, Any]:
    """Engine keys that this version knows; a key that is not there yet has no effect to measure."""
    return {key: value for key, value in wanted.items() if key in EngineConfig.model_fields}


def known(key: str) -> bool:
    """Whether this version has an engine key."""
    return key in EngineConfig.model_fields


def toml(table: Mapping[str, Any]) -> str:
    """A configuration as TOML; inner tables inline, so that one line is one table of the top."""
    return "\n".join(f"{key} = {_inline(value)}" for key, value in table.items()) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_inline(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)
