"""Stage 1, sites. In: a folder or zip laid out as site/class/image. Out: records and image bytes by id (the path).

Each image is its own group: where a patient has several images, use the source `manifest` with a group column.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from pydantic import Field

from consilium import registry
from consilium.data import UInt8Array
from consilium.errors import DataError
from consilium.registry import Options
from consilium.sites import images


class FolderOptions(Options):
    """Options of the source `folder`."""

    path: Path
    bits: int = Field(default=16, ge=8, le=16)  # significant bits of 16-bit grey images


@registry.register("sources", "folder", options=FolderOptions, summary="images in folders: site/class/image")
class Folder:
    """Images whose site and class are the names of their folders."""

    def __init__(self, options: FolderOptions) -> None:
        self._bits = options.bits
        self._archive = images.Archive(options.path)
        stray = [path for path in self._archive.paths if path.count("/") != 2]
        if stray or not self._archive.paths:
            what = "images do not lie in site/class/" if stray else "there are no PNG, JPEG or TIFF images here"
            raise DataError(what, where=str(options.path), allowed="site/class/image", received=images.first_few(stray))

    def records(self) -> pd.DataFrame:
        """One row per image: text columns id, label, site, group."""
        rows = [path.split("/") for path in self._archive.paths]
        ids = list(self._archive.paths)
        return pd.DataFrame({"id": ids, "label": [r[1] for r in rows], "site": [r[0] for r in rows], "group": ids})

    def content(self, id: str) -> bytes:
        """The stored bytes of one image."""
        return self._archive.read(id)

    def decode(self, content: bytes) -> UInt8Array:
        """RGB pixels uint8 [H, W, 3]."""
        return images.decode(content, self._bits)
