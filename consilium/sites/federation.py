"""Stage 1, sites. In: configuration of the sites, and the backbone's preprocessing. Out: a `Federation` to train on.

Everything that can be wrong with the data is found here, before training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import pandas as pd

from consilium import registry
from consilium.config import SitesConfig
from consilium.config_sites import changed
from consilium.data import Examples, Preprocessing, SiteData, Source
from consilium.errors import ConfigError, DataError
from consilium.sites import partition, splits
from consilium.sites.images import first_few
from consilium.sites.store import Progress, Store, open_store, transform_pixels

__all__ = ["Federation", "open_source", "pool", "prepare", "table", "transform_pixels"]


@dataclass(frozen=True)
class Federation:
    """All sites' data. `split` lists every image of the table, also dropped ones: id, site, group, label, split."""

    sites: Mapping[str, SiteData]  # sorted by name, without the held-out ones
    held_out: Mapping[str, SiteData]  # unseen hospitals: split like the others, never trained on
    classes: tuple[str, ...]
    split: pd.DataFrame
    split_hash: str
    data_digest: str  # over ids, labels, groups, sites and the images' bytes
    warnings: tuple[str, ...]
    hashes: Mapping[str, str]  # id -> SHA-256 of the image's bytes
    corrupt: tuple[str, ...]  # ids without readable pixels


