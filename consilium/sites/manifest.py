"""Stage 1, sites. In: a CSV or Parquet table and a folder or zip of images. Out: records and image bytes by id.

All values are read as text, so that `007` and `NA` stay what they are. Without a `site` column the table must be
partitioned; without a `group` column (patient or lesion) each image is its own group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from pyarrow import ArrowException
from pydantic import Field

from consilium import registry
from consilium.data import UInt8Array
from consilium.errors import DataError
from consilium.registry import Options
from consilium.sites import images


class Columns(Options):
    """Which column of the table holds what."""

    image: str = "image"
    label: str = "label"
    site: str | None = None
    group: str | None = None
    split: str | None = None


class ManifestOptions(Options):
    """Options of the source `manifest`."""

    table: Path
    images: Path
    columns: Columns = Columns()
    bits: int = Field(default=16, ge=8, le=16)  # significant bits of 16-bit grey images


@registry.register(
    "sources", "manifest", options=ManifestOptions, summary="a CSV or Parquet table and a folder or zip of images"
)
class Manifest:
    """A table and its images. Raises DataError for whatever would stop a training half-way."""

    def __init__(self, options: ManifestOptions) -> None:
        self._bits = options.bits
        self._records = _read_records(options)
        self._archive = images.Archive(options.images)
        self._paths = self._archive.resolve(list(self._records["id"]))

    def records(self) -> pd.DataFrame:
        """One row per image: text columns id, label, site ("" without a column), group, and split where it is given."""
        return self._records.copy()

    def content(self, id: str) -> bytes:
        """The stored bytes of one image."""
        return self._archive.read(self._paths[id])

    def decode(self, content: bytes) -> UInt8Array:
        """RGB pixels uint8 [H, W, 3]."""
        return images.decode(content, self._bits)


def _read_records(options: ManifestOptions) -> pd.DataFrame:
    table, where = read_table(options.table), str(options.table)
    columns = {key: column for key, column in options.columns.model_dump().items() if column is not None}
    missing = sorted(set(columns.values()) - set(table.columns))
    if missing:
        allowed = images.first_few(table.columns, 30)
        received, remedy = ", ".join(missing), _other_separator(table)
        raise DataError("the table lacks columns", where=where, allowed=allowed, received=received, remedy=remedy)
    _check_values(table, columns, where)
    given = {("id" if key == "image" else key): table[column] for key, column in columns.items()}
    return pd.DataFrame({"site": "", "group": given["id"], **given})


def _other_separator(table: pd.DataFrame) -> str | None:
    """What to do about a table whose columns are all glued into one."""
    glued = [name for sign, name in {";": "semicolons", "\t": "tabs"}.items() if sign in "".join(table.columns)]
    wrong = glued and len(table.columns) == 1
    return f"the columns seem to be separated by {glued[0]}: save the table with commas" if wrong else None


def _check_values(table: pd.DataFrame, columns: Mapping[str, str], where: str) -> None:
    """DataError for an empty table, an empty value, or an id that occurs twice."""
    if table.empty:
        raise DataError("the table has no rows", where=where)
    for column in columns.values():
        (rows,) = (table[column] == "").to_numpy().nonzero()
        if len(rows):
            received = f"data rows {images.first_few(rows + 1)}"
            raise DataError(f"{len(rows)} rows have no value in column {column!r}", where=where, received=received)
    ids = table[columns["image"]]
    twice = ids[ids.duplicated()].unique()
    if len(twice):
        raise DataError(f"{len(twice)} image ids occur more than once", where=where, received=images.first_few(twice))


def read_table(path: Path) -> pd.DataFrame:
    """A CSV or Parquet file with every value as text without outer blanks, missing ones as empty text."""
    if not path.is_file():
        raise DataError("the table does not exist", received=str(path), remedy="give the path of a CSV or Parquet file")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pd.read_parquet(path).astype("string")
        else:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (ValueError, ArrowException) as error:
        raise DataError("the table cannot be read as CSV or Parquet", where=str(path), received=str(error)) from error
    return pd.DataFrame({name: table[name].fillna("").str.strip() for name in table.columns})
