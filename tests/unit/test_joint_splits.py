"""Few validation and test images go through a model together, and the predictions are those of two passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from consilium.data import SiteData
from consilium.engines import site as engine
from consilium.engines.site import Site
from tests import federation


def of_one_store(name: str, val: int, test: int, seed: int) -> SiteData:
    """A site whose splits pick from the same images."""
    whole = federation.examples(name, 9 + val + test, seed)
    keys = ("rows", "labels", "ids", "groups", "origins")
    parts = np.split(np.arange(len(whole)), [9, 9 + val])
    return SiteData(name, *(replace(whole, **{key: getattr(whole, key)[at] for key in keys}) for at in parts))


SITES = {"a": of_one_store("a", 2, 5, 0), "b": of_one_store("b", 6, 7, 1)}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through a model, each time that predictions were made."""
    seen: list[int] = []
    plain = engine.outputs

    def count(model, variables, examples, *rest):  # type: ignore[no-untyped-def]
        seen.append(len(examples))
        return plain(model, variables, examples, *rest)

    monkeypatch.setattr(engine, "outputs", count)
    return seen


def predictions(folder: Path, sites: dict[str, SiteData], **tables: object) -> dict[str, bytes]:
    """What sites left on their disks."""
    train = {**federation.TABLE["train"], "rounds": 1}
    federation.run(folder, federation.configure(train=train, **tables), sites)
    return {site: (folder / "sites" / site / "predictions.parquet").read_bytes() for site in sites}


def test_one_pass_gives_what_two_give(tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    together = predictions(tmp_path / "together", SITES)
    assert passes[4:] == [7, 7, 13, 13]  # behind the validations of the round; personal and before the last sum
    passes.clear()
    monkeypatch.setattr(Site, "_joint", None)
    assert predictions(tmp_path / "apart", SITES) == together
    assert passes[4:] == [2, 5, 2, 5, 6, 7, 6, 7]


@pytest.mark.parametrize(
    ("data", "tables"),
    [
        (of_one_store("a", 1, 5, 0), {}),  # one image alone
        (of_one_store("a", 2, 1, 0), {}),
        (of_one_store("a", 0, 5, 0), {}),
        (of_one_store("a", 8, 9, 0), {}),  # enough of them
        (federation.hospital("a"), {}),  # two stores
        (SITES["a"], {"tuner": [{"name": "linear"}]}),  # a kept prefix
        (SITES["a"], {"head": {"kind": "mlp"}}),
    ],
)
def test_nothing_else_is_joined(tmp_path: Path, passes: list[int], data: SiteData, tables: dict[str, object]) -> None:
    predictions(tmp_path, {"a": data}, **tables)
    assert len(data.val) + len(data.test) not in passes[2:] or not len(data.val)
