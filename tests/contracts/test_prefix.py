"""The frozen-prefix cache: with it and without it every bit of a run is the same; what it saves is counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from consilium import checkpoint
from consilium.halves import Halves
from tests import federation, variants

LAST = {
    "linear": [{"name": "linear"}],
    "last attention": [{"name": "attention", "blocks": [5]}],
    "last lora": [{"name": "lora", "rank": 2, "blocks": [4, 5], "dropout": 0.2}],
    "norms on top": [{"name": "ssf"}],
    "drawn of the last": [{"name": "stochastic_block", "blocks": [3, 4, 5]}],
}


def _run(
    folder: Path, name: str, cache: Path | None, *, sites: tuple[int, ...] = (14, 5), **tables: Any
) -> federation.Outcome:
    engine = {"prefix_cache": cache is not None, "cache": None if cache is None else str(cache)}
    tuner = LAST.get(name) or variants.table(name)
    train = {"rounds": 2, **tables.pop("train", {})}
    settings = federation.configure(tuner=tuner, engine=engine, train=train, **tables)
    return federation.run(folder, settings, federation.hospitals(*sites))


def _results(outcome: federation.Outcome) -> dict[str, object]:
    """All that a run leaves: bits of every tensor, predictions, events without their times."""
    found: dict[str, object] = {}
    for path in sorted(outcome.folder.rglob("*")):
        name = path.relative_to(outcome.folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = federation.bits(checkpoint.load(path)[0])
        elif path.suffix == ".parquet":
            found[name] = path.read_bytes()
    found["events"] = [_timeless(event) for event in outcome.events]
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(each) for key, each in value.items() if key not in ("seconds", "bytes")}
    return json.dumps(value)


@contextmanager
def _counted() -> Iterator[list[tuple[int, int, int]]]:
    """(images, from depth, to depth) of every pass through a part of the backbone, whole passes too."""
    seen: list[tuple[int, int, int]] = []
    run = Halves.run

    def counting(self: Halves, variables: Any, inputs: Tensor, start: int, depth: int) -> Tensor:
        if start != depth:
            seen.append((len(inputs), start, depth))
        return run(self, variables, inputs, start, depth)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Halves, "run", counting)
        yield seen


@pytest.mark.parametrize("name", [*variants.TUNERS, *variants.HYBRIDS, *LAST])
def test_no_bit_of_a_run_changes(name: str, tmp_path: Path) -> None:
    off, on = _run(tmp_path / "off", name, None), _run(tmp_path / "on", name, tmp_path / "cache")
    assert _results(on) == _results(off)


@pytest.mark.parametrize("strategy", variants.FEDERATED)
@pytest.mark.parametrize("name", ["last lora", "linear"])
def test_nor_with_any_strategy(name: str, strategy: str, tmp_path: Path) -> None:
    def result(which: str, cache: Path | None) -> object:
        try:
            train = {"local_epochs": 2, **variants.NEEDS.get(strategy, {}).get("train", {})}
            return _results(_run(tmp_path / which, name, cache, strategy={"name": strategy}, train=train))
        except Exception as error:  # a pair that does not fit, with and without
            return str(error)

    assert result("on", tmp_path / "cache") == result("off", None)
