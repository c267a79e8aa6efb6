"""What every registered source must keep to; a source with required options needs a row in `EXAMPLES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from consilium import registry
from consilium.config import SitesConfig
from consilium.data import Source
from consilium.errors import DataError
from consilium.sites.federation import prepare
from tests import hospitals

SOURCES = sorted(registry.members("sources"))


def _manifest(folder: Path) -> dict[str, object]:
    hospitals.write(folder, hospitals.two_sites())
    return {"table": folder / "table.csv", "images": folder / "images", "columns": hospitals.COLUMNS}


def _folder(folder: Path) -> dict[str, object]:
    names = [f"{site}/{label}/{number}.png" for site in ("east", "west") for label in "ab" for number in range(10)]
    files = {name: hospitals.png(hospitals.pixels(number)) for number, name in enumerate(names)}
    return {"path": hospitals.zipped(folder / "set.zip", files)}


EXAMPLES: Mapping[str, Callable[[Path], dict[str, object]]] = {
    "manifest": _manifest,
    "folder": _folder,
    "phantom": lambda _: {"num_images": 60, "image_size": 16},
}


@pytest.fixture(params=SOURCES)
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    return {"source": request.param, **EXAMPLES.get(request.param, lambda _: {})(tmp_path)}


def built(options: Mapping[str, object]) -> Source:
    source: Source = registry.build(
        "sources", str(options["source"]), {k: v for k, v in options.items() if k != "source"}
    )
    return source


def test_records_are_whole_text_with_one_row_per_image(options: dict[str, object]) -> None:
    records = built(options).records()
    assert {"id", "label", "site", "group"} <= set(records) <= {"id", "label", "site", "group", "split"}
    assert records["id"].is_unique
    assert len(records) > 0
    assert all(isinstance(value, str) and value for column in records for value in records[column])


def test_two_of_the_same_options_are_the_same_data(options: dict[str, object]) -> None:
    first, second = built(options), built(options)
    records = first.records()
    assert records.equals(second.records())
    for id in records["id"].head(3):
        assert first.content(id) == second.content(id) == first.content(id)


def test_what_a_caller_does_to_the_records_stays_with_the_caller(options: dict[str, object]) -> None:
    source = built(options)
    records = source.records()
    records["label"] = "changed"
    assert "changed" not in set(source.records()["label"])


def test_pixels_are_colours_and_depend_on_the_bytes_alone(options: dict[str, object]) -> None:
    source = built(options)
    for id in source.records()["id"].head(3):
        pixels = source.decode(source.content(id))
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        np.testing.assert_array_equal(pixels, built(options).decode(source.content(id)))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_a_data_error(options: dict[str, object], content: bytes) -> None:
    with pytest.raises(DataError):
        built(options).decode(content)


def test_a_source_becomes_a_federation(options: dict[str, object], tmp_path: Path) -> None:
    found = prepare(SitesConfig.model_validate(options), None, hospitals.PREPROCESSING, tmp_path / "cache")
    assert sum(len(part) for site in found.sites.values() for part in (site.train, site.val, site.test)) == len(
        found.split
    )
