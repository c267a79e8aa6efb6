from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium import metrics
from consilium.errors import StateError
from consilium.study import comparison, groups, loading, samples, statistics
from consilium.study.comparison import Findings
from consilium.study.groups import Group
from consilium.study.statistics import Draws, Estimate
from tests.synthetic_study import CLASSES, METHODS, write_study


# ------------------------------------------------------------------------------------------------ distributions
@pytest.mark.parametrize(("t", "df"), [(12.706, 1), (4.303, 2), (3.182, 3), (2.776, 4), (2.228, 10), (1.960, math.inf)])
def test_students_t_is_that_of_the_tables(t: float, df: float) -> None:
    assert statistics.t_two_sided(t, df) == pytest.approx(0.05, abs=2e-4)
    assert statistics.t_two_sided(-t, df) == statistics.t_two_sided(t, df)
    assert statistics.t_quantile(0.95, df) == pytest.approx(t, abs=1e-3)


def test_students_t_at_zero_and_far_out() -> None:
    assert statistics.t_two_sided(0.0, 3.5) == pytest.approx(1)
    assert 0 <= statistics.t_two_sided(1e6, 3.5) < 1e-9


def test_resampled_seeds_have_the_unbiased_variance_of_a_mean() -> None:
    values = np.array([0.1, 0.4, 0.2, 0.7])
    weights = statistics.seed_weights(4, 40_000)
    assert weights[0] == pytest.approx(0.25)
    assert weights.sum(axis=1) == pytest.approx(1)
    assert (weights[1:] @ values).var() == pytest.approx(values.var(ddof=1) / 4, rel=0.03)
    assert (statistics.seed_weights(1, 5) == 1).all()


def test_a_missing_seed_is_left_out_and_not_zero() -> None:
    values = np.full((2, 3, 5), 0.5)
    values[0, 1] = np.nan
    values[1, :, 1:] = np.nan  # no predictions: observed only
    drawn = statistics.over_seeds(values, statistics.seed_weights(3, 4))
    assert drawn.joint[0, 0] == 0.5
    assert np.isin(drawn.joint[0], [0.5]).sum() + np.isnan(drawn.joint[0]).sum() == 5
    assert drawn.joint[1, 0] == 0.5
    assert np.isnan(drawn.joint[1, 1:]).all()


def covers(num_seeds: int, patients: float, training: float, number: int) -> bool:
    """Whether the interval of a mean over seeds holds the truth, 0, in one made-up study."""
    rng = np.random.default_rng(number)
    common = rng.normal(0, patients)  # the same patients in every run
    observed = common + rng.normal(0, training, (num_seeds, 1))
    values = np.concatenate([observed, observed + rng.normal(0, patients, 400)], axis=1)
    drawn = statistics.over_seeds(values, statistics.seed_weights(num_seeds, 400, number))
    found = statistics.estimate(drawn, num_seeds)
    assert found.low is not None
    assert found.high is not None
    assert found.p is not None
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    return found.low <= 0 <= found.high