def prepare(
    sites: SitesConfig,
    classes: tuple[str, ...] | None,
    preprocessing: Preprocessing,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Federation:
    """Read, partition, check, split, decode. ConfigError or DataError for whatever would stop a training later."""
    source, records = table(sites)
    _check_sites(records, sites.held_out)
    known = _classes(records, classes, sites.held_out)
    rows = splits.assign(records, sites.split, held_out=sites.held_out)
    store = open_store(
        source, list(rows["id"]), preprocessing, decoding=_decoding(sites), folder=cache, progress=progress
    )
    readable = _readable(rows, store, sites.tolerate_corrupt)
    every = {str(name): _site(str(name), part, store, known) for name, part in readable.groupby("site")}
    trained = {name: data for name, data in every.items() if name not in sites.held_out}
    _check_train(set(rows["site"]) - set(sites.held_out), trained)
    return Federation(
        sites=trained,
        held_out={name: data for name, data in every.items() if name in sites.held_out},
        classes=known,
        split=rows[["id", "site", "group", "label", "split"]],
        split_hash=splits.digest(rows),
        data_digest=_data_digest(rows, store.hashes),
        warnings=tuple(_warnings(rows, trained, known, store, alone=sites.only is not None)),
        hashes=store.hashes,
        corrupt=store.corrupt,
    )


def open_source(sites: SitesConfig) -> Source:
    """The configured source; a split column named in `sites.split` is handed to the source that reads it."""
    options = sites.options()
    if sites.split.column is not None:
        options["columns"] = _with_split_column(sites, sites.split.column)
    source: Source = registry.build("sources", sites.source, options)
    return source


def _with_split_column(sites: SitesConfig, column: str) -> dict[str, object]:
    if "columns" not in registry.get("sources", sites.source).options.model_fields:
        raise ConfigError(f"the source {sites.source!r} has no columns", where="sites.split.column", received=column)
    columns = sites.options().get("columns", {})
    columns = dict(columns) if isinstance(columns, Mapping) else {}
    if columns.get("split", column) != column:
        received = f"{columns['split']!r} and {column!r}"
        raise ConfigError("two columns are named for the split", where="sites", received=received)
    return {**columns, "split": column}


def table(sites: SitesConfig) -> tuple[Source, pd.DataFrame]:
    """The source and its records with their final sites, sorted by id; split as given by the data, if at all."""
    source = open_source(sites)
    records = partition.divide(_named(source.records(), sites), sites.partition)
    if sites.only is not None:
        records = _rows_of(records, sites.only)
    explicit = changed(sites.split) & {"train", "val", "test", "seed", "file"}
    if "split" in records and explicit:
        what = "the table brings its own split, so these keys have no effect"
        raise ConfigError(what, where="sites.split", received=", ".join(sorted(explicit)))
    return source, records


def _named(records: pd.DataFrame, sites: SitesConfig) -> pd.DataFrame:
    nameless = sites.only is not None and bool((records["site"] == "").all())
    return records.assign(site=sites.only) if nameless else records


def _rows_of(records: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of one site, numbered anew; DataError where it has none."""
    found = records[records["site"] == name].reset_index(drop=True)
    if not len(found):
        allowed = first_few(sorted(set(records["site"])), 20)
        raise DataError("the data have no images of this site", where="sites.only", allowed=allowed, received=name)
    return found


def pool(federation: Federation, name: str = "pooled") -> SiteData:
    """All sites as one; `origins` still says where each row came from. Held-out sites stay out."""
    parts = list(federation.sites.values())
    return SiteData(
        name=name,
        train=_concatenate([site.train for site in parts]),
        val=_concatenate([site.val for site in parts]),
        test=_concatenate([site.test for site in parts]),
    )


def _concatenate(parts: Sequence[Examples]) -> Examples:
    return Examples(
        images=parts[0].images,
        rows=np.concatenate([part.rows for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        groups=np.concatenate([part.groups for part in parts]),
        origins=np.concatenate([part.origins for part in parts]),
    )


def _decoding(sites: SitesConfig) -> str:
    """All options of the source but paths and column names: any of them may change what `decode` makes of the bytes."""
    options = registry.parse_options(registry.get("sources", sites.source), sites.options())
    plain = options.model_dump(mode="json")
    kept = {k: plain[k] for k, v in options if k != "columns" and not isinstance(v, PurePath)}
    return json.dumps([sites.source, kept], sort_keys=True)


def _check_sites(records: pd.DataFrame, held_out: Sequence[str]) -> None:
    names = sorted(set(records["site"]))
    unknown = sorted(set(held_out) - set(names))
    if unknown:
        raise ConfigError(
            "held-out sites that do not exist",
            where="sites.held_out",
            allowed=first_few(names, 20),
            received=first_few(unknown),
        )
    unfit = [name for name in names if name in (".", "..") or any(sign in name for sign in "/\\\0")]
    if unfit:
        raise DataError("a site's name must do as the name of a folder", where="site column", received=first_few(unfit))
    if "global" in names:
        what = "'global' is the name of the model that all sites share, not of a site"
        raise DataError(what, where="site column", received="global", remedy="rename this site")
    if set(names) <= set(held_out):
        raise ConfigError("every site is held out", where="sites.held_out", received=first_few(names))
    left = sorted(set(names) - set(held_out))
    if held_out and len(left) == 1:
        what, remedy = "one site is left, which is no federation", "hold out fewer sites"
        raise ConfigError(what, where="sites.held_out", received=f"left: {left[0]}", remedy=remedy)


def _classes(
    records: pd.DataFrame, declared: tuple[str, ...] | None, held_out: Collection[str] = ()
) -> tuple[str, ...]:
    """Undeclared, the classes are those of the sites that take part: what others have is not known to them."""
    found = sorted(set(records["label"]))
    if declared is not None and len(set(declared)) < len(declared):
        raise ConfigError("a class is declared twice", where="task.classes", received=", ".join(declared))
    if declared is None:
        own = set(records["label"][~records["site"].isin(list(held_out))])
        if foreign := sorted(set(found) - own):
            what, remedy = "held-out sites have classes that no site which takes part has", "declare task.classes"
            allowed, received = first_few(sorted(own), 20), first_few(foreign)
            raise DataError(what, where="sites.held_out", allowed=allowed, received=received, remedy=remedy)
        return tuple(found)
    unknown = [label for label in found if label not in declared]
    if unknown:
        num_rows = int(records["label"].isin(unknown).sum())
        raise DataError(
            f"{num_rows} images have labels that are no declared class",
            where="task.classes",
            allowed=", ".join(declared),
            received=first_few(unknown),
        )
    return declared


def _readable(rows: pd.DataFrame, store: Store, tolerated: float) -> pd.DataFrame:
    share = len(store.corrupt) / len(rows)
    if share > tolerated:
        raise DataError(
            f"{len(store.corrupt)} of {len(rows)} images are unreadable",
            where="sites.tolerate_corrupt",
            allowed=f"a share of {tolerated:g}",
            received=first_few(store.corrupt, 10),
            remedy="mend or remove them (`consilium data audit` lists all), or raise the tolerated share to drop them",
        )
    return rows[~rows["id"].isin(store.corrupt)]


def _site(name: str, rows: pd.DataFrame, store: Store, classes: tuple[str, ...]) -> SiteData:
    train, val, test = (_examples(rows[rows["split"] == split], store, classes) for split in splits.NAMES)
    return SiteData(name, train, val, test)


def _examples(rows: pd.DataFrame, store: Store, classes: tuple[str, ...]) -> Examples:
    index = {label: number for number, label in enumerate(classes)}
    return Examples(
        images=store.images,
        rows=np.array([store.rows[id] for id in rows["id"]], dtype=np.int64),
        labels=np.array([index[label] for label in rows["label"]], dtype=np.int64),
        ids=rows["id"].to_numpy(dtype=np.str_),
        groups=rows["group"].to_numpy(dtype=np.str_),
        origins=rows["site"].to_numpy(dtype=np.str_),
    )


def _check_train(names: set[str], trained: Mapping[str, SiteData]) -> None:
    empty = sorted(name for name in names if name not in trained or not len(trained[name].train))
    if empty:
        remedy = "give them training rows, or keep them out with sites.held_out"
        raise DataError("sites without training rows", received=first_few(empty), remedy=remedy)


def _data_digest(rows: pd.DataFrame, hashes: Mapping[str, str]) -> str:
    plain = sorted(rows[["id", "site", "group", "label"]].itertuples(index=False, name=None))
    text = json.dumps([[*row, hashes.get(row[0], "")] for row in plain])
    return hashlib.sha256(text.encode()).hexdigest()


_AUDIT = " (`consilium data audit` names them)"  # the result may be published, so no id of a patient or image enters it


def _warnings(
    rows: pd.DataFrame, sites: Mapping[str, SiteData], classes: tuple[str, ...], store: Store, alone: bool
) -> list[str]:
    """`alone`: others take part whose images are not here."""
    found = []
    if rows["group"].is_unique:
        found.append("no group holds two images: if a patient or lesion may have several, name the group column")
    shared = splits.groups_at_several_sites(rows)
    if shared:
        found.append(f"{len(shared)} groups occur at several sites{_AUDIT}")
    if store.corrupt:
        found.append(f"{len(store.corrupt)} unreadable images were dropped{_AUDIT}")
    doubled = _in_two_splits(rows, store.hashes)
    if doubled:
        found.append(f"{len(doubled)} images lie byte for byte in two splits{_AUDIT}")
    seen = set().union(*(set(data.train.labels.tolist()) for data in sites.values()))
    absent = [label for number, label in enumerate(classes) if number not in seen]
    if absent:
        whose = "this site has no" if alone else "no site has"
        found.append(f"{whose} training images of the classes {first_few(absent, 20)}")
    return found + _by_sentence(sites, classes)


def _in_two_splits(rows: pd.DataFrame, hashes: Mapping[str, str]) -> list[str]:
    hashed = rows.assign(hash=rows["id"].map(dict(hashes))).dropna(subset="hash")
    num_splits = hashed.groupby("hash")["split"].transform("nunique")
    return list(hashed["id"][num_splits > 1])


def _by_sentence(sites: Mapping[str, SiteData], classes: tuple[str, ...]) -> list[str]:
    """What is odd about sites; the same sentence about many of them is said once."""
    about: dict[str, list[str]] = {}
    for name, data in sites.items():
        for text in _odd(data, classes):
            about.setdefault(text, []).append(name)
    return [
        f"site {names[0]}: {text}" if len(names) == 1 else f"{len(names)} sites: {text}: {first_few(names)}"
        for text, names in about.items()
    ]


def _odd(data: SiteData, classes: tuple[str, ...]) -> list[str]:
    found = []
    if len(set(data.train.labels.tolist())) == 1:
        found.append(f"training on one class only ({classes[int(data.train.labels[0])]})")
    if len(np.unique(np.concatenate([data.train.groups, data.val.groups, data.test.groups]))) == 1:
        found.append("one patient only, so everything is in one split")
    lacking = [split for split, part in (("val", data.val), ("test", data.test)) if not len(part)]
    if lacking:
        found.append(f"no images for {' and '.join(lacking)}, so metrics there have n = 0")
    return found
