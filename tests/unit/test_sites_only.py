"""One site's rows of a table, as a hospital reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium.config import SitesConfig
from consilium.errors import DataError
from consilium.sites.federation import table


def _manifest(folder: Path, with_sites: bool) -> dict[str, object]:
    from PIL import Image

    (folder / "images").mkdir()
    lines = ["image,label,place"]
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / "images" / f"i{number}.png")
        lines.append(f"i{number},{'ab'[number % 2]},{'north' if number < 4 else 'south'}")
    (folder / "table.csv").write_text("\n".join(lines))
    columns = {"site": "place"} if with_sites else {}
    return {"source": "manifest", "table": folder / "table.csv", "images": folder / "images", "columns": columns}


def test_a_table_with_sites_gives_the_rows_of_one(tmp_path: Path) -> None:
    settings = SitesConfig(**_manifest(tmp_path, True), only="north")  # type: ignore[arg-type]
    records = table(settings)[1]
    assert list(records["id"]) == ["i0", "i1", "i2", "i3"]
    assert list(records.index) == [0, 1, 2, 3]


def test_a_table_without_sites_is_all_this_sites(tmp_path: Path) -> None:
    records = table(SitesConfig(**_manifest(tmp_path, False), only="north"))[1]  # type: ignore[arg-type]
    assert set(records["site"]) == {"north"}
    assert len(records) == 6


def test_a_site_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images of this site"):
        table(SitesConfig(**_manifest(tmp_path, True), only="west"))  # type: ignore[arg-type]
