"""Stage 1, sites. In: records with sites, and how to split. Out: the column split: train, val or test, and its hash.

A site's split depends on its own rows, its name and `split.seed` only; neither on the order of rows nor on other sites.
A group is never divided, and a group known to occur at two sites goes to train everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from consilium import seeds
from consilium.config_sites import Split
from consilium.errors import DataError
from consilium.sites.images import first_few

Vectors = npt.NDArray[np.float64]
NAMES = ("train", "val", "test")
_TIES = ("test", "val", "train")  # on a tie the evaluation splits come first: train is seldom the one that lacks rows
_COLUMNS = ["id", "site", "group", "label", "split"]


def assign(
    records: pd.DataFrame, split: Split, shared_groups: Collection[str] | None = None, held_out: Collection[str] = ()
) -> pd.DataFrame:
    """`records` with column split, sorted by id; by share, by the table's own column or by file, as configured.

    `shared_groups`: groups known to occur at several sites; None: those of `records`. A deployed site, which sees its
    own rows only, is given the list. A given split is left as it is, and DataError where it divides a group; but of a
    column's train rows, at a site without val, an eighth becomes val (0.1 of 0.8, as by default). Rows of `held_out`
    sites change nothing for the others: of a group that both have, they go where the others' rows are.
    """
    ordered = records.sort_values("id", ignore_index=True)
    given = as_given(ordered, split)
    if given is not None:
        ordered = _check(given, str(split.file or "the split column"))
        if split.file is not None:
            return ordered
    apart = ordered["site"].isin(list(held_out))
    inside, outside = ordered[~apart], ordered[apart]
    shared = groups_at_several_sites(inside) if shared_groups is None else shared_groups
    found = _assigned(inside, split, dict.fromkeys(shared, "train"))
    known = dict.fromkeys(groups_at_several_sites(outside), "train") | dict(
        zip(found["group"], found["split"], strict=True)
    )
    both = pd.concat([found, _assigned(outside, split, known)]) if len(outside) else found
    return both.sort_values("id", ignore_index=True)


def _assigned(records: pd.DataFrame, split: Split, fixed: Mapping[str, str]) -> pd.DataFrame:
    """By share, or by their own column; `fixed` says where some groups go."""
    if "split" in records:
        return _with_val(records, fixed)
    shares = {"train": split.train, "val": split.val, "test": split.test}
    return _by_site(records, shares, split.seed, fixed)


def as_given(records: pd.DataFrame, split: Split) -> pd.DataFrame | None:
    """`records` with the split of the configured file or their own column, unchecked; None where there is neither."""
    if split.file is not None:
        return read(split.file, records)
    return records if "split" in records else None


def groups_at_several_sites(records: pd.DataFrame) -> tuple[str, ...]:
    """Groups with rows at two sites or more, sorted."""
    num_sites = records.groupby("group")["site"].nunique()
    return tuple(sorted(num_sites.index[num_sites > 1]))


def digest(records: pd.DataFrame) -> str:
    """SHA-256 over the sorted (id, site, split): two runs with the same digest saw the same data in the same split."""
    rows = sorted(records[["id", "site", "split"]].itertuples(index=False, name=None))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write(records: pd.DataFrame, path: Path) -> str:
    """Store the split as Parquet with its digest inside; returns the digest."""
    found = digest(records)
    table = pa.Table.from_pandas(records[_COLUMNS].sort_values("id"), preserve_index=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"consilium.split": found}), path)
    return found


def read(path: Path, records: pd.DataFrame) -> pd.DataFrame:
    """`records` with the split stored by `write`; DataError where file and rows do not fit each other exactly."""
    stored = _read_file(path)
    differing = _differing_rows(stored, records)
    if differing:
        what = "the split file does not fit the table"
        raise DataError(what, where=str(path), received=first_few(differing), remedy="write the split again")
    split = records["id"].map(dict(zip(stored["id"], stored["split"], strict=True)))
    return records.assign(split=split)


def _check(records: pd.DataFrame, where: str) -> pd.DataFrame:
    """`records` themselves; DataError for a name that is no split, or a group in two splits."""
    unknown = sorted(set(records["split"]) - set(NAMES))
    if unknown:
        raise DataError("unknown split names", where=where, allowed=", ".join(NAMES), received=first_few(unknown))
    divided = divided_groups(records)
    if divided:
        remedy = "see `consilium data audit`; leave the column out to have the set split by group"
        num_images = int(records["group"].isin(divided).sum())
        what = f"{len(divided)} groups, with {num_images} of {len(records)} images, lie in more than one split"
        raise DataError(what, where=where, received=first_few(divided), remedy=remedy)
    return records


def divided_groups(records: pd.DataFrame) -> tuple[str, ...]:
    """Groups with rows in two splits or more, at whatever site, sorted."""
    num_splits = records.groupby("group")["split"].nunique()
    return tuple(sorted(num_splits.index[num_splits > 1]))


def _read_file(path: Path) -> pd.DataFrame:
    remedy = "write it with `consilium data split`"
    if not path.is_file():
        raise DataError("the split file does not exist", where="sites.split.file", received=str(path), remedy=remedy)
    try:
        table = pq.read_table(path)
        stored: pd.DataFrame = table.to_pandas()[_COLUMNS].astype(str)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError("this is no split file", where=str(path), received=str(error), remedy=remedy) from error
    if (table.schema.metadata or {}).get(b"consilium.split", b"").decode() != digest(stored):
        raise DataError("the split file was changed after it was written", where=str(path), remedy="write it again")
    return stored


def _differing_rows(stored: pd.DataFrame, records: pd.DataFrame) -> list[str]:
    columns = ["id", "site", "group", "label"]
    there = set(stored[columns].itertuples(index=False, name=None))
    here = set(records[columns].itertuples(index=False, name=None))
    return sorted({row[0] for row in there ^ here})


def _with_val(records: pd.DataFrame, fixed: Mapping[str, str]) -> pd.DataFrame:
    default = Split()
    share = default.val / (default.train + default.val)
    complete = set(records["site"][records["split"] == "val"])
    pool = records[~records["site"].isin(complete) & (records["split"] == "train")]
    carved = _by_site(pool, {"train": 1 - share, "val": share}, default.seed, fixed)
    new = dict(zip(carved["id"], carved["split"], strict=True))
    return records.assign(split=[new.get(id, old) for id, old in zip(records["id"], records["split"], strict=True)])


def _by_site(records: pd.DataFrame, shares: Mapping[str, float], seed: int, fixed: Mapping[str, str]) -> pd.DataFrame:
    chosen: dict[str, str] = {}
    for site, rows in records.groupby("site"):
        split_of = divide_site(rows, str(site), shares, seed, fixed)
        chosen.update(zip(rows["id"], rows["group"].map(split_of), strict=True))
    return records.assign(split=records["id"].map(chosen))


def divide_site(
    rows: pd.DataFrame, site: str, shares: Mapping[str, float], seed: int, fixed: Mapping[str, str]
) -> dict[str, str]:
    """Split of each group of one site, stratified by class as well as whole groups allow.

    Groups are taken in random order, those with the rarest class first. Each goes where it lowers the chi-square
    distance, the sum of (given - wanted)^2 / wanted over splits and features, the most. The first goes to train.
    Groups of `fixed` go where it says, before all others.
    """
    counts = rows.groupby(["group", "label"]).size().unstack(fill_value=0).sort_index(axis="columns")
    vectors = _features(counts.to_numpy(dtype=np.float64))
    wanted = {name: share * vectors.sum(axis=0) for name, share in shares.items() if share > 0}
    given = {name: np.zeros(vectors.shape[1]) for name in wanted}
    vector_of, forced = dict(zip(counts.index, vectors, strict=True)), set(fixed) & set(counts.index)
    chosen: dict[str, str] = {}
    trains = "train" not in wanted
    for group in sorted(forced) + [g for g in _order(counts, site, seed) if g not in forced]:
        free = _best(vector_of[group], wanted, given) if trains else "train"
        chosen[group] = fixed[group] if group in forced else free
        trains = trains or chosen[group] == "train"
        given.setdefault(chosen[group], np.zeros(vectors.shape[1]))
        given[chosen[group]] += vector_of[group]
    return chosen


def _features(counts: Vectors) -> Vectors:
    """Per group: images of each class, images in all, and its class of size (1, 2-3, 4-7, ... images) as an indicator.

    Without the last, groups with many images would gather in train, and tests would lack the patients seen often.
    """
    sizes = counts.sum(axis=1)
    octaves = np.floor(np.log2(sizes)).astype(np.int64)
    return np.column_stack([counts, sizes, np.eye(int(octaves.max()) + 1)[octaves]])


def _order(counts: pd.DataFrame, site: str, seed: int) -> list[str]:
    """Groups by the frequency of their rarest class, in random order within; a draw depends on its group alone."""
    totals = counts.sum().to_numpy()
    rarity = np.where(counts.to_numpy() > 0, totals, np.inf).min(axis=1)
    draws = [seeds.derive(seed, site=site, purpose=f"split|{group}") for group in counts.index]
    return [group for _, _, group in sorted(zip(rarity, draws, counts.index, strict=True))]


def _best(vector: Vectors, wanted: Mapping[str, Vectors], given: Mapping[str, Vectors]) -> str:
    def change(name: str) -> float:
        goal = wanted[name]
        held = goal > 0
        difference = (given[name] - goal)[held]
        return round(float(((2 * difference * vector[held] + vector[held] ** 2) / goal[held]).sum()), 9)

    return min((name for name in _TIES if name in wanted), key=change)
