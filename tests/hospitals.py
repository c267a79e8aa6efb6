"""Small hospitals for tests: records, image files and configurations, built in milliseconds."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from consilium.config import SitesConfig
from consilium.data import Preprocessing, UInt8Array

PREPROCESSING = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
COLUMNS = {"image": "image", "label": "label", "site": "site", "group": "patient"}


def pixels(seed: int, height: int = 12, width: int = 10) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def records(*rows: tuple[str, str, str]) -> pd.DataFrame:
    """One row per (site, group, label); ids count upwards."""
    ids = [f"i{number:04d}" for number in range(len(rows))]
    sites, groups, labels = zip(*rows, strict=True)
    return pd.DataFrame({"id": ids, "label": labels, "site": sites, "group": groups})


def two_sites(num_groups: int = 10) -> pd.DataFrame:
    """Two sites, two classes, two images per patient."""
    rows = [
        (site, f"{site}{group}", "ab"[group % 2])
        for site in ("east", "west")
        for group in range(num_groups)
        for _ in "12"
    ]
    return records(*rows)


def write(folder: Path, table: pd.DataFrame, files: Mapping[str, bytes] | None = None) -> SitesConfig:
    """A CSV file and a folder of PNG files named by id (or `files`), and the configuration that reads them."""
    contents = files if files is not None else {f"{id}.png": png(pixels(n)) for n, id in enumerate(table["id"])}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(content)
    table.rename(columns={"id": "image", "group": "patient"}).to_csv(folder / "table.csv", index=False)
    return configured(folder)


def configured(folder: Path, columns: Mapping[str, str] = COLUMNS, **keys: object) -> SitesConfig:
    table = {"source": "manifest", "table": folder / "table.csv", "images": folder / "images", "columns": dict(columns)}
    return SitesConfig.model_validate({**table, **keys})


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
