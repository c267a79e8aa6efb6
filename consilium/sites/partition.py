"""Stage 1, sites. In: records of a whole set. Out: the same records with sites of a simulated federation.

A group is never divided. Depends on the set of rows and `partition.seed` only, not on the order of rows.

- natural: the site column as it is.
- iid: groups in random order, each to the site with the fewest images.
- dirichlet: for each class, shares of the sites drawn from Dirichlet(alpha) (Yurochkin et al. 2019, arXiv:1905.12022);
  the class of a group is that of most of its images.
- quantity: the same draw for the set as a whole, so that sites differ in size only (alpha left out: 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from consilium import seeds
from consilium.config_sites import Partition
from consilium.data import IntArray
from consilium.errors import ConfigError, DataError

_MAX_DRAWS = 1000


def divide(records: pd.DataFrame, partition: Partition) -> pd.DataFrame:
    """`records` with column site filled in, sorted by id; every site gets at least one group.

    Raises DataError where there are too few groups, ConfigError where `natural` meets records without sites.
    """
    ordered = records.sort_values("id", ignore_index=True)
    if partition.kind == "natural":
        return _natural(ordered)
    groups = _groups(ordered)
    num_sites = partition.num_sites or 0
    if len(groups) < num_sites:
        where = f"sites.partition, kind {partition.kind!r}"
        raise DataError("there are fewer groups than sites", where=where, allowed=len(groups), received=num_sites)
    chosen = _iid(groups, partition) if partition.kind == "iid" else _skewed(groups, partition)
    width = len(str(num_sites - 1))
    site_of = {group: f"site_{number:0{width}d}" for group, number in zip(groups.index, chosen, strict=True)}
    return ordered.assign(site=ordered["group"].map(site_of))


def _natural(records: pd.DataFrame) -> pd.DataFrame:
    if (records["site"] == "").any():
        remedy = "name the site column in sites.columns, or use partition kind iid, dirichlet or quantity"
        raise ConfigError("the natural partition needs a site for every image", where="sites.partition", remedy=remedy)
    return records


def _groups(records: pd.DataFrame) -> pd.DataFrame:
    """One row per group, sorted: its number of images and its most frequent label (first in the alphabet on a tie)."""
    counts = records.groupby(["group", "label"]).size().unstack(fill_value=0).sort_index(axis="columns")
    return pd.DataFrame({"size": counts.sum(axis="columns"), "label": counts.idxmax(axis="columns")})


def _iid(groups: pd.DataFrame, partition: Partition) -> IntArray:
    order = seeds.numpy_generator(partition.seed, purpose="partition.iid").permutation(len(groups))
    sizes, chosen = groups["size"].to_numpy(), np.zeros(len(groups), dtype=np.int64)
    filled = np.zeros(partition.num_sites or 0, dtype=np.int64)
    for position in order:
        chosen[position] = int(filled.argmin())
        filled[chosen[position]] += sizes[position]
    return chosen


def _skewed(groups: pd.DataFrame, partition: Partition) -> IntArray:
    """Draw until no site is empty; ConfigError after too many draws."""
    random = seeds.numpy_generator(partition.seed, purpose=f"partition.{partition.kind}")
    labels = groups["label"].to_numpy() if partition.kind == "dirichlet" else np.full(len(groups), "")
    members = {label: np.flatnonzero(labels == label) for label in sorted(set(labels))}
    sizes, num_sites = groups["size"].to_numpy(dtype=np.int64), partition.num_sites or 0
    for _ in range(_MAX_DRAWS):
        chosen = _draw(members, sizes, num_sites, partition.alpha or 1.0, random)
        if len(np.unique(chosen)) == num_sites:
            return chosen
    remedy = "a larger alpha or fewer sites"
    raise ConfigError(f"a site stays empty in {_MAX_DRAWS} draws", where="sites.partition", remedy=remedy)


def _draw(
    members: Mapping[str, IntArray], sizes: IntArray, num_sites: int, alpha: float, random: np.random.Generator
) -> IntArray:
    """Site of each group: within a class, groups in random order are cut at the drawn shares of the class's images."""
    chosen = np.zeros(len(sizes), dtype=np.int64)
    for positions in members.values():
        order = random.permutation(positions)
        bounds = random.dirichlet(np.full(num_sites, alpha)).cumsum() * sizes[order].sum()
        middles = sizes[order].cumsum() - sizes[order] / 2
        chosen[order] = np.searchsorted(bounds, middles).clip(max=num_sites - 1)
    return chosen
