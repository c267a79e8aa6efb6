"""The sources manifest and folder: what they read, and a clear error for every table that would stop a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from consilium.errors import DataError
from consilium.sites.folder import Folder, FolderOptions
from consilium.sites.manifest import Columns, Manifest, ManifestOptions
from tests import hospitals

Table = Callable[[pd.DataFrame], pd.DataFrame]
PLAIN = hospitals.two_sites(2)


def manifest(folder: Path, table: str = "table.csv", **columns: str) -> Manifest:
    named = Columns.model_validate(columns or hospitals.COLUMNS)
    return Manifest(ManifestOptions(table=folder / table, images=folder / "images", columns=named))


def test_a_table_gives_records_and_pixels(tmp_path: Path) -> None:
    hospitals.write(tmp_path, PLAIN)
    source = manifest(tmp_path)
    pd.testing.assert_frame_equal(source.records()[list(PLAIN)], PLAIN, check_dtype=False)
    np.testing.assert_array_equal(source.decode(source.content("i0002")), hospitals.pixels(2))


def test_values_stay_as_they_are_written(tmp_path: Path) -> None:
    hospitals.write(tmp_path, PLAIN.assign(label="NA", group=[f"00{n}" for n in range(len(PLAIN))], site=" east "))
    found = manifest(tmp_path).records()
    assert set(found["label"]) == {"NA"}
    assert found["group"][1] == "001"
    assert set(found["site"]) == {"east"}


def test_parquet_with_numbers_gives_the_same_text(tmp_path: Path) -> None:
    hospitals.write(tmp_path, PLAIN)
    table = pd.read_csv(tmp_path / "table.csv").assign(label=range(len(PLAIN)))
    table.to_parquet(tmp_path / "table.parquet")
    assert list(manifest(tmp_path, "table.parquet").records()["label"]) == [str(n) for n in range(len(PLAIN))]


def test_without_columns_there_is_no_site_and_every_image_is_its_group(tmp_path: Path) -> None:
    hospitals.write(tmp_path, PLAIN)
    found = manifest(tmp_path, image="image", label="label").records()
    assert set(found["site"]) == {""}
    assert list(found["group"]) == list(found["id"])


BROKEN: dict[str, tuple[Table, str]] = {
    "no rows": (lambda t: t[:0], "no rows"),
    "no column": (lambda t: t.drop(columns="group"), r"lacks columns[\s\S]*patient"),
    "no label": (
        lambda t: t.assign(label=["", *t["label"][1:]]),
        r"1 rows have no value in column 'label'[\s\S]*rows 1",
    ),
    "blank site": (lambda t: t.assign(site=["  ", *t["site"][1:]]), "no value in column 'site'"),
    "missing id": (lambda t: t.assign(id=[None, *t["id"][1:]]), "no value in column 'image'"),
    "one id twice": (lambda t: pd.concat([t, t[:1]]), r"1 image ids occur more than once[\s\S]*i0000"),
    "missing images": (lambda t: t.assign(id=["x", "y", *t["id"][2:]]), r"2 image files are missing[\s\S]*x, y"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_table_that_cannot_be_used_says_why(tmp_path: Path, case: str) -> None:
    hospitals.write(tmp_path, PLAIN)
    change, message = BROKEN[case]
    change(PLAIN).rename(columns={"id": "image", "group": "patient"}).to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(DataError, match=message):
        manifest(tmp_path)


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_table_with_another_separator_says_so(tmp_path: Path, sign: str, name: str) -> None:
    hospitals.write(tmp_path, PLAIN)
    table = tmp_path / "table.csv"
    table.write_text(table.read_text().replace(",", sign))
    with pytest.raises(DataError, match=rf"lacks columns[\s\S]*separated by {name}"):
        manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("table.parquet", b"no parquet"), ("table.csv", b"\xff\xfe\x00"), ("table.csv", b"")]
)
def test_a_file_that_is_no_table(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as CSV or Parquet"):
        manifest(tmp_path, name)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        manifest(tmp_path)


def test_significant_bits_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        ManifestOptions(table=tmp_path, images=tmp_path, bits=7)


def layout(names: list[str]) -> dict[str, bytes]:
    return {name: hospitals.png(hospitals.pixels(number)) for number, name in enumerate(names)}


def test_folders_name_site_and_class(tmp_path: Path) -> None:
    path = hospitals.zipped(tmp_path / "set.zip", layout(["east/a/1.png", "east/b/1.png", "west/a/1.png"]))
    source = Folder(FolderOptions(path=path))
    found = source.records()
    assert list(found["id"]) == list(found["group"]) == ["east/a/1.png", "east/b/1.png", "west/a/1.png"]
    assert list(found["site"]) == ["east", "east", "west"]
    assert list(found["label"]) == ["a", "b", "a"]
    np.testing.assert_array_equal(source.decode(source.content("west/a/1.png")), hospitals.pixels(2))


@pytest.mark.parametrize(
    ("names", "message"), [(["a/1.png", "east/a/2.png"], "do not lie in"), (["notes.txt"], "no PNG")]
)
def test_a_folder_of_another_layout_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Folder(FolderOptions(path=hospitals.zipped(tmp_path / "set.zip", layout(names))))