@pytest.mark.parametrize(
    ("num_seeds", "patients", "training"), [(3, 0.0, 1.0), (3, 1.0, 1.0), (3, 1.0, 0.1), (2, 1.0, 1.0)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(num_seeds: int, patients: float, training: float) -> None:
    held = np.mean([covers(num_seeds, patients, training, number) for number in range(300)])
    assert 0.91 < held < 0.995


def test_an_interval_needs_replicates_and_a_value() -> None:
    blank = np.full(11, np.nan)
    known = np.append([0.5], blank[1:])
    assert statistics.estimate(Draws(blank, blank), 3) == Estimate(None, num_seeds=3)
    assert statistics.estimate(Draws(known, known), 3) == Estimate(0.5, num_seeds=3)
    still = np.full(11, 0.5)
    assert statistics.estimate(Draws(still, still), 1) == Estimate(0.5, 0.5, 0.5, None, 0.0, None, 1)


# ------------------------------------------------------------------------------------------------ slope
def test_the_slope_of_a_line_is_exact() -> None:
    x = np.array([3.0, 4.5, 6.0, 7.2])
    y = np.stack([0.2 + k * x for k in (0.04, -0.01)], axis=1)
    assert statistics.slopes(y, x) == pytest.approx([0.04, -0.01])
    assert statistics.line(y[:, 0], x) == pytest.approx((0.04, 0.2, 1.0))
    assert np.isnan(statistics.slopes(y, np.full(4, 2.0))).all()


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_slopes_are_those_of_polyfit(number: int) -> None:
    rng = np.random.default_rng(number)
    x, y = rng.normal(size=6), rng.normal(size=(6, 4))
    counts = rng.integers(0, 3, (4, 6)).astype(float)
    counts[:, :2] += 1  # two different places at least
    for t in range(4):
        drawn = np.repeat(np.arange(6), counts[t].astype(int))
        assert statistics.slopes(y, x)[t] == pytest.approx(np.polyfit(x, y[:, t], 1)[0])
        assert statistics.slopes(y, x, counts)[t] == pytest.approx(np.polyfit(x[drawn], y[drawn, t], 1)[0], abs=1e-8)


# ------------------------------------------------------------------------------------------------ front, ranks, Holm
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=7))
def test_the_front_is_what_nothing_dominates(places: list[tuple[int, int]]) -> None:
    cost, gain = (np.array(values, dtype=float) for values in zip(*places, strict=True))
    slow = [
        not any(c <= cost[i] and g >= gain[i] and (c, g) != (cost[i], gain[i]) for c, g in places)
        for i in range(len(places))
    ]
    assert statistics.on_front(cost, gain[:, None])[:, 0].astype(bool).tolist() == slow


def test_ranks_share_ties() -> None:
    assert statistics.ranks(np.array([[0.9, 0.5, 0.5, 0.1], [1.0, 1.0, 1.0, 2.0]])).tolist() == [
        [1, 2.5, 2.5, 4],
        [3, 3, 3, 1],
    ]


def test_friedman_by_hand_and_against_every_permutation() -> None:
    agreed = np.tile([1.0, 2.0, 3.0], (4, 1))
    statistic, p = statistics.friedman(agreed)
    assert statistic == pytest.approx(8)  # 12 / (4 * 3 * 4) * (4^2 + 8^2 + 12^2) - 3 * 4 * 4
    assert p == pytest.approx(1 / 6**3, abs=0.003)
    tied = np.array([[1, 2, 3], [1.5, 1.5, 3], [2, 1, 3]])
    statistic, p = statistics.friedman(tied)
    assert statistic == pytest.approx(4.9091, abs=1e-4)  # 4.5 over 1 - 6 / 72 for the tie
    every = itertools.product(*(itertools.permutations(block) for block in tied))
    reached = [np.var(np.sum(blocks, axis=0)) >= np.var(tied.sum(axis=0)) - 1e-9 for blocks in every]
    assert p == pytest.approx(np.mean(reached), abs=0.02)


def test_friedman_without_any_difference() -> None:
    assert statistics.friedman(np.full((3, 4), 2.5)) == (0.0, 1.0)


def test_smallest_p_values() -> None:
    assert statistics.smallest_friedman(2, 3) == pytest.approx(1 / 6)
    assert statistics.smallest_friedman(9, 14) == pytest.approx(1e-4)
    assert [statistics.smallest_sign_flip(n) for n in (1, 3, 5, 6)] == [1, 0.25, 0.0625, 0.03125]


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []


def test_rows_without_gaps() -> None:
    known = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=bool)
    assert comparison.complete(known) == ([0, 2], [0, 1, 2])
    known[2, 2] = False
    assert comparison.complete(known) == ([0, 1, 2], [0, 1])
    assert comparison.complete(np.zeros((2, 2), dtype=bool)) == ([], [0, 1])


