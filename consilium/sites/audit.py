"""Stage 1, sites. In: records with their split, and the images' hashes. Out: an `Audit`: what leaks, what is broken.

Also the functions behind `consilium data`: inspect, audit, split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from consilium.config import Config
from consilium.data import Source
from consilium.errors import DataError
from consilium.sites import splits
from consilium.sites.federation import table

_LOOKED_AT = 20  # images per site whose size `inspect` reads
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Group:
    """A patient or lesion, and where its images lie."""

    group: str
    num_images: int
    sites: tuple[str, ...]
    splits: tuple[str, ...]
    within_site: bool  # in two splits of one and the same site


@dataclass(frozen=True)
class Duplicate:
    """Images with the same bytes."""

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    sites: tuple[str, ...]
    splits: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """What `consilium data audit` found; everything sorted."""

    num_images: int
    num_groups: int
    groups_across_splits: tuple[Group, ...]
    groups_at_several_sites: tuple[Group, ...]
    duplicates: tuple[Duplicate, ...]
    unreadable: tuple[str, ...]
    classes: Mapping[str, Mapping[str, Mapping[str, int]]]  # site -> split -> class -> number of images

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the counts first, then the lists."""
        leaking, doubled = self.groups_across_splits, self.duplicates
        counts = {
            "images": self.num_images,
            "groups": self.num_groups,
            "groups_across_splits": len(leaking),
            "groups_across_splits_within_site": sum(group.within_site for group in leaking),
            "images_of_groups_across_splits": sum(group.num_images for group in leaking),
            "groups_at_several_sites": len(self.groups_at_several_sites),
            "duplicates": len(doubled),
            "duplicates_across_splits": sum(len(one.splits) > 1 for one in doubled),
            "duplicates_across_sites": sum(len(one.sites) > 1 for one in doubled),
            "duplicates_with_different_labels": sum(len(one.labels) > 1 for one in doubled),
            "unreadable": len(self.unreadable),
        }
        plain = asdict(self)
        lists = ("groups_across_splits", "groups_at_several_sites", "duplicates", "unreadable")
        return {"counts": counts, "classes": plain["classes"], **{name: list(plain[name]) for name in lists}}


def audit(records: pd.DataFrame, content_hashes: Mapping[str, str], unreadable: Sequence[str] = ()) -> Audit:
    """Audit records (id, label, site, group, split); `content_hashes` maps id to the hash of the image's bytes."""
    several = splits.groups_at_several_sites(records)
    return Audit(
        num_images=len(records),
        num_groups=int(records["group"].nunique()),
        groups_across_splits=_groups(records, splits.divided_groups(records)),
        groups_at_several_sites=_groups(records, several),
        duplicates=_duplicates(records, content_hashes),
        unreadable=tuple(sorted(unreadable)),
        classes=class_table(records),
    )


def class_table(records: pd.DataFrame) -> dict[str, dict[str, dict[str, int]]]:
    """Number of images by site, split and class; every class in every cell."""
    classes = sorted(set(records["label"]))
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (site, split), rows in records.groupby(["site", "split"]):
        counts = Counter(rows["label"])
        found.setdefault(str(site), {})[str(split)] = {label: counts[label] for label in classes}
    return found


def audit_config(config: Config, progress: Progress | None = None) -> Audit:
    """Audit the configured data in the split that training would use, or in the given split where that divides groups.

    Reads and decodes every image.
    """
    source, records = table(config.sites)
    given = splits.as_given(records, config.sites.split)
    divided = given is not None and bool(splits.divided_groups(given))
    rows = (
        given
        if given is not None and divided
        else splits.assign(records, config.sites.split, held_out=config.sites.held_out)
    )
    hashes, unreadable = _read_all(source, list(rows["id"]), progress)
    return audit(rows, hashes, unreadable)


def write_split(config: Config, out: Path) -> str:
    """Write the configured split to a Parquet file that `sites.split.file` reads; returns the split's hash."""
    rows = splits.assign(table(config.sites)[1], config.sites.split, held_out=config.sites.held_out)
    return splits.write(rows, out)


def inspect(config: Config) -> dict[str, Any]:
    """Numbers of images, groups and classes per site, and the sizes of the first images of each site."""
    source, records = table(config.sites)
    per_site = {str(site): _site(source, rows) for site, rows in records.groupby("site")}
    return {
        "source": config.sites.source,
        "images": len(records),
        "groups": int(records["group"].nunique()),
        "classes": dict(sorted(Counter(records["label"]).items())),
        "sites": per_site,
    }


def _site(source: Source, rows: pd.DataFrame) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for id in rows["id"].head(_LOOKED_AT):
        try:
            height, width = source.decode(source.content(id)).shape[:2]
            sizes[f"{width} x {height}"] += 1
        except DataError:
            sizes["unreadable"] += 1
    return {
        "images": len(rows),
        "groups": int(rows["group"].nunique()),
        "classes": dict(sorted(Counter(rows["label"]).items())),
        "sizes_of_first_images": dict(sizes.most_common()),
    }


def _groups(records: pd.DataFrame, names: Sequence[str]) -> tuple[Group, ...]:
    found = []
    for name, rows in records[records["group"].isin(names)].groupby("group"):
        within = bool((rows.groupby("site")["split"].nunique() > 1).any())
        found.append(Group(str(name), len(rows), _distinct(rows["site"]), _distinct(rows["split"]), within))
    return tuple(found)


def _duplicates(records: pd.DataFrame, content_hashes: Mapping[str, str]) -> tuple[Duplicate, ...]:
    hashed = records.assign(hash=records["id"].map(dict(content_hashes))).dropna(subset="hash")
    doubled = hashed[hashed["hash"].duplicated(keep=False)]
    columns = ("id", "group", "site", "split", "label")
    found = [Duplicate(*(_distinct(rows[name]) for name in columns)) for _, rows in doubled.groupby("hash")]
    return tuple(sorted(found, key=lambda one: one.ids))


def _distinct(values: pd.Series[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))


def _read_all(source: Source, ids: Sequence[str], progress: Progress | None) -> tuple[dict[str, str], list[str]]:
    """Hashes of all readable files, and ids without readable pixels."""
    hashes: dict[str, str] = {}
    unreadable = []
    for number, id in enumerate(ids):
        try:
            content = source.content(id)
            hashes[id] = hashlib.sha256(content).hexdigest()
            source.decode(content)
        except DataError:
            unreadable.append(id)
        if progress is not None:
            progress(number + 1, len(ids))
    return hashes, unreadable
