from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score

from consilium import metrics
from consilium.bootstrap import read, replicates
from consilium.errors import DataError

CLASSES = ("mel", "nv", "bcc")


def table(
    n: int = 240, *, seed: int = 0, sites: str = "ab", num_groups: int = 40, shift: float = 1.0, ties: bool = False
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=[0.2, 0.6, 0.2])
    logits = rng.normal(size=(n, 3))
    logits[np.arange(n), labels] += shift
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    site = rng.choice(list(sites), n)
    group = [f"{s}{g}" for s, g in zip(site, rng.integers(0, num_groups, n), strict=True)]
    columns = {f"p.{name}": p[:, i].round(1) if ties else p[:, i] for i, name in enumerate(CLASSES)}
    ids = [f"i{i:04d}" for i in range(n)]
    return pd.DataFrame({"site": site, "id": ids, "group": group, "label": labels, **columns})


def probabilities(frame: pd.DataFrame) -> np.ndarray:
    return frame[[f"p.{name}" for name in CLASSES]].to_numpy()


def slow_metrics(frame: pd.DataFrame) -> dict[str, float]:
    """Image by image and pair by pair, from the definitions."""
    p, y = probabilities(frame), frame["label"].to_numpy()
    guess = p.argmax(axis=1)
    recall, areas, result = [], [], {}
    for c, name in enumerate(CLASSES):
        inside, outside = p[y == c, c], p[y != c, c]
        hit = [float(g == c) for g, truth in zip(guess, y, strict=True) if truth == c]
        correct_no = [float(g != c) for g, truth in zip(guess, y, strict=True) if truth != c]
        result[f"sensitivity.{name}"] = np.mean(hit) if hit else math.nan
        result[f"specificity.{name}"] = np.mean(correct_no) if correct_no else math.nan
        recall.append(result[f"sensitivity.{name}"])
        if len(inside) and len(outside):
            areas.append(np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside]))
    error = 0.0
    for k in range(15):
        confidence = p.max(axis=1)
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - (guess == y)[inside].mean())
    return {
        **result,
        "accuracy": float(np.mean(guess == y)),
        "balanced_accuracy": float(np.nanmean(recall)),
        "balanced_accuracy_declared": float(np.mean(recall)),
        "macro_auroc": float(np.mean(areas)) if areas else math.nan,
        "expected_calibration_error": error,
    }


@pytest.mark.parametrize("ties", [False, True])
def test_values_are_those_of_the_definitions(ties: bool) -> None:
    frame = table(ties=ties)
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=0)
    for site, rows in [("a", frame[frame.site == "a"]), ("b", frame[frame.site == "b"]), (None, frame)]:
        for name, expected in slow_metrics(rows).items():
            found = tree[name]["pooled"] if site is None else tree[name]["per_site"][site]
            assert found["value"] == pytest.approx(expected, abs=1e-12), name


def test_values_are_those_of_scikit_learn() -> None:
    frame = table(ties=False)
    p, y = probabilities(frame), frame["label"].to_numpy()
    quick = metrics.quick_metrics(p, y)
    assert quick["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, p.argmax(axis=1)), abs=1e-12)
    assert quick["macro_auroc"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr"), abs=1e-12)
    assert quick["loss"] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), abs=1e-12)
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=0)
    recalls = [tree[f"sensitivity.{name}"]["pooled"]["value"] for name in CLASSES]
    assert recalls == pytest.approx(recall_score(y, p.argmax(axis=1), average=None).tolist())