# ------------------------------------------------------------------------------------------------ a study
def read(folder: Path) -> tuple[loading.Study, list[Group], dict[str, samples.Sample]]:
    study = loading.load(folder)
    drawn = samples.samples(study)
    return study, groups.groups(study, drawn), drawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def found(folder: Path) -> tuple[list[Group], list[Findings]]:
    _, made, _ = read(folder)
    return made, [comparison.findings(group, "balanced_accuracy", "full") for group in made]


def change(source: Path, target: Path, **about: object) -> Path:
    """The same runs under another study.json."""
    for name in ("runs", "results"):
        table = pd.read_parquet(source / f"{name}.parquet")
        if name == "runs":
            table = table.assign(folder=[str(source / path) for path in table["folder"]])
        table.to_parquet(target / f"{name}.parquet", index=False)
    (target / "study.json").write_text(json.dumps({**json.loads((source / "study.json").read_text()), **about}))
    return target


@pytest.mark.parametrize("metric", ["balanced_accuracy", "accuracy", "sensitivity.mel", "balanced_accuracy_declared"])
def test_replicates_are_those_of_the_metric_tree(folder: Path, tmp_path: Path, metric: str) -> None:
    about = json.loads((folder / "study.json").read_text())
    study, _, drawn = read(change(folder, tmp_path, compare={**about["compare"], "metric": metric}))
    run = study.runs.iloc[0]
    table = pd.read_parquet(Path(str(run["folder"])) / "predictions.parquet")
    tree = metrics.metric_tree(table, CLASSES, bootstrap=samples.FAST)[metric]
    for level, entry in {
        **{k: tree[k] for k in ("pooled", "mean", "worst")},
        "site:vienna": tree["per_site"]["vienna"],
    }.items():
        values = drawn[str(run["run"])].values[level]
        assert values[0] == pytest.approx(entry["value"])
        assert np.percentile(values[1:], [2.5, 97.5]) == pytest.approx([entry["low"], entry["high"]])


def test_other_metrics_have_fewer_replicates(folder: Path, tmp_path: Path) -> None:
    about = json.loads((folder / "study.json").read_text())
    _, (group, _), _ = read(change(folder, tmp_path, compare={**about["compare"], "metric": "macro_auroc"}))
    assert group.values["mean"].shape == (4, 3, 1 + samples.SLOW)
    assert np.isfinite(group.values["mean"]).all()


def test_every_run_on_the_same_images_sees_the_same_patients(folder: Path) -> None:
    _, made, _ = read(folder)
    for group in made:
        assert len({images for row in group.images for images in row}) == 1
    differences = made[0].values["mean"][:, 0, 1:] - made[0].values["mean"][:, 0, :1]
    assert np.corrcoef(differences)[0, 1] > 0.3


def test_the_slope_is_that_of_the_means(found: tuple[list[Group], list[Findings]]) -> None:
    (group, _), (one, _) = found
    assert [slope.subset for slope in one.slopes[:4]] == [
        "all methods", "without head-only", "without full", "without head-only and full",
    ]  # fmt: skip
    means = np.array([one.estimates[name]["mean"].value for name in METHODS])
    x = np.log10([8.0 * size for size in METHODS.values()])  # float32, both ways
    assert one.slopes[0].cost == "bytes"
    assert one.slopes[0].change.value == pytest.approx(np.polyfit(x, means, 1)[0])
    assert one.slopes[1].change.value == pytest.approx(np.polyfit(x[1:], means[1:], 1)[0])
    assert one.slopes[2].methods == ["linear", "bitfit", "lora"]
    trained = next(slope for slope in one.slopes if slope.cost == "trainable")
    assert trained.change.value == pytest.approx(one.slopes[0].change.value)
    assert one.slopes[0].change.num_seeds == len(group.seeds)
    assert one.slopes[0].with_methods is None  # four methods


def test_intervals_cover_seeds_as_well_as_patients(folder: Path) -> None:
    _, (group, _), _ = read(folder)
    patients = group.values["mean"][2, :, 1:].mean(axis=0).std()
    observed = group.values["mean"][2, :, 0]
    found = comparison.findings(group, "balanced_accuracy").estimates["lora"]["mean"]
    assert found.se == pytest.approx(math.hypot(patients, observed.std(ddof=1) / math.sqrt(3)), rel=0.15)


