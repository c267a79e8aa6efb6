"""Partitions of any set: whole groups, no empty site, the same for any order of rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.config_sites import Partition
from consilium.errors import ConfigError, DataError
from consilium.sites.partition import divide
from tests import hospitals

SETS = st.lists(
    st.tuples(st.just(""), st.sampled_from("pqrstuvw"), st.sampled_from("abc")), min_size=8, max_size=60
).map(lambda rows: hospitals.records(*rows, *[("", f"more{n}", "a") for n in range(6)]))
KINDS = [
    Partition(kind="iid", num_sites=3),
    Partition(kind="dirichlet", num_sites=3, alpha=1.0),
    Partition(kind="quantity", num_sites=3),
]


@pytest.mark.parametrize("partition", KINDS, ids=lambda p: p.kind)
@given(records=SETS, order=st.randoms(use_true_random=False))
def test_every_partition(partition: Partition, records: pd.DataFrame, order: object) -> None:
    found = divide(records, partition)
    assert found.groupby("group")["site"].nunique().max() == 1
    assert sorted(set(found["site"])) == ["site_0", "site_1", "site_2"]
    pd.testing.assert_frame_equal(found.drop(columns="site"), records.drop(columns="site"))
    shuffled = records.sample(frac=1, random_state=order.randrange(1000))  # type: ignore[attr-defined]
    pd.testing.assert_frame_equal(divide(shuffled, partition), found)


def big(num_groups: int = 600) -> pd.DataFrame:
    return hospitals.records(*[("", f"g{n}", "abc"[n % 3]) for n in range(num_groups) for _ in range(1 + n % 2)])


def test_the_seed_decides() -> None:
    first, again, other = (
        divide(big(), Partition(kind="iid", num_sites=4, seed=seed))["site"].tolist() for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_iid_sites_are_of_one_size() -> None:
    sizes = divide(big(), Partition(kind="iid", num_sites=7)).groupby("site").size()
    assert sizes.max() - sizes.min() <= 2


def skew(records: pd.DataFrame) -> float:
    """Mean distance between a site's class shares and the set's."""
    shares = pd.crosstab(records["site"], records["label"], normalize="index")
    return float((shares - records["label"].value_counts(normalize=True)).abs().to_numpy().mean())


def test_a_small_alpha_skews_labels_more_than_a_large_one() -> None:
    small, large = (
        np.mean([skew(divide(big(), Partition(kind="dirichlet", num_sites=4, alpha=alpha, seed=s))) for s in range(5)])
        for alpha in (0.2, 50.0)
    )
    assert small > 4 * large


def test_quantity_skews_sizes_and_not_labels() -> None:
    found = [divide(big(), Partition(kind="quantity", num_sites=3, alpha=0.5, seed=seed)) for seed in range(5)]
    sizes = [f.groupby("site").size() for f in found]
    assert np.mean([size.max() / size.min() for size in sizes]) > 3
    labels = [divide(big(), Partition(kind="dirichlet", num_sites=3, alpha=0.5, seed=seed)) for seed in range(5)]
    assert np.mean([skew(f) for f in found]) < np.mean([skew(f) for f in labels]) / 2


def test_what_cannot_be_divided_says_why() -> None:
    with pytest.raises(DataError, match="fewer groups than sites"):
        divide(big(2), Partition(kind="iid", num_sites=3))
    with pytest.raises(ConfigError, match="stays empty"):
        divide(big(4), Partition(kind="quantity", num_sites=4, alpha=1e-4))
    with pytest.raises(ConfigError, match="needs a site"):
        divide(big(), Partition())


def test_natural_changes_nothing_but_the_order() -> None:
    records = hospitals.two_sites()
    pd.testing.assert_frame_equal(divide(records[::-1], Partition()), records)


def test_many_sites_keep_their_order_when_sorted_by_name() -> None:
    assert sorted(set(divide(big(), Partition(kind="iid", num_sites=11))["site"]))[-1] == "site_10"
