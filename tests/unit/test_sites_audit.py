"""The audit: leaking groups, doubled images, broken files, class tables; and the leak that is known to be there."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from consilium.config import Config, SitesConfig
from consilium.sites.audit import audit, audit_config, inspect, write_split
from consilium.sites.federation import prepare
from tests import hospitals


def rows(*given: tuple[str, str, str]) -> pd.DataFrame:
    """Rows of (site, group, split)."""
    records = hospitals.records(*[(site, group, "a") for site, group, _ in given])
    return records.assign(split=[split for _, _, split in given])


def hashed(records: pd.DataFrame, *doubled: str) -> dict[str, str]:
    return {id: "same" if id in doubled else id for id in records["id"]}


def test_a_clean_set_is_clean() -> None:
    records = rows(("e", "1", "train"), ("e", "1", "train"), ("w", "2", "test"))
    counts = audit(records, hashed(records)).to_dict()["counts"]
    assert (counts.pop("images"), counts.pop("groups")) == (3, 2)
    assert set(counts.values()) == {0}


def test_groups_that_leak_within_and_across_sites() -> None:
    records = rows(("e", "1", "train"), ("e", "1", "test"), ("e", "2", "train"), ("w", "2", "val"), ("w", "3", "val"))
    found = audit(records, hashed(records))
    within, across = found.groups_across_splits
    assert (within.group, within.splits, within.within_site, within.num_images) == ("1", ("test", "train"), True, 2)
    assert (across.group, across.sites, across.within_site) == ("2", ("e", "w"), False)
    assert [group.group for group in found.groups_at_several_sites] == ["2"]


def test_doubled_images_say_what_they_cross() -> None:
    records = rows(("e", "1", "train"), ("w", "2", "test"), ("w", "3", "test"))
    records["label"] = ["a", "b", "b"]
    (found,) = audit(records, hashed(records, "i0000", "i0001")).duplicates
    assert (found.ids, found.sites, found.splits) == (("i0000", "i0001"), ("e", "w"), ("test", "train"))
    counts = audit(records, hashed(records, "i0000", "i0001")).to_dict()["counts"]
    crossed = [
        counts[f"duplicates{what}"] for what in ("", "_across_splits", "_across_sites", "_with_different_labels")
    ]
    assert crossed == [1, 1, 1, 1]
    same = audit(records, hashed(records, "i0001", "i0002")).to_dict()["counts"]
    assert (same["duplicates"], same["duplicates_across_splits"], same["duplicates_across_sites"]) == (1, 0, 0)


def test_an_image_without_a_hash_is_nobodys_double() -> None:
    records = rows(("e", "1", "train"), ("e", "2", "test"))
    assert audit(records, {}, ["i0001", "i0000"]).duplicates == ()
    assert audit(records, {}, ["i0001", "i0000"]).unreadable == ("i0000", "i0001")


def test_the_class_table_counts_every_cell() -> None:
    records = rows(("e", "1", "train"), ("e", "2", "test"), ("w", "3", "train"))
    records["label"] = ["a", "b", "b"]
    expected = {"e": {"test": {"a": 0, "b": 1}, "train": {"a": 1, "b": 0}}, "w": {"train": {"a": 0, "b": 1}}}
    assert audit(records, {}).classes == expected


@pytest.fixture
def leaky(tmp_path: Path) -> SitesConfig:
    """One patient lies in two splits of the table's own split; one file is a copy, one is broken."""
    table = hospitals.two_sites().assign(split=["train" if n % 4 < 2 else "test" for n in range(40)])
    table.loc[1, "split"] = "test"
    hospitals.write(tmp_path, table)
    images = tmp_path / "images"
    (images / "i0030.png").write_bytes((images / "i0000.png").read_bytes())
    (images / "i0005.png").write_bytes(b"no image")
    return hospitals.configured(tmp_path, split={"column": "split"})


def test_an_audit_finds_what_training_would_refuse(leaky: SitesConfig) -> None:
    done: list[tuple[int, int]] = []
    found = audit_config(Config(sites=leaky), lambda n, total: done.append((n, total)))
    assert [group.group for group in found.groups_across_splits] == ["east0"]
    assert [one.ids for one in found.duplicates] == [("i0000", "i0030")]
    assert found.unreadable == ("i0005",)
    assert done[-1] == (40, 40)
    assert json.loads(json.dumps(found.to_dict()))["counts"]["unreadable"] == 1


def test_an_audit_of_our_own_split_shows_the_split_that_training_uses(tmp_path: Path) -> None:
    config = Config(sites=hospitals.write(tmp_path, hospitals.two_sites()))
    found = audit_config(config)
    assert found.groups_across_splits == ()
    split = prepare(config.sites, None, hospitals.PREPROCESSING, tmp_path / "cache").split
    for (site, name), part in split.groupby(["site", "split"]):
        assert sum(found.classes[str(site)][str(name)].values()) == len(part)


def test_a_written_split_is_the_one_that_training_uses(tmp_path: Path) -> None:
    config = Config(sites=hospitals.write(tmp_path, hospitals.two_sites()))
    written = write_split(config, tmp_path / "split.parquet")
    own = prepare(config.sites, None, hospitals.PREPROCESSING, tmp_path / "cache")
    imported = hospitals.configured(tmp_path, split={"file": tmp_path / "split.parquet"})
    again = prepare(imported, None, hospitals.PREPROCESSING, tmp_path / "cache")
    assert written == own.split_hash == again.split_hash


def test_inspect_counts_and_measures(leaky: SitesConfig) -> None:
    found = inspect(Config(sites=leaky))
    assert (found["images"], found["groups"], found["classes"]) == (40, 20, {"a": 20, "b": 20})
    assert found["sites"]["west"]["sizes_of_first_images"] == {"10 x 12": 20}
    assert found["sites"]["east"]["sizes_of_first_images"] == {"10 x 12": 19, "unreadable": 1}


def ham10000(folder: Path, split: str | None) -> Config:
    columns = {"image": "image_id", "label": "dx", "site": "site", "group": "lesion_id"}
    columns |= {"split": split} if split else {}
    sites = {
        "source": "manifest",
        "table": folder / "metadata.csv",
        "images": folder / "images.zip",
        "columns": columns,
    }
    return Config(sites=SitesConfig.model_validate(sites))


def test_the_published_folds_of_ham10000_leak_696_lesions_and_ours_none(shared: Path) -> None:
    folder = shared / "data" / "ham10000"
    folds = pd.read_csv(folder / "fed_isic2019_train_test_split.csv").set_index("image")["fold"]
    table = pd.read_csv(folder / "metadata.csv").set_index("image_id")
    assert (folds[table.index] == table["flamby_fold"]).all()
    published = audit_config(ham10000(folder, "flamby_fold"))
    assert len(published.groups_across_splits) == 696
    assert sum(group.num_images for group in published.groups_across_splits) == 1688
    assert len(published.groups_at_several_sites) == 9
    assert published.unreadable == ()
    ours = audit_config(ham10000(folder, None))
    assert ours.groups_across_splits == ()
    assert all(len(one.splits) == 1 for one in ours.duplicates)
