"""Every configuration that is shipped can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium import config

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    loaded = config.load(path)
    assert loaded.name == f"{path.parent.name}-{path.stem}"
    assert set(loaded.evaluation.references) == {"local", "pooled"}


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} == {"fedavg-linear", "fedavg-lora", "fedper-linear", "fedper-lora"}
