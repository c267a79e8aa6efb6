"""Predicting new images with the model of a finished run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from consilium import checkpoint, config, experiment
from consilium.errors import DataError, StateError
from consilium.predict import load_trained, predict
from consilium.sites.store import transform_pixels
from tests import small, variants

CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = config.from_dict({"backbone": {"name": "embedded", "image_size": 32}})
    pieces = experiment.assemble(settings, CLASSES)
    checkpoint.write_json(folder / "config.json", {"classes": CLASSES, "config": settings.to_dict()})
    for name, by in (("global", 0.1), ("north", 0.2)):
        variables = small.moved(dict(pieces.model.initial(0)), by)
        checkpoint.save(folder / "adapters" / f"{name}.safetensors", variables, {})
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    draw = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("one.png", "two.jpg", "three.tiff")]
    for path in paths:
        Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return paths


def test_probabilities_are_those_of_the_model_by_hand(run: Path, images: list[Path]) -> None:
    table = predict(run, images)
    assert list(table.columns) == ["id", "p.a", "p.b", "p.c", "predicted", "error"]
    assert list(table["id"]) == [str(path) for path in images]
    trained = load_trained(run)
    own = trained.experiment.backbone.preprocessing
    pixels = torch.from_numpy(transform_pixels(np.asarray(Image.open(images[0])), own).copy())
    inputs = (pixels.permute(2, 0, 1)[None] / 255 - torch.tensor(own.mean).view(3, 1, 1)) / torch.tensor(own.std).view(
        3, 1, 1
    )
    with torch.no_grad():
        expected = trained.model.forward(trained.variables, inputs).softmax(1)[0]
    np.testing.assert_allclose(table.loc[0, ["p.a", "p.b", "p.c"]].to_numpy(float), expected.numpy(), rtol=1e-4)
    assert table.loc[0, "predicted"] == CLASSES[int(expected.argmax())]


def test_images_prepared_otherwise_than_in_training_are_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "adapters" / "global.safetensors"
    own = vars(load_trained(run).experiment.backbone.preprocessing)
    for meant, fits in ((own, True), ({**own, "mean": [0.1, 0.1, 0.1]}, False)):
        checkpoint.save(path, checkpoint.load(path)[0], {"preprocessing": meant})
        if fits:
            load_trained(copy)
        else:
            with pytest.raises(StateError, match="preprocessing"):
                load_trained(copy)


def test_a_site_has_its_own_model(run: Path, images: list[Path]) -> None:
    assert not np.allclose(predict(run, images)["p.a"], predict(run, images, "north")["p.a"])


def test_unreadable_images_are_listed_and_the_others_predicted(run: Path, images: list[Path], tmp_path: Path) -> None:
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(images[0].read_bytes()[:60])
    table = predict(run, [images[0], broken, missing, images[1]])
    whole = predict(run, images[:2])
    assert list(table["error"].isna()) == [True, False, False, True]
    assert table.loc[[0, 3], "p.b"].tolist() == whole["p.b"].tolist()
    assert table.loc[[1, 2], ["p.a", "p.b", "p.c"]].isna().all(axis=None)
    assert table["predicted"].isna().tolist() == [False, True, True, False]
    assert "not a readable" in table.loc[1, "error"]
    assert table.loc[2, "error"] == "there is no such file"


def test_a_folder_stands_for_its_images(run: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert sorted(predict(run, [tmp_path])["id"]) == sorted(str(path) for path in images)


def test_chunks_change_nothing(run: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predict(run, images)
    monkeypatch.setattr("consilium.predict.CHUNK", 2)
    np.testing.assert_allclose(predict(run, images)["p.a"], whole["p.a"], rtol=1e-5)


def test_only_broken_images_are_an_error_in_plain_words(run: Path, tmp_path: Path) -> None:
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"not one of 2 images[\s\S]*broken\.png: this is not a readable") as caught:
        predict(run, [broken, missing])
    assert "object at" not in str(caught.value)
    with pytest.raises(DataError, match=r"not one of 1 images[\s\S]*missing\.png: there is no such file"):
        predict(run, [missing])


def test_nothing_to_predict_is_an_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        predict(run, [])
    with pytest.raises(DataError, match="no images"):
        predict(run, [tmp_path])


def test_a_folder_without_a_finished_run_says_what_it_is(run: Path, images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"no run folder[\s\S]*`consilium run`"):
        predict(tmp_path / "empty", images)
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    (begun / "adapters" / "global.safetensors").unlink()
    with pytest.raises(StateError, match=r"leaves no global model[\s\S]*north[\s\S]*name a site"):
        predict(begun, images)
    (begun / "adapters" / "north.safetensors").unlink()
    for site in (None, "north"):
        with pytest.raises(StateError, match=r"not finished[\s\S]*--resume"):
            predict(begun, images, site)


@pytest.mark.parametrize("strategy", variants.FEDERATED)
def test_a_run_of_any_strategy_opens_again(strategy: str, tmp_path: Path) -> None:
    plain = {
        "backbone": {"name": "embedded", "image_size": 32},
        **variants.NEEDS.get(strategy, {}),
        "strategy": {"name": strategy},
        "sites": {"source": "folder", "path": str(tmp_path), "split": {"column": "fold"}},
    }
    settings = config.from_dict(plain)
    pieces = experiment.assemble(settings, CLASSES)
    checkpoint.write_json(tmp_path / "config.json", {"classes": CLASSES, "config": settings.to_dict()})
    checkpoint.save(tmp_path / "adapters" / "north.safetensors", pieces.model.initial(0), {})
    assert load_trained(tmp_path, "north").experiment.config.to_dict() == {
        **settings.to_dict(),
        "engine": {**settings.to_dict()["engine"], "device": "auto"},
    }