def test_pairs_start_with_the_baseline_and_are_corrected_together(found: tuple[list[Group], list[Findings]]) -> None:
    _, (one, _) = found
    assert [pair.second for pair in one.pairs[:3]] == ["full"] * 3
    assert {frozenset((pair.first, pair.second)) for pair in one.pairs} == {
        frozenset(pair) for pair in itertools.combinations(METHODS, 2)
    }
    plain = [pair.difference.p for pair in one.pairs]
    assert all(p is not None for p in plain)
    assert [pair.p_holm for pair in one.pairs] == pytest.approx(statistics.holm([p or 0.0 for p in plain]))
    first = one.pairs[0]
    values = [one.estimates[name]["mean"].value or 0.0 for name in (first.first, "full")]
    assert first.difference.value == pytest.approx(values[0] - values[1])


def test_pairs_that_seem_not_to_vary_over_seeds_borrow_from_the_others(
    found: tuple[list[Group], list[Findings]],
) -> None:
    (group, _), (one, _) = found
    count, values = len(group.seeds), group.values["mean"]
    index = {name: at for at, name in enumerate(group.methods)}
    alone, patients, se = [], [], []
    for pair in one.pairs:
        gap = values[index[pair.first]] - values[index[pair.second]]
        alone.append(gap[:, 0].var(ddof=1))
        patients.append(gap[:, 1:].mean(axis=0).var())
        se.append(pair.difference.se)
    pooled = np.mean(alone)
    assert max(alone) > pooled > min(alone)
    expected = np.sqrt(np.array(patients) + np.maximum(alone, pooled) / count)
    assert np.array(se) == pytest.approx(expected, rel=0.15)


def test_few_seeds_do_not_make_small_p_values_common() -> None:
    """Ten equal methods in 40 made-up studies of two seeds, with more chance in training than in patients."""
    rng, small = np.random.default_rng(0), 0
    for _ in range(40):
        observed = rng.normal(size=(10, 1, 1)) + 2 * rng.normal(size=(10, 2, 1))
        drawn = rng.normal(size=(10, 1, 200))
        drawn[:, :, 0] = 0
        names = [str(k) for k in range(10)]
        group = Group("g", names, [0, 1], {"mean": observed + drawn}, [["x"] * 2] * 10, pd.DataFrame(), "mean")
        small += any((pair.p_holm or 0) < 0.05 for pair in comparison.pairs(group))
    assert small <= 5  # 5 % of 40 are 2; were nothing borrowed, it would be 15


def test_methods_on_other_images_are_not_compared(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=(0,), n=120)
    path = tmp_path / "runs/natural-lora-0/predictions.parquet"
    table = pd.read_parquet(path)
    table.assign(group=table["group"] + "x").to_parquet(path)
    _, (group, other), _ = read(tmp_path)
    refused = {(pair.first, pair.second): pair.refused for pair in comparison.pairs(group) if pair.refused}
    assert len(refused) == 3
    assert all("lora" in pair for pair in refused)
    assert set(refused.values()) == {"not tested on the same images"}
    assert all(pair.refused == "" for pair in comparison.pairs(other))


def test_missing_predictions_cost_the_intervals_only(tmp_path: Path) -> None:
    write_study(tmp_path, n=120)
    for path in tmp_path.glob("runs/natural-lora-*/predictions.parquet"):
        path.unlink()
    _, (group, _), drawn = read(tmp_path)
    one = comparison.findings(group, "balanced_accuracy")
    assert one.estimates["lora"]["mean"].value is not None
    assert one.estimates["lora"]["mean"].low is None
    assert one.slopes[0].change.value is not None
    assert one.slopes[0].change.low is None
    assert [pair.refused for pair in one.pairs if "lora" in (pair.first, pair.second)] == [
        "predictions are missing"
    ] * 3
    (said,) = samples.problems(drawn)
    assert said.startswith("3 runs have no resampled patients")