@pytest.mark.parametrize("ties", [False, True])
def test_a_replicate_is_the_metric_of_the_groups_it_drew(ties: bool) -> None:
    frame = table(n=90, num_groups=12, ties=ties)
    sites = read(frame, CLASSES, 5, 3)
    pooled, alone = replicates(sites), replicates(sites[:1])
    for replicate in range(1, 6):
        copies = []
        for rows in sites:
            own = frame[frame.site == rows.site].sort_values("id")
            copies.append(own.iloc[np.repeat(np.arange(len(own)), rows.weights[replicate][rows.groups].astype(int))])
        for found, drawn in [(pooled, pd.concat(copies)), (alone, copies[0])]:
            for name, expected in slow_metrics(drawn).items():
                assert found[name][replicate] == pytest.approx(expected, abs=1e-12, nan_ok=True), name


def test_every_replicate_draws_as_many_groups_as_there_are_and_whole_ones() -> None:
    rows = read(table(num_groups=10), CLASSES, 50, 0)[0]
    assert (rows.weights.sum(axis=1) == rows.weights.shape[1]).all()
    assert (rows.weights[1:] != 1).any()
    assert len(np.unique(rows.weights[1:], axis=0)) == 50


def test_every_replicate_holds_every_class_as_often_in_groups_of_one_class() -> None:
    frame = table(n=60, sites="a", num_groups=60)
    frame = frame.assign(group=frame["id"], label=[0] * 40 + [1] * 18 + [2] * 2)
    rows = read(frame, CLASSES, 200, 0)[0]
    drawn = rows.weights[:, rows.groups]
    for label, count in ((0, 40), (1, 18), (2, 2)):
        assert (drawn[:, rows.labels == label].sum(axis=1) == count).all()


