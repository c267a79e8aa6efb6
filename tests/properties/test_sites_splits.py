"""Splits of any sites: whole groups, independent of order and of other sites, near the wanted shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from consilium.config_sites import Split
from consilium.errors import DataError
from consilium.sites import splits
from tests import hospitals

ROWS = st.lists(
    st.tuples(st.sampled_from(["east", "west"]), st.integers(0, 20).map(str), st.sampled_from("abc")),
    min_size=1,
    max_size=80,
)


SITES = st.lists(
    st.tuples(st.sampled_from(["east", "west", "south"]), st.integers(0, 12).map(str), st.sampled_from("abc")),
    min_size=3,
    max_size=80,
)


def mixed(num_groups: int = 400, seed: int = 0) -> pd.DataFrame:
    """One site; classes of 80, 18 and 2 per cent; one to four images per group."""
    random = np.random.default_rng(seed)
    labels = random.choice(list("abc"), num_groups, p=[0.8, 0.18, 0.02])
    rows = [("east", f"g{n}", str(label)) for n, label in enumerate(labels) for _ in range(random.integers(1, 5))]
    return hospitals.records(*rows)


@given(rows=ROWS, order=st.randoms(use_true_random=False))
def test_any_split_keeps_groups_whole_and_ignores_the_order_of_rows(
    rows: list[tuple[str, str, str]], order: object
) -> None:
    records = hospitals.records(*rows)
    found = splits.assign(records, Split())
    assert splits.divided_groups(found) == ()
    assert set(found["split"]) <= set(splits.NAMES)
    shared = splits.groups_at_several_sites(records)
    assert set(found["split"][found["group"].isin(shared)]) <= {"train"}
    assert set(found["site"][found["split"] == "train"]) == set(found["site"])
    shuffled = records.sample(frac=1, random_state=order.randrange(1000))  # type: ignore[attr-defined]
    pd.testing.assert_frame_equal(splits.assign(shuffled, Split()), found)


@given(rows=ROWS)
def test_a_site_does_not_notice_another(rows: list[tuple[str, str, str]]) -> None:
    records = hospitals.records(*rows)
    records["group"] = records["site"] + records["group"]
    east = records[records["site"] == "east"]
    together = splits.assign(records, Split()).query("site == 'east'")
    assert splits.assign(east, Split())["split"].tolist() == together["split"].tolist()


def test_a_site_that_is_given_the_list_of_shared_groups_splits_as_in_the_simulation() -> None:
    records = hospitals.records(
        *[(site, f"{n}", "ab"[n % 2]) for n in range(30) for site in ("east", "west")[: 1 + (n < 5)]]
    )
    shared = splits.groups_at_several_sites(records)
    assert len(shared) == 5
    alone = splits.assign(records[records["site"] == "east"], Split(), shared)
    together = splits.assign(records, Split()).query("site == 'east'")
    assert alone["split"].tolist() == together["split"].tolist()
    assert alone["split"].tolist() != splits.assign(records[records["site"] == "east"], Split())["split"].tolist()


def test_shares_hold_for_the_whole_for_every_class_and_for_every_size_of_group() -> None:
    found = splits.assign(mixed(), Split())
    wanted = pd.Series({"test": 0.2, "train": 0.7, "val": 0.1})
    sizes = found.groupby("group")["id"].transform("size")
    for part in (np.ones(len(found)), found["label"] == "a", found["label"] == "b", sizes == 1, sizes == 4):
        shares = found[np.asarray(part, dtype=bool)]["split"].value_counts(normalize=True).sort_index()
        assert (shares - wanted).abs().max() < 0.03
    rare = found[found["label"] == "c"]["split"].value_counts()
    assert set(rare.index) == {"train", "val", "test"}


def test_small_classes_together_still_fill_every_split() -> None:
    records = hospitals.records(*[("east", f"{label}{n}", label) for label in "abcdefg" for n in range(4)])
    sizes = splits.assign(records, Split())["split"].value_counts()
    assert all(abs(sizes[name] - 28 * share) < 1 for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)))


def test_every_class_is_split_by_the_shares_where_classes_are_equally_frequent() -> None:
    records = hospitals.records(*[("east", f"{label}{n}", label) for label in "abcdefg" for n in range(30)])
    found = pd.crosstab(*(splits.assign(records, Split())[name] for name in ("label", "split")))
    assert (found - pd.Series({"train": 21, "val": 3, "test": 6})).abs().to_numpy().max() <= 1


def test_name_and_seed_of_the_split_decide() -> None:
    records = mixed(60)
    first = splits.assign(records, Split())["split"].tolist()
    assert splits.assign(records, Split(seed=1))["split"].tolist() != first
    assert splits.assign(records.assign(site="west"), Split())["split"].tolist() != first


def test_one_patient_goes_to_train_and_a_share_of_nothing_gets_nothing() -> None:
    one = hospitals.records(*[("east", "p", label) for label in "aabb"])
    assert set(splits.assign(one, Split())["split"]) == {"train"}
    two = hospitals.records(("east", "p", "a"), ("east", "q", "a"))
    assert sorted(splits.assign(two, Split(train=0.2, val=0.0, test=0.8))["split"]) == ["test", "train"]
    shares = Split(train=0.0, val=0.5, test=0.5)
    assert set(splits.assign(mixed(60), shares)["split"]) == {"val", "test"}


def by_column(*rows: tuple[str, str, str]) -> pd.DataFrame:
    """Rows of (site, group, split)."""
    records = hospitals.records(*[(site, group, "a") for site, group, _ in rows])
    return records.assign(split=[split for _, _, split in rows])


def test_a_whole_column_is_taken_as_it_is() -> None:
    records = by_column(("e", "1", "val"), ("e", "2", "test"), ("e", "2", "test"), ("e", "3", "train"))
    assert splits.assign(records, Split(column="fold"))["split"].tolist() == records["split"].tolist()


def test_val_is_carved_out_of_train_where_a_site_has_none() -> None:
    folds = [("e", str(n // 2), "train" if n < 160 else "test") for n in range(200)]
    records = by_column(*folds, ("w", "x", "val"), ("w", "y", "train"))
    found = splits.assign(records, Split(column="fold"))
    assert found[found["site"] == "e"]["split"].value_counts().to_dict() == {"train": 140, "test": 40, "val": 20}
    assert found[found["site"] == "w"]["split"].tolist() == ["val", "train"]
    assert splits.divided_groups(found) == ()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("e", "1", "train"), ("e", "1", "test"), ("e", "2", "test")],
            r"1 groups, with 2 of 3 images, lie in more than one split[\s\S]*received: 1",
        ),
        ([("e", "1", "train"), ("w", "1", "test")], "more than one split"),
        ([("e", "1", "train"), ("e", "2", "fold3")], r"unknown split names[\s\S]*fold3"),
    ],
)
def test_a_column_that_leaks_or_means_nothing_is_refused(rows: list[tuple[str, str, str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        splits.assign(by_column(*rows), Split(column="fold"))


def test_a_written_split_is_read_again_and_beats_the_seed(tmp_path: Path) -> None:
    records = mixed(60)
    found = splits.assign(records, Split(seed=3))
    written = splits.write(found[::-1], tmp_path / "deep" / "split.parquet")
    assert written == splits.digest(found)
    again = splits.assign(records[::-1], Split(file=tmp_path / "deep" / "split.parquet"))
    pd.testing.assert_frame_equal(again[list(found)], found, check_dtype=False)


@pytest.mark.parametrize("change", ["fewer", "label", "site", "group", "edited", "nothing"])
def test_a_split_file_must_fit_the_rows(tmp_path: Path, change: str) -> None:
    records, path = mixed(20), tmp_path / "split.parquet"
    found = splits.assign(records, Split())
    splits.write(found, path)
    if change == "edited":
        table = pq.read_table(path)
        columns = table.set_column(4, "split", [["test"] * len(records)])
        pq.write_table(columns, path)
    elif change == "nothing":
        path.unlink()
    elif change == "fewer":
        records = records[1:]
    else:
        records.loc[0, change] = "other"
    with pytest.raises(DataError, match="split file"):
        splits.assign(records, Split(file=path))


def test_a_split_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist[\s\S]*nope\.parquet[\s\S]*consilium data split"):
        splits.assign(mixed(20), Split(file=tmp_path / "nope.parquet"))


def test_the_digest_sees_id_site_and_split_and_not_the_order() -> None:
    found = splits.assign(mixed(20), Split())
    digests = {splits.digest(found), splits.digest(found[::-1]), splits.digest(found.assign(label="z"))}
    assert len(digests) == 1
    for column in ("id", "site", "split"):
        assert splits.digest(found.assign(**{column: ["x", *found[column][1:]]})) not in digests


# ------------------------------------------------------------------------------------------------ held-out sites
@pytest.mark.parametrize("column", [False, True])
@given(rows=SITES)
def test_a_held_out_site_changes_no_row_of_the_others(rows: list[tuple[str, str, str]], column: bool) -> None:
    records = hospitals.records(*rows)
    given_split = Split(column="fold") if column else Split()
    if column:  # one split for each group, and no val
        records = records.assign(split=["train" if int(group) % 3 else "test" for group in records["group"]])
    inside = records[records["site"] != "west"]
    assume(len(inside))
    found = splits.assign(records, given_split, held_out=["west"])
    alone = splits.assign(inside, given_split)
    pd.testing.assert_frame_equal(found[found["site"] != "west"].reset_index(drop=True), alone)
    assert sorted(found["id"]) == sorted(records["id"])
    assert not splits.divided_groups(found), "no group of the held-out site was trained on and is tested there"


def test_a_split_that_was_written_with_a_held_out_site_is_read_with_it(tmp_path: Path) -> None:
    records = hospitals.records(*[(site, str(n), "ab"[n % 2]) for site in ("east", "south", "west") for n in range(9)])
    found = splits.assign(records, Split(), held_out=["west"])
    splits.write(found, tmp_path / "split.parquet")
    again = splits.assign(records, Split(file=tmp_path / "split.parquet"), held_out=["west"])
    pd.testing.assert_frame_equal(again, found)
