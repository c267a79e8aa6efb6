from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from consilium.errors import ConfigError
from consilium.metrics import sites_harmed
from consilium.study import groups, loading, page, plan, samples, statistics
from consilium.study.groups import Group
from consilium.study.harm import Harm, harms
from tests.synthetic_study import CLASSES, METHODS, write_study

NATURAL = {"natural": ("rosendahl", "vidir", "vienna")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_study(tmp_path_factory.mktemp("study"), groups=NATURAL)
    page.write(made)
    return made


def group_of(folder: Path) -> Group:
    study = loading.load(folder)
    return groups.groups(study, samples.samples(study))[0]


def against(folder: Path, baseline: str, metric: str = "balanced_accuracy") -> dict[str, Harm]:
    return {harm.method: harm for harm in harms(group_of(folder), baseline, metric)}


def test_differences_at_a_site_are_means_over_seeds_of_what_the_runs_say(folder: Path) -> None:
    results = pd.read_parquet(folder / "results.parquet")
    results = results[(results["metric"] == "balanced_accuracy") & (results["level"] == "site")]
    results["method"] = results["run"].str.split("-").str[1]
    means = results.groupby(["method", "site"])["value"].mean()
    for name, harm in against(folder, "full").items():
        for site, found in harm.differences.items():
            assert found.value == pytest.approx(means[name, site] - means["full", site])
            assert found.low is not None
            assert found.high is not None
            assert found.low < found.value < found.high


def test_a_poorer_method_harms_and_a_better_one_does_not(folder: Path) -> None:
    below, above = against(folder, "full")["linear"], against(folder, "linear")["full"]
    assert below.count.value == len(below.negative) == 3
    assert set(below.corrected) <= set(below.harmed) <= set(below.negative)
    assert below.harmed
    assert above.count.value == 0
    assert above.negative == above.harmed == above.corrected == []
    assert below.count.low is not None
    assert below.count.high is not None
    assert 0 <= below.count.low <= 3 == below.count.high


def test_with_one_seed_the_harmed_sites_are_those_of_a_run(tmp_path: Path) -> None:
    made = write_study(tmp_path, groups=NATURAL, seeds=(0,))
    used, local = (pd.read_parquet(made / f"runs/natural-{name}-0/predictions.parquet") for name in ("linear", "full"))
    said = sites_harmed(used, local, CLASSES, bootstrap=1000, seed=0)
    found = against(made, "full")["linear"]
    assert found.negative == said["negative"]
    assert found.harmed == said["sites"]


def test_where_less_is_better_the_other_direction_harms(folder: Path) -> None:
    up, down = against(folder, "full")["linear"], against(folder, "full", "expected_calibration_error")["linear"]
    assert set(up.negative) | set(down.negative) == set(up.differences)
    assert not set(up.negative) & set(down.negative)


def test_p_values_are_corrected_over_methods_and_sites(folder: Path) -> None:
    found = against(folder, "full").values()
    plain = [each.p for harm in found for each in harm.differences.values() if each.p is not None]
    corrected = [p for harm in found for p in harm.p_holm.values() if p is not None]
    assert len(plain) == 9
    assert sorted(corrected) == pytest.approx(sorted(statistics.holm(plain)))


def test_equal_methods_harm_nobody(folder: Path) -> None:
    group = group_of(folder)
    same = {name: np.repeat(value[:1], len(group.methods), axis=0) for name, value in group.values.items()}
    for harm in harms(replace(group, values=same), "full", "balanced_accuracy"):
        assert (harm.count.value, harm.count.low, harm.count.high) == (0, 0, 0)


def test_other_images_are_refused_and_no_baseline_says_nothing(folder: Path) -> None:
    group = group_of(folder)
    images = [list(row) for row in group.images]
    images[0] = ["other"] * len(images[0])
    refused = harms(replace(group, images=images), "full", "balanced_accuracy")[0]
    assert refused.refused == "not tested on the same images"
    assert refused.count.value is None
    assert harms(group, None, "balanced_accuracy") == harms(group, "absent", "balanced_accuracy") == []


def test_the_page_has_sites_and_all_three_levels(folder: Path) -> None:
    tables = {path.name for path in (folder / "tables").glob("*.md")}
    assert "sites-worse-off-than-with-full-of-3-natural.md" in tables
    assert "differences-to-full-at-each-site-in-points-natural.md" in tables
    assert {"all-pairs-worst-site-natural.md", "all-pairs-all-images-pooled-natural.md"} <= tables
    numbers = json.loads((folder / "statistics.json").read_text())["groups"]["natural"]
    assert [harm["method"] for harm in numbers["harms"]] == [name for name in METHODS if name != "full"]
    assert set(numbers["other_pairs"]) == {"worst", "pooled"}
    pair = numbers["other_pairs"]["worst"][0]
    values = {name: numbers["estimates"][name]["worst"]["value"] for name in METHODS}
    assert pair["difference"]["value"] == pytest.approx(values[pair["first"]] - values[pair["second"]])


# ------------------------------------------------------------------------------------------------ references
def with_pooled(folder: Path) -> Path:
    """Every run of `lora` has the predictions of `full` as those of its pooled reference."""
    made = write_study(folder, groups=NATURAL)
    results = pd.read_parquet(made / "results.parquet")
    added = [results]
    for seed in (0, 1, 2):
        rows = results[results["run"] == f"natural-full-{seed}"]
        added.append(rows.assign(run=f"natural-lora-{seed}", model="pooled reference"))
        place = made / f"runs/natural-lora-{seed}/references/pooled"
        place.mkdir(parents=True)
        table = pd.read_parquet(made / f"runs/natural-full-{seed}/predictions.parquet")
        table.assign(model="personal").to_parquet(place / "predictions.parquet", index=False)
    pd.concat(added).to_parquet(made / "results.parquet", index=False)
    about = json.loads((made / "study.json").read_text())
    about["compare"]["references"] = "lora"
    (made / "study.json").write_text(json.dumps(about))
    return made


def test_references_are_compared_like_methods(tmp_path: Path) -> None:
    made = with_pooled(tmp_path)
    page.write(made)
    numbers = json.loads((made / "statistics.json").read_text())["groups"]["natural"]
    assert numbers["estimates"]["pooled reference"] == numbers["estimates"]["full"]
    equal = next(p for p in numbers["pairs"] if {p["first"], p["second"]} == {"pooled reference", "full"})
    assert equal["difference"]["value"] == 0
    text = (made / "report.html").read_text()
    assert "12 of 12" in text, "a reference is no run"
    assert "pooled reference has no bytes" in text


def test_without_the_key_references_take_no_part(tmp_path: Path) -> None:
    study = loading.load(write_study(tmp_path, groups=NATURAL))
    assert loading.with_references(study) is study


def test_references_of_an_unknown_method_are_refused(tmp_path: Path) -> None:
    text = 'name = "x"\n[axes.tuner.lora]\ntuner = ["lora"]\n[axes.tuner.linear]\ntuner = ["linear"]\n'
    (tmp_path / "study.toml").write_text(text + '[compare]\nreferences = "loar"\n')
    with pytest.raises(ConfigError, match="no such axis or value"):
        plan.plan(tmp_path / "study.toml")