def test_a_constant_answer_is_worth_one_over_the_number_of_classes_and_nothing_else() -> None:
    frame = table(n=30, sites="a", num_groups=30)
    frame = frame.assign(group=frame["id"], label=[0] * 26 + [1] * 3 + [2])
    frame[[f"p.{name}" for name in CLASSES]] = np.eye(len(CLASSES))[0]
    value = metrics.metric_tree(frame, CLASSES)["balanced_accuracy"]["pooled"]
    assert (value["value"], value["low"], value["high"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_sites_are_resampled_independently() -> None:
    frame = table(sites="a", num_groups=10)
    sites = read(pd.concat([frame, frame.assign(site="b")]), CLASSES, 50, 0)
    assert sites[0].weights.shape == sites[1].weights.shape
    assert (sites[0].weights != sites[1].weights).any()


def test_images_of_one_group_are_not_counted_as_independent() -> None:
    frame = table(n=400, sites="a", num_groups=400)
    alone = metrics.metric_tree(frame.assign(group=frame["id"]), CLASSES)["accuracy"]["pooled"]
    repeated = pd.concat([frame.assign(id=frame["id"] + f"_{k}", group=frame["id"]) for k in range(4)])
    again = metrics.metric_tree(repeated, CLASSES)["accuracy"]["pooled"]
    assert again["n"] == 4 * alone["n"]
    assert again["high"] - again["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.15)
    expected = 2 * 1.96 * math.sqrt(alone["value"] * (1 - alone["value"]) / 400)
    assert alone["high"] - alone["low"] == pytest.approx(expected, rel=0.1)


def test_mean_and_worst_are_over_sites() -> None:
    tree = metrics.metric_tree(table(sites="abcd", n=500), CLASSES, bootstrap=200)
    for name, entry in tree.items():
        values = {site: v["value"] for site, v in entry["per_site"].items()}
        extreme = max if name in metrics.LOWER_IS_BETTER else min
        assert entry["mean"]["value"] == pytest.approx(np.mean(list(values.values())))
        assert entry["mean"]["sites"] == 4
        assert entry["worst"]["value"] == extreme(values.values())
        assert values[entry["worst"]["site"]] == entry["worst"]["value"]
    widths = {part: tree["accuracy"][part]["high"] - tree["accuracy"][part]["low"] for part in ("mean", "pooled")}
    assert widths["mean"] < min(v["high"] - v["low"] for v in tree["accuracy"]["per_site"].values())
    assert tree["accuracy"]["worst"]["low"] < tree["accuracy"]["worst"]["value"]


def test_the_worst_calibration_error_is_the_largest() -> None:
    good, bad = table(sites="a", seed=1, shift=3), table(sites="b", seed=2, shift=-2)
    entry = metrics.metric_tree(pd.concat([good, bad]), CLASSES, bootstrap=50)["expected_calibration_error"]
    assert entry["worst"]["site"] == "b"
    assert entry["worst"]["low"] > entry["per_site"]["a"]["high"]


def test_the_interval_of_a_calibration_error_holds_it_although_resampling_adds_to_it() -> None:
    frame = table(n=600, sites="abcdef", shift=1.0)
    raw = replicates(read(frame[frame.site == "a"], CLASSES, 200, 0))["expected_calibration_error"]
    assert np.median(raw[1:]) > raw[0] + 0.01
    entry = metrics.metric_tree(frame, CLASSES, bootstrap=200)["expected_calibration_error"]
    for v in [entry["mean"], entry["pooled"], *entry["per_site"].values()]:
        assert 0 <= v["low"] < v["value"] < v["high"]


def test_a_class_without_images_is_undefined_and_not_zero() -> None:
    frame = table()
    frame = frame[~((frame.site == "a") & (frame.label == 2))]
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=100)
    declared, present = tree["balanced_accuracy_declared"], tree["balanced_accuracy"]
    assert declared["per_site"]["a"]["value"] is None
    assert declared["per_site"]["b"] == present["per_site"]["b"]
    assert declared["mean"] | {"n": 0} == declared["per_site"]["b"] | {"n": 0, "sites": 1}
    of_a = [tree[f"sensitivity.{name}"]["per_site"]["a"] for name in CLASSES]
    assert [v["value"] is None for v in of_a] == [False, False, True]
    assert of_a[2]["n"] == 0
    assert present["per_site"]["a"]["value"] == pytest.approx((of_a[0]["value"] + of_a[1]["value"]) / 2)
    assert tree["specificity.bcc"]["per_site"]["a"]["value"] is not None


def test_a_site_with_one_class_only() -> None:
    frame = table()
    tree = metrics.metric_tree(frame[(frame.site == "b") | (frame.label == 1)], CLASSES, bootstrap=50)
    assert tree["macro_auroc"]["per_site"]["a"] == {
        "value": None,
        "low": None,
        "high": None,
        "n": int(tree["macro_auroc"]["per_site"]["a"]["n"]),
    }
    assert tree["macro_auroc"]["mean"]["sites"] == 1
    assert tree["balanced_accuracy"]["per_site"]["a"] == tree["accuracy"]["per_site"]["a"]
    assert tree["specificity.nv"]["per_site"]["a"]["value"] is None


def test_no_interval_from_one_group() -> None:
    frame = table()
    frame.loc[frame.site == "a", "group"] = "only patient"
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=50)["accuracy"]
    assert tree["per_site"]["a"]["value"] is not None
    assert (tree["per_site"]["a"]["low"], tree["per_site"]["a"]["high"]) == (None, None)
    assert tree["mean"]["low"] is None
    assert tree["worst"]["low"] is None
    assert tree["per_site"]["b"]["low"] is not None


def test_no_interval_for_a_recall_from_one_group() -> None:
    frame = table()
    frame.loc[frame.label == 0, "group"] = frame["site"] + "-same"
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=50)
    assert tree["sensitivity.mel"]["per_site"]["a"]["low"] is None
    assert tree["specificity.mel"]["per_site"]["a"]["low"] is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_makes_the_site_and_the_summary_undefined(bad: float) -> None:
    frame = table()
    frame.loc[frame.index[frame.site == "a"][0], "p.nv"] = bad
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=20)
    for name in ("balanced_accuracy", "macro_auroc", "accuracy", "expected_calibration_error", "sensitivity.mel"):
        assert tree[name]["per_site"]["a"]["value"] is None
        assert tree[name]["per_site"]["b"]["value"] is not None
        assert [tree[name][part]["value"] for part in ("pooled", "mean", "worst")] == [None, None, None]
    assert metrics.confusion_matrix(frame, CLASSES).sum() == len(frame) - 1
    assert math.isnan(metrics.quick_metrics(probabilities(frame), frame["label"].to_numpy())["accuracy"])


