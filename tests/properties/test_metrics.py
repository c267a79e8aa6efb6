from __future__ import annotations

import json

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium import metrics
from consilium.bootstrap import auroc

CLASSES = ("x", "y", "z")


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    n = draw(st.integers(1, 25))
    level = st.lists(st.integers(0, 4), min_size=n, max_size=n)
    scores = np.array([draw(level) for _ in CLASSES], dtype=float).T + 1
    p = scores / scores.sum(axis=1, keepdims=True)
    labels = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    sites = draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n))
    groups = [site + str(draw(st.integers(0, 3))) for site in sites]
    columns = {f"p.{name}": p[:, c] for c, name in enumerate(CLASSES)}
    return pd.DataFrame({"site": sites, "id": [f"{i}" for i in range(n)], "group": groups, "label": labels, **columns})


@settings(max_examples=60, deadline=None)
@given(tables())
def test_any_table_gives_numbers_between_0_and_1_or_none(frame: pd.DataFrame) -> None:
    tree = metrics.metric_tree(frame, CLASSES, bootstrap=20)
    json.dumps(tree, allow_nan=False)
    for entry in tree.values():
        for v in [entry["pooled"], entry["mean"], entry["worst"], *entry["per_site"].values()]:
            assert all(v[key] is None or -1e-12 <= v[key] <= 1 + 1e-12 for key in ("value", "low", "high"))
            assert (v["low"] is None) == (v["high"] is None)
            assert v["low"] is None or v["low"] <= v["high"]


@settings(max_examples=60, deadline=None)
@given(tables(), st.permutations([0, 1, 2]))
def test_names_of_classes_do_not_matter(frame: pd.DataFrame, order: list[int]) -> None:
    renamed = frame.assign(label=[order[label] for label in frame["label"]])
    for c in range(3):
        renamed[f"p.{CLASSES[order[c]]}"] = frame[f"p.{CLASSES[c]}"]
    one, two = (metrics.metric_tree(t, CLASSES, bootstrap=0)["macro_auroc"]["pooled"] for t in (frame, renamed))
    assert one["n"] == two["n"]
    np.testing.assert_allclose(np.array(one["value"], float), np.array(two["value"], float), atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12))
def test_weighted_auroc_is_the_auroc_of_repeated_images(rows: list[tuple[int, bool, int]]) -> None:
    scores, positive, weights = (np.array(column) for column in zip(*rows, strict=True))
    found = auroc(scores.astype(float), positive, weights[None].astype(float))[0]
    inside, outside = (np.repeat(scores[mask], weights[mask]) for mask in (positive, ~positive))
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    np.testing.assert_allclose(found, np.mean(pairs) if pairs else np.nan, atol=1e-12)
    np.testing.assert_allclose(
        auroc(-scores.astype(float), positive, weights[None].astype(float))[0], 1 - found, atol=1e-12
    )
