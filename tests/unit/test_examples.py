"""Every configuration that is shipped can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium import config, experiment

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    loaded = config.load(path)
    assert loaded.name == f"{path.parent.name}-{path.stem}"
    assert set(loaded.evaluation.references) == {"local", "pooled"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_pieces_of_a_shipped_configuration_fit(path: Path) -> None:
    loaded = config.load(path, ["backbone.weights=random", "backbone.image_size=32"])
    pieces = experiment.assemble(loaded, loaded.task.classes or ())
    assert len(pieces.up(1)) > 0 or path.stem == "fedper-linear"


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} == {"fedavg-linear", "fedavg-lora", "fedper-linear", "fedper-lora"}
