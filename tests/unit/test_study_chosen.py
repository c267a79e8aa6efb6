"""Values are chosen by the mean over seeds on validation images, with equal budgets, and used by another study."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pandas as pd
import pytest

from consilium.errors import ConfigError
from consilium.study import chosen
from consilium.study.axes import Axis
from consilium.study.file import CompareConfig
from consilium.study.plan import plan
from tests.unit.test_study_plan import BASE, STUDY

RATES = (0.1, 0.2, 0.4)
COMPARE = CompareConfig(method="tuner", within=("where",), split="val")
CELLS = [{"tuner": t, "where": w, "rate": r} for t in ("a", "b") for w in ("x", "y") for r in RATES]
SCORES = {("a", 0.1): (0.2, 0.4), ("a", 0.2): (0.6, 0.6), ("a", 0.4): (0.9, 0.1)}
SCORES |= {("b", 0.1): (0.5, 0.5), ("b", 0.2): (0.5, 0.5), ("b", 0.4): (0.4, 0.4)}


def tables(missing: int | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs of two seeds, whose values differ between seeds and, by a tenth up and down, between the places."""
    runs = pd.DataFrame(
        [
            {"run": str(n), **cell, "seed": n % 2, "status": "done"}
            for n, cell in enumerate(c for c in CELLS for _ in "01")
        ]
    )
    shift = runs["where"].map({"x": 0.1, "y": -0.1})
    value = [SCORES[row.tuner, row.rate][row.seed] for row in runs.itertuples()]
    results = pd.DataFrame({"run": runs["run"], "value": value + shift})
    results = results.assign(split="val", model="global", metric="balanced_accuracy", level="pooled", site="")
    return runs, results.drop(index=[] if missing is None else [missing])


def test_the_best_mean_wins_and_of_equal_ones_the_first() -> None:
    found = chosen.points(*tables(), CELLS, COMPARE, ["rate"])
    assert [(p.method, p.values[0]) for p in found] == [(t, r) for t in "ab" for r in RATES]
    assert [p.num_runs for p in found] == [4] * 6
    assert [round(p.mean or 0, 6) for p in found] == [0.3, 0.6, 0.5, 0.5, 0.5, 0.4]
    assert found[0].spread == pytest.approx(2**0.5 * 0.1)
    best = chosen.best(found, "balanced_accuracy")
    assert {name: point.values for name, point in best.items()} == {"a": (0.2,), "b": (0.1,)}
    assert chosen.edges(found, best, ["rate"]) == {"a": [], "b": ["rate"]}
    assert chosen.best(found, "expected_calibration_error")["a"].values == (0.1,)


def test_a_point_that_lacks_a_run_cannot_win_but_one_that_was_refused_is_no_run() -> None:
    runs, results = tables(missing=2)  # of method a, rate 0.2
    found = chosen.points(runs, results, CELLS, COMPARE, ["rate"])
    assert chosen.best(found, "balanced_accuracy")["a"].values == (0.4,)
    assert (found[1].mean, found[1].num_runs) == (None, 3)
    gone = runs["where"] == "x"
    runs.loc[gone, "status"] = "refused"
    kept = results[~results["run"].isin(runs.loc[gone, "run"])]
    assert chosen.points(runs, kept, CELLS, COMPARE, ["rate"])[1].mean == pytest.approx(0.5)


def test_the_personal_model_stands_in_where_there_is_no_global_one() -> None:
    _, results = tables()
    personal = results.assign(model="personal", value=-1.0)
    lacking = results[results["run"] != "3"]
    assert list(chosen.values_of(pd.concat([lacking, personal]), COMPARE).query("value == -1")["run"]) == ["3"]


AXES = [
    Axis("tuner", {"a": {"tuner": [{"name": "lora"}]}, "b": {"tuner": [{"name": "linear"}]}}),
    Axis("rate", {rate: {"train": {"learning_rate": rate}} for rate in RATES}),
]


def write(folder: Path) -> Path:
    found = chosen.points(*tables(), CELLS, COMPARE, ["rate"])
    return chosen.write(folder, found, AXES[1:], {"method": "tuner", "metric": "balanced_accuracy", "seeds": (0, 1)})


def test_what_is_written_holds_the_keys_every_try_and_the_edges(tmp_path: Path) -> None:
    table = tomllib.loads(write(tmp_path).read_text())
    assert table["values"] == {"a": {"train.learning_rate": 0.2}, "b": {"train.learning_rate": 0.1}}
    assert table["at_edge"] == {"a": [], "b": ["rate"]}
    assert [(row["method"], row["rate"], row["chosen"]) for row in table["tried"] if row["chosen"]] == [
        ("a", 0.2, True),
        ("b", 0.1, True),
    ]
    assert len(table["tried"]) == 6
    assert {row["runs"] for row in table["tried"]} == {4}


def test_another_study_gives_each_method_what_was_chosen_for_it(tmp_path: Path) -> None:
    file = write(tmp_path)
    used = chosen.use(AXES[:1], file)
    assert [used[0].values[name]["train.learning_rate"] for name in "ab"] == [0.2, 0.1]
    (tmp_path / "base.toml").write_text(BASE)
    text = STUDY.replace("[axes.tuner.lora]", f'use = "{file.name}"\n[axes.tuner.a]').replace("tuner.linear", "tuner.b")
    (tmp_path / "study.toml").write_text(text)
    rates = [cell.config.train.learning_rate for cell in plan(tmp_path / "study.toml").cells if cell.config]
    assert rates == [0.2, 0.2, 0.1, 0.1]
    (tmp_path / "study.toml").write_text(text + "[grid]\ntrain.learning_rate = [1.0, 2.0]\n")
    with pytest.raises(ConfigError, match="given twice"):
        plan(tmp_path / "study.toml")


def test_nested_values_come_back_as_they_were(tmp_path: Path) -> None:
    value = {"kind": "iid", "num_sites": 3, "words": ["a", 'quo"te'], "on": True}
    axes = [Axis("p", {"x": {"sites.partition": value}})]
    point = chosen.Point("a", ("x",), 1, 0.5, None)
    path = chosen.write(tmp_path, [point], axes, {"method": "tuner", "metric": "accuracy"})
    assert tomllib.loads(path.read_text())["values"]["a"] == {"sites.partition": value}


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ([AXES[1]], "no axis of the name"),
        ([Axis("tuner", {"c": {}})], "nothing was selected"),
        ([Axis("tuner", {"a": {"train": {"learning_rate": 1.0}}})], "sets what was selected"),
    ],
)
def test_what_cannot_be_used_is_refused(axes: list[Axis], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        chosen.use(axes, write(tmp_path))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("a = 1\n")
    with pytest.raises(ConfigError, match="no selected values"):
        chosen.use(AXES, tmp_path / "x.toml")