@pytest.mark.parametrize("rows", [0, 1])
def test_none_and_one_image(rows: int) -> None:
    frame = table()[:rows]
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=10, sites=["empty"])
    assert tree["accuracy"]["per_site"]["empty"] == {"value": None, "low": None, "high": None, "n": 0}
    assert tree["accuracy"]["pooled"]["n"] == rows
    json.dumps(tree, allow_nan=False)
    quick = metrics.quick_metrics(probabilities(frame), frame["label"].to_numpy())
    assert math.isnan(quick["accuracy"]) == (rows == 0)


def test_the_order_of_rows_changes_nothing_and_the_seed_does() -> None:
    frame = table()
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=30, seed=1)
    assert metrics.metric_tree(frame.sample(frac=1, random_state=3), CLASSES, bootstrap=30, seed=1) == tree
    assert metrics.metric_tree(frame, CLASSES, bootstrap=30, seed=2) != tree
    alone = metrics.metric_tree(frame[frame.site == "a"], CLASSES, bootstrap=30, seed=1)
    assert alone["macro_auroc"]["per_site"]["a"] == tree["macro_auroc"]["per_site"]["a"]


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    first = table(shift=1.2, n=600)
    second = first.assign(**{"p.nv": first["p.nv"] + 0.05})
    found = metrics.paired_difference(first, second, "accuracy", CLASSES, bootstrap=300)
    one, two = (metrics.metric_tree(t, CLASSES, bootstrap=300)["accuracy"] for t in (first, second))
    for part in ("pooled", "mean"):
        assert found[part]["value"] == pytest.approx(one[part]["value"] - two[part]["value"])
        assert found[part]["high"] - found[part]["low"] < 0.6 * (one[part]["high"] - one[part]["low"])
    assert metrics.paired_difference(first, first, "macro_auroc", CLASSES, bootstrap=20)["pooled"]["high"] == 0


def test_a_paired_difference_needs_the_same_images_and_a_known_metric() -> None:
    frame = table()
    with pytest.raises(DataError, match="same images"):
        metrics.paired_difference(frame, frame[1:], "accuracy", CLASSES, bootstrap=5)
    with pytest.raises(DataError, match="same sites"):
        metrics.paired_difference(frame, frame[frame.site == "a"], "accuracy", CLASSES, bootstrap=5)
    with pytest.raises(DataError, match="no metric"):
        metrics.paired_difference(frame, frame, "acuracy", CLASSES, bootstrap=5)


def test_a_paired_difference_finds_the_images_in_any_order() -> None:
    frame = table()
    shuffled = frame.sample(frac=1, random_state=5)
    found = metrics.paired_difference(frame, shuffled, "balanced_accuracy", CLASSES, bootstrap=5)
    assert (found["pooled"]["low"], found["pooled"]["high"]) == (0, 0)


def test_a_difference_from_a_broken_model_is_undefined() -> None:
    frame = table()
    broken = frame.assign(**{"p.nv": frame["p.nv"].where(frame.site == "a", math.nan)})
    for pair in [(frame, broken), (broken, frame)]:
        found = metrics.paired_difference(*pair, "accuracy", CLASSES, bootstrap=5)
        assert found["mean"]["value"] is None
        assert found["per_site"]["a"]["value"] == 0