def test_what_exchanges_nothing_has_no_place_on_the_axis(tmp_path: Path) -> None:
    write_study(tmp_path, n=120, silent=["lora"])
    _, (group, _), _ = read(tmp_path)
    one = comparison.findings(group, "balanced_accuracy")
    assert one.slopes[0].left_out == ["lora"]
    assert one.slopes[0].methods == ["linear", "bitfit", "full"]
    assert one.front.methods[0] == "lora"
    assert one.front.on_front[0]
    assert one.front.share[0] == 1


def test_an_undefined_metric_is_left_out(tmp_path: Path) -> None:
    write_study(tmp_path, n=120)
    results = pd.read_parquet(tmp_path / "results.parquet")
    results.loc[results["run"].str.contains("natural-lora"), "value"] = np.nan
    results.to_parquet(tmp_path / "results.parquet")
    _, made, _ = read(tmp_path)
    one = comparison.findings(made[0], "balanced_accuracy")
    assert one.estimates["lora"]["mean"] == Estimate(None)
    assert "lora" in one.slopes[0].left_out
    assert "no seed with a value of both" in {pair.refused for pair in one.pairs}
    assert comparison.ranking(made, "balanced_accuracy").left_out == ["lora"]


def test_ranks_over_groups_and_seeds_or_else_over_sites(folder: Path, tmp_path: Path) -> None:
    _, made, _ = read(folder)
    ranked = comparison.ranking(made, "balanced_accuracy")
    assert len(ranked.blocks) == 6
    assert np.array(ranked.ranks).mean(axis=0).argsort().tolist() == [3, 2, 1, 0]
    assert ranked.tested_blocks == 2, "seeds share their patients"
    assert ranked.p == pytest.approx(1 / 24, abs=0.01)  # both groups rank all four alike: one order of 4! in two
    worse = comparison.ranking(made, "expected_calibration_error")  # lower is better
    assert np.array(worse.ranks).mean(axis=0).argsort().tolist() == [0, 1, 2, 3]
    write_study(tmp_path, n=90, groups={"natural": ("a", "b", "c")}, seeds=(5,))
    assert comparison.ranking(read(tmp_path)[1], "balanced_accuracy").blocks == ["site a", "site b", "site c"]


def test_axes_that_are_not_compared_are_part_of_the_method(folder: Path, tmp_path: Path) -> None:
    about = json.loads((folder / "study.json").read_text())
    study = loading.load(change(folder, tmp_path, compare={**about["compare"], "within": []}))
    assert study.groups == [loading.WHOLE]
    assert study.methods[0] == "linear, partition natural"
    assert len(study.methods) == 8


@pytest.mark.parametrize("missing", ["study.json", "runs.parquet", "results.parquet"])
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, missing: str) -> None:
    (change(folder, tmp_path) / missing).unlink()
    with pytest.raises(StateError, match=missing.split(".")[0]):
        loading.load(tmp_path)


def test_a_missing_column_and_a_missing_method_are_named(folder: Path, tmp_path: Path) -> None:
    change(folder, tmp_path)
    pd.read_parquet(tmp_path / "runs.parquet").drop(columns="tuner").to_parquet(tmp_path / "runs.parquet")
    with pytest.raises(StateError, match="tuner"):
        loading.load(tmp_path)
    with pytest.raises(StateError, match="what it compares"):
        loading.load(change(folder, tmp_path, compare={}))


def test_a_run_without_the_compared_model_is_measured_by_its_personal_one(tmp_path: Path) -> None:
    write_study(tmp_path, n=90, seeds=(0,))
    results = pd.read_parquet(tmp_path / "results.parquet")
    personal = results["run"] == "natural-lora-0"
    results.loc[personal, "model"] = "personal"
    results.to_parquet(tmp_path / "results.parquet")
    path = tmp_path / "runs/natural-lora-0/predictions.parquet"
    pd.read_parquet(path).assign(model="personal").to_parquet(path)
    _, (group, _), drawn = read(tmp_path)
    assert np.isfinite(group.values["mean"]).all()
    assert samples.problems(drawn) == []
