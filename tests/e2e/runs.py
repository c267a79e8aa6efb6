"""The small run of the tests of whole runs: its configuration, and when two run folders hold the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from consilium import checkpoint, tensors

CONFIG = """
name = "tiny"
seed = 3

[sites]
source = "phantom"
num_images = 64
image_size = 32

[backbone]
name = "test_vit"
weights = "random"
image_size = 32

[[tuner]]
name = "lora"
rank = 2
dropout = 0.1

[train]
rounds = 3
batch_size = 8
learning_rate = 0.01
augmentation = "dermoscopy"

[evaluation]
bootstrap = 10
"""
KINDS: Mapping[str, tuple[str, ...]] = {
    "fedavg": ("evaluation.references=['local', 'pooled']",),
    "fedper": ("strategy.name=fedper", "train.moments=keep", "evaluation.references=['local']"),
    "half": ("train.participation=0.5", "task.class_weight=inverse", "task.class_counts=federation"),
    "drawless": ("tuner.dropout=0", "evaluation.references=['local', 'pooled']"),
    "unseen": (
        "strategy.name=dual_lora",
        "sites.num_images=96",
        "sites.held_out=['summit']",
        "unseen.shots=[1, 3]",
        "unseen.draws=2",
        "unseen.steps=6",
    ),
    "best": ("strategy.name=fedper", "evaluation.serve=best", "train.schedule.name=constant"),
}
Finished = Callable[[str], Path]


def words(folder: Path, *settings: str) -> list[str | Path]:
    """`consilium run` of the small configuration with these settings."""
    file = folder / "tiny.toml"
    file.write_text(CONFIG)
    return ["run", file, *(word for setting in settings for word in ("--set", setting))]


def read(path: Path) -> Any:
    """Strict JSON."""
    return json.loads(path.read_text(), parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def events(out: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl."""
    return [json.loads(line, parse_constant=_refuse) for line in (out / "events.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


UNLIKE = (".lock", "failures.jsonl")


def assert_same(one: Path, other: Path) -> None:
    """Every number, tensor and prediction has the same bits; times, memory and the number of workers may differ."""
    first, second = ({name for name in contents(out) if not name.endswith(UNLIKE)} for out in (one, other))
    assert first == second
    for name in sorted(first - {"report.html"}):
        assert _essence(one / name) == _essence(other / name), name


def _essence(path: Path) -> Any:
    if path.parent.name == "checkpoints":
        state, meta = checkpoint.load(path)
        return tensors.digest_all(state), _timeless(meta)
    if path.name == "events.jsonl":
        return _timeless(events(path.parent))
    return _timeless(read(path)) if path.suffix == ".json" else path.read_bytes()


VOLATILE = {"seconds", "site_seconds", "peak_memory_bytes", "hardware", "workers", "pool", "control", "envelope"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in VOLATILE}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value