def test_harm_is_a_difference_whose_interval_excludes_zero() -> None:
    local = table(sites="abc", n=900, shift=1.5)
    used = local.copy()
    swap = (used.site == "a") & (used.index % 3 == 0)
    used.loc[swap, ["p.mel", "p.nv", "p.bcc"]] = used.loc[swap, ["p.nv", "p.bcc", "p.mel"]].to_numpy()
    right = probabilities(used).argmax(axis=1) == used["label"]
    slip = used.index[(used.site == "b") & (used.label == 1) & right][:1]
    used.loc[slip, ["p.mel", "p.nv"]] = [0.9, 0.05]
    found = metrics.sites_harmed(used, local, CLASSES, bootstrap=200)
    assert (found["sites"], found["count"]) == (["a"], 1)
    assert (found["negative"], found["count_negative"]) == (["a", "b"], 2)
    assert found["difference"]["c"]["value"] == 0
    reverse = metrics.sites_harmed(local, used, CLASSES, bootstrap=200)
    assert (reverse["sites"], reverse["negative"]) == ([], [])
    calibration = metrics.sites_harmed(used, local, CLASSES, metric="expected_calibration_error", bootstrap=200)
    assert calibration["sites"] == ["a"]
    assert found["undetermined"] == []


def test_harm_without_an_interval_is_unknown_and_not_none() -> None:
    local = table(sites="abc", n=300, shift=1.5)
    alone = local.assign(group=local.group.where(local.site != "b", "one patient"))
    found = metrics.sites_harmed(alone, alone, CLASSES, bootstrap=50)
    assert (found["count"], found["undetermined"]) == (0, ["b"])
    for bootstrap, frame in ((0, local), (50, local.assign(group=local.site))):
        nowhere = metrics.sites_harmed(frame, frame, CLASSES, bootstrap=bootstrap)
        assert (nowhere["count"], nowhere["undetermined"]) == (None, ["a", "b", "c"])


def test_the_majority_baseline_answers_with_each_sites_own_class() -> None:
    frame = table(sites="abc")
    counts = {"a": [5, 1, 1], "b": [0, 9, 1], "c": [0, 0, 0]}
    tree = metrics.majority_baseline(counts, frame, CLASSES, bootstrap=20)
    shares = {site: frame[frame.site == site]["label"].value_counts(normalize=True) for site in "abc"}
    expected = {"a": shares["a"][0], "b": shares["b"][1], "c": shares["c"][1]}
    assert {s: v["value"] for s, v in tree["accuracy"]["per_site"].items()} == pytest.approx(expected)
    assert tree["balanced_accuracy"]["per_site"]["a"]["value"] == pytest.approx(1 / 3)
    assert tree["macro_auroc"]["per_site"]["a"]["value"] == 0.5


def test_confusion_and_reliability_agree_with_the_metrics() -> None:
    frame = table()
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=0)
    matrix = metrics.confusion_matrix(frame, CLASSES)
    assert matrix.trace() / matrix.sum() == pytest.approx(tree["accuracy"]["pooled"]["value"])
    assert matrix[1, 1] / matrix[1].sum() == pytest.approx(tree["sensitivity.nv"]["pooled"]["value"])
    bins = metrics.reliability(frame, CLASSES)
    filled = bins["n"] > 0
    gap = np.abs(bins["confidence"] - bins["accuracy"])[filled] @ bins["n"][filled] / len(frame)
    assert gap == pytest.approx(tree["expected_calibration_error"]["pooled"]["value"])
    assert np.isnan(bins["accuracy"][~filled]).all()


@pytest.mark.parametrize(
    "damage", [lambda t: t.drop(columns="group"), lambda t: t.drop(columns="p.nv"), lambda t: t.assign(label=3)]
)
def test_a_table_that_cannot_be_read_is_refused(damage) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError):
        metrics.metric_tree(damage(table()), CLASSES)


def test_json_has_no_nan() -> None:
    assert metrics.without_nan({"a": [math.nan, 1.0, "x"], "b": (math.inf,), "c": None}) == {
        "a": [None, 1.0, "x"],
        "b": [None],
        "c": None,
    }
