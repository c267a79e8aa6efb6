"""Stage 1, sites. In: a CSV or Parquet table and a folder or zip of images. Out: records and image bytes by id.

All values are read as text, so that `007` and `NA` stay what they are. Without a `site` column the table must be
partitioned; without a `group` column (patient or lesion) each image is its own group.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from pyarrow import ArrowException

from consilium import registry
from consilium.errors import DataError
from consilium.protocols import UInt8Array
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


@registry.register(
    "sources", "manifest", options=ManifestOptions, summary="a CSV or Parquet table and a folder or zip of images"
)
class Manifest:
    """A table and its images. Raises DataError for whatever would stop a training half-way."""

    def __init__(self, options: ManifestOptions) -> None:
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
        return images.decode(content)


def _read_records(options: ManifestOptions) -> pd.DataFrame:
    table = read_table(options.table)
    names = {"image": "id", "label": "label", "site": "site", "group": "group", "split": "split"}
    wanted = {names[key]: column for key, column in options.columns.model_dump().items() if column is not None}
    missing = sorted(set(wanted.values()) - set(table.columns))
    if missing:
        columns = images.first_few(table.columns, 30)
        raise DataError(
            "the table lacks columns", where=str(options.table), allowed=columns, received=", ".join(missing)
        )
    records = pd.DataFrame({key: table[column].str.strip() for key, column in wanted.items()})
    check_records(records, str(options.table))
    return records.assign(
        site=records["site"] if "site" in records else "",
        group=records["group"] if "group" in records else records["id"],
    )


def check_records(records: pd.DataFrame, where: str) -> None:
    """DataError for an empty table, an empty value, or an id that occurs twice."""
    if records.empty:
        raise DataError("the table has no rows", where=where)
    for column in records:
        rows = records.index[records[column] == ""]
        if len(rows):
            numbers = images.first_few(rows + 1)
            raise DataError(f"{len(rows)} rows have no {column}", where=where, received=f"data rows {numbers}")
    twice = records["id"][records["id"].duplicated()].unique()
    if len(twice):
        raise DataError(f"{len(twice)} image ids occur more than once", where=where, received=images.first_few(twice))


def read_table(path: Path) -> pd.DataFrame:
    """A CSV or Parquet file with every value as text, missing ones as empty text."""
    if not path.is_file():
        raise DataError("the table does not exist", received=str(path), remedy="give the path of a CSV or Parquet file")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pd.read_parquet(path)
            return table.astype("string").fillna("").astype(object)
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig").fillna("")
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError, ArrowException) as error:
        raise DataError("the table cannot be read as CSV or Parquet", where=str(path), received=str(error)) from error
