"""From configuration to federation: what comes out, and every kind of bad input stopped before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from consilium.config import SitesConfig
from consilium.data import Examples
from consilium.errors import ConfigError, DataError
from consilium.sites.federation import Federation, pool, prepare
from consilium.sites.store import transform_pixels
from tests import hospitals

TWO = hospitals.two_sites()
THREE = hospitals.records(
    *[
        (site, f"{site}{group}", "ab"[group % 2])
        for site in ("east", "south", "west")
        for group in range(10)
        for _ in "12"
    ]
)


def prepared(sites: SitesConfig, folder: Path, classes: tuple[str, ...] | None = None) -> Federation:
    return prepare(sites, classes, hospitals.PREPROCESSING, folder / "cache")


def ids(*parts: Examples) -> list[str]:
    return [str(id) for part in parts for id in part.ids]


def test_a_federation_holds_every_image_once_with_its_own_pixels(tmp_path: Path) -> None:
    found = prepared(hospitals.write(tmp_path, TWO), tmp_path)
    assert list(found.sites) == ["east", "west"]
    assert found.classes == ("a", "b")
    everything = [part for site in found.sites.values() for part in (site.train, site.val, site.test)]
    assert sorted(ids(*everything)) == sorted(TWO["id"])
    rows = TWO.set_index("id")
    for part in everything:
        for position, id in enumerate(part.ids):
            expected = transform_pixels(hospitals.pixels(int(id[1:])), hospitals.PREPROCESSING)
            np.testing.assert_array_equal(part.images[part.rows[position]], expected)
            assert found.classes[part.labels[position]] == rows["label"][id]
            assert (part.groups[position], part.origins[position]) == (rows["group"][id], rows["site"][id])


def test_the_split_table_says_where_each_image_went(tmp_path: Path) -> None:
    found = prepared(hospitals.write(tmp_path, TWO), tmp_path)
    for split in ("train", "val", "test"):
        listed = found.split[found.split["split"] == split]
        for name, site in found.sites.items():
            assert sorted(listed["id"][listed["site"] == name]) == ids(getattr(site, split))


def test_the_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    first = prepared(hospitals.write(tmp_path, TWO), tmp_path)
    files = {f"{id}.png": hospitals.png(hospitals.pixels(int(id[1:]))) for id in TWO["id"]}
    other = prepared(hospitals.write(tmp_path / "b", TWO.sample(frac=1, random_state=0), files), tmp_path)
    assert (first.split_hash, first.data_digest) == (other.split_hash, other.data_digest)
    np.testing.assert_array_equal(first.sites["east"].train.rows, other.sites["east"].train.rows)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_the_digest_sees_pixels_labels_and_groups(tmp_path: Path) -> None:
    tables = [TWO, TWO.assign(label=["b", *TWO["label"][1:]]), TWO.assign(group=["new", *TWO["group"][1:]])]
    digests = {prepared(hospitals.write(tmp_path / str(n), t), tmp_path).data_digest for n, t in enumerate(tables)}
    (tmp_path / "0" / "images" / "i0000.png").write_bytes(hospitals.png(hospitals.pixels(99)))
    digests.add(prepared(hospitals.configured(tmp_path / "0"), tmp_path).data_digest)
    assert len(digests) == 4


def test_pooling_merges_the_trained_sites_and_remembers_where_rows_came_from(tmp_path: Path) -> None:
    hospitals.write(tmp_path, TWO)
    both = prepared(hospitals.configured(tmp_path), tmp_path)
    merged = pool(both)
    assert merged.name == "pooled"
    assert ids(merged.train) == ids(both.sites["east"].train, both.sites["west"].train)
    assert list(merged.test.origins) == ["east"] * len(both.sites["east"].test) + ["west"] * len(
        both.sites["west"].test
    )
    hospitals.write(tmp_path, THREE)
    some = prepared(hospitals.configured(tmp_path, held_out=["west"]), tmp_path)
    assert set(pool(some).train.origins) == {"east", "south"}


def test_held_out_sites_stand_apart(tmp_path: Path) -> None:
    hospitals.write(tmp_path, THREE)
    found = prepared(hospitals.configured(tmp_path, held_out=["west"]), tmp_path)
    assert (list(found.sites), list(found.held_out)) == (["east", "south"], ["west"])
    refused = {
        ("north",): r"do not exist[\s\S]*north",
        ("east", "south", "west"): "every site is held out",
        ("east", "west"): r"one site is left[\s\S]*south",
    }
    for held_out, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            prepared(hospitals.configured(tmp_path, held_out=held_out), tmp_path)


def test_classes_that_only_a_held_out_site_has_must_be_declared(tmp_path: Path) -> None:
    table = THREE.assign(label=["c" if site == "west" else label for site, label in THREE[["site", "label"]].values])
    hospitals.write(tmp_path, table)
    settings = hospitals.configured(tmp_path, held_out=["west"])
    with pytest.raises(DataError, match=r"no site which takes part has[\s\S]*allowed: a, b[\s\S]*declare task.classes"):
        prepared(settings, tmp_path)
    assert prepared(settings, tmp_path, ("a", "b", "c")).classes == ("a", "b", "c")


def test_a_set_without_sites_becomes_a_federation_by_partition_only(tmp_path: Path) -> None:
    hospitals.write(tmp_path, TWO)
    columns = {"image": "image", "label": "label", "group": "patient"}
    divided = prepared(hospitals.configured(tmp_path, columns, partition={"kind": "iid", "num_sites": 3}), tmp_path)
    assert list(divided.sites) == ["site_0", "site_1", "site_2"]
    with pytest.raises(ConfigError, match="needs a site for every image"):
        prepared(hospitals.configured(tmp_path, columns), tmp_path)


def test_classes_are_declared_or_the_union(tmp_path: Path) -> None:
    sites = hospitals.write(tmp_path, TWO)
    declared = prepared(sites, tmp_path, ("c", "b", "a"))
    assert declared.classes == ("c", "b", "a")
    assert any("classes c" in warning for warning in declared.warnings)
    with pytest.raises(DataError, match=r"20 images have labels[\s\S]*allowed: a\n[\s\S]*received: b"):
        prepared(sites, tmp_path, ("a",))
    with pytest.raises(ConfigError, match="declared twice"):
        prepared(sites, tmp_path, ("a", "b", "a"))


def spoil(folder: Path, number: int) -> SitesConfig:
    sites = hospitals.write(folder, TWO)
    for n in range(number):
        (folder / "images" / f"i{n:04d}.png").write_bytes(b"no image")
    return sites


def test_corrupt_images_are_listed_or_dropped_as_far_as_tolerated(tmp_path: Path) -> None:
    spoil(tmp_path, 2)
    with pytest.raises(DataError, match=r"2 of 40 images are unreadable[\s\S]*i0000, i0001"):
        prepared(hospitals.configured(tmp_path, tolerate_corrupt=0.04), tmp_path)
    found = prepared(hospitals.configured(tmp_path, tolerate_corrupt=0.05), tmp_path)
    assert any("2 unreadable images were dropped" in warning for warning in found.warnings)
    kept = ids(*(part for site in found.sites.values() for part in (site.train, site.val, site.test)))
    assert len(kept) == 38
    assert len(found.split) == 40


def test_warnings_name_no_patient_and_no_image(tmp_path: Path) -> None:
    table = TWO.assign(group=["shared", *TWO["group"][1:39], "shared"])
    files = {f"{id}.png": hospitals.png(hospitals.pixels(0)) for id in table["id"]}  # all alike, in all splits
    hospitals.write(tmp_path, table, {**files, "i0007.png": b"no image"})
    found = prepared(hospitals.configured(tmp_path, tolerate_corrupt=0.5), tmp_path).warnings
    assert len(found) == 3, found
    assert all("consilium data audit" in text for text in found)
    assert not [word for word in (*table["id"], *table["group"]) if any(word in text for text in found)]


def test_a_site_with_no_training_rows_stops_the_run(tmp_path: Path) -> None:
    table = THREE.assign(split=["test" if site == "west" else "train" for site in THREE["site"]])
    hospitals.write(tmp_path, table)
    keys = {"split": {"column": "split"}}
    with pytest.raises(DataError, match=r"without training rows[\s\S]*west"):
        prepared(hospitals.configured(tmp_path, **keys), tmp_path)
    found = prepared(hospitals.configured(tmp_path, held_out=["west"], **keys), tmp_path)
    assert len(found.held_out["west"].test) == 20


def test_a_site_whose_training_images_are_all_corrupt_stops_the_run(tmp_path: Path) -> None:
    table = pd.concat([TWO, hospitals.records(("north", "n", "a")).assign(id="n")])
    hospitals.write(tmp_path, table)
    (tmp_path / "images" / "n.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"without training rows[\s\S]*north"):
        prepared(hospitals.configured(tmp_path, tolerate_corrupt=0.5), tmp_path)


WEST = TWO["site"] == "west"
FEW = ["west0", *(f"east{number}" for number in range(5))]
WARNED = {
    "one class": (TWO.assign(label=TWO["label"].mask(WEST, "a")), "site west: training on one class only (a)"),
    "one patient": (
        TWO.assign(group=TWO["group"].mask(WEST, "p")),
        "site west: one patient only, so everything is in one",
    ),
    "empty splits": (TWO[TWO["group"].isin(FEW)], "site west: no images for val and test, so metrics there have n = 0"),
    "shared groups": (
        TWO.assign(group=["p", *TWO["group"][1:39], "p"]),
        "1 groups occur at several sites (`consilium data audit`",
    ),
    "no groups": (TWO.assign(group=TWO["id"]), "no group holds two images"),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_is_odd_but_allowed_is_said(tmp_path: Path, case: str) -> None:
    table, message = WARNED[case]
    found = prepared(hospitals.write(tmp_path, table), tmp_path)
    assert any(message in warning for warning in found.warnings), found.warnings
    plain = prepared(hospitals.write(tmp_path / "plain", TWO), tmp_path)
    assert plain.warnings == ()


def test_what_many_sites_share_is_said_once(tmp_path: Path) -> None:
    few = hospitals.records(*((f"s{site}", f"s{site}", label) for site in range(8) for label in "ab"))
    found = prepared(hospitals.write(tmp_path, pd.concat([TWO, few.assign(id="n" + few["id"])])), tmp_path).warnings
    where = "s0, s1, s2, s3, s4 ... and 3 more"
    assert found == (
        f"8 sites: one patient only, so everything is in one split: {where}",
        f"8 sites: no images for val and test, so metrics there have n = 0: {where}",
    )


def test_equal_images_in_two_splits_are_said(tmp_path: Path) -> None:
    files = {f"{id}.png": hospitals.png(hospitals.pixels(min(n, 38))) for n, id in enumerate(TWO["id"])}
    table = TWO.assign(split=["train", "val"] * 20, group=TWO["id"])
    hospitals.write(tmp_path, table, files)
    found = prepared(hospitals.configured(tmp_path, split={"column": "split"}), tmp_path)
    assert any(
        "2 images lie byte for byte in two splits (`consilium data audit`" in warning for warning in found.warnings
    )


def test_a_split_column_may_be_named_in_either_place(tmp_path: Path) -> None:
    hospitals.write(tmp_path, TWO.assign(split=["train" if n % 4 < 2 else "test" for n in range(40)]))
    columns = {**hospitals.COLUMNS, "split": "split"}
    hashes = {
        prepared(sites, tmp_path).split_hash
        for sites in (
            hospitals.configured(tmp_path, columns),
            hospitals.configured(tmp_path, split={"column": "split"}),
            hospitals.configured(tmp_path, columns, split={"column": "split"}),
        )
    }
    assert len(hashes) == 1


REFUSED = {
    "two columns": ({"split": {"column": "label"}, "columns": {**hospitals.COLUMNS, "split": "split"}}, "two columns"),
    "shares beside a column": ({"split": {"seed": 1}, "columns": {**hospitals.COLUMNS, "split": "split"}}, "no effect"),
    "no columns at all": ({"source": "folder", "split": {"column": "split"}}, "has no columns"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_split_that_is_configured_twice_or_in_vain_is_refused(tmp_path: Path, case: str) -> None:
    hospitals.write(tmp_path, TWO.assign(split="train"))
    keys, message = REFUSED[case]
    plain = hospitals.configured(tmp_path).model_dump(exclude={"split"})
    changed = SitesConfig.model_validate({**plain, **keys})
    with pytest.raises(ConfigError, match=message):
        prepared(changed, tmp_path)


def test_a_site_named_like_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name of a folder"):
        prepared(hospitals.write(tmp_path, TWO.assign(site="../east")), tmp_path)


def test_options_that_change_decoding_do_not_share_a_store(tmp_path: Path) -> None:
    deep = np.full((8, 8), 4095, dtype=np.uint16)
    hospitals.write(tmp_path, TWO, {f"{id}.png": hospitals.png(deep) for id in TWO["id"]})
    bright = prepared(hospitals.configured(tmp_path, bits=12), tmp_path).sites["east"].train
    dark = prepared(hospitals.configured(tmp_path), tmp_path).sites["east"].train
    assert (int(bright.images.max()), int(dark.images.max())) == (255, 15)
