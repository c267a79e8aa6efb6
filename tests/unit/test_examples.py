"""Every configuration and every study that is shipped can be read."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from consilium import config, experiment, registry
from consilium.deployment import files
from consilium.study.plan import plan

FILES = sorted((Path(__file__).parents[2] / "examples").rglob("*.toml"))
APART = [path for path in FILES if path.parent.name == "deployment"]
FILES = [path for path in FILES if path not in APART]
STUDIES = [path for path in FILES if "base" in tomllib.loads(path.read_text())]
RUNS = [path for path in FILES if path not in STUDIES]
AXES = {"codecs": "codec", "tuners": "tuner", "personalised": "strategy"}  # what a folder's studies compare
PARTS = ("base", "base-reduced", "in-domain")  # of the tuner study: no run of their own, or no federation


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    loaded = config.load(path)
    if path.stem not in PARTS:
        assert loaded.name == f"{path.parent.name}-{path.stem}"
        assert set(loaded.evaluation.references) == {"local", "pooled"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_pieces_of_a_shipped_configuration_fit(path: Path) -> None:
    loaded = config.load(path, ["backbone.weights=random", "backbone.image_size=32"])
    pieces = experiment.assemble(loaded, loaded.task.classes or ("a", "b"))
    assert len(pieces.up(1)) > 0 or path.stem in ("fedper-linear", "in-domain", "linear-lora-personal")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_is_valid_and_gives_every_method_as_many_runs(path: Path) -> None:
    cells = plan(path).cells
    methods = [cell.settings[AXES[path.parent.name]] for cell in cells]
    assert not [cell.refused for cell in cells if cell.refused]
    if path.stem != "tune":  # whose methods differ in how many strengths they try
        assert len({methods.count(name) for name in methods}) == 1


def test_the_study_of_tuners_has_every_tuner() -> None:
    used = {table.name for cell in plan(_of("tuners")).cells if cell.config for table in cell.config.tuner}
    assert used == set(registry.members("tuners"))


def _of(folder: str) -> Path:
    return next(path for path in STUDIES if (path.parent.name, path.stem) == (folder, "study"))


def test_the_agreement_and_the_rules_of_a_shipped_deployment_can_be_read(tmp_path: Path) -> None:
    agreement, own = (path.read_text() for path in APART)
    (tmp_path / files.FEDERATION).write_text(agreement)
    for site in files.read(tmp_path).deployment.sites:
        (tmp_path / files.SITE).write_text(f'site = "{site}"\n{own}')
        assert files.read_site(tmp_path).gate.tensors[0].part == "shared"


def test_there_are_examples() -> None:
    assert {path.stem for path in RUNS} >= {"fedavg-linear", "fedavg-lora", "fedper-linear", "fedper-lora"}
    assert {path.stem for path in STUDIES} == {"codecs", "study", "starts", "tune", "one-shot", "unseen"}
