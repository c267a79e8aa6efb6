"""The section of a study on sites that took no part: means over sites and seeds, gaps, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from consilium.report.text import UNDEFINED
from consilium.study import page
from consilium.study.loading import Study, load
from consilium.study.statistics import t_quantile
from consilium.study.unseen import estimate, sections, shots_of
from tests.synthetic_study import write_study

SITES = {"natural": "vienna", "dirichlet": "rosendahl"}


def with_unseen(folder: Path, models: Sequence[str], skip: Sequence[tuple[str, str]] = ()) -> Path:
    """A study in which each group's runs left another site out; `skip`: (method, model) that were not measured."""
    write_study(folder, seeds=(0, 1))
    runs = pd.read_parquet(folder / "runs.parquet")
    results = pd.read_parquet(folder / "results.parquet")
    rows: list[dict[str, Any]] = []
    for at, run in enumerate(runs.to_dict("records")):
        for model in models:
            if (run["tuner"], model) not in skip:
                value = 0.4 + 0.01 * at + 0.001 * shots_of(model)
                head = {"run": run["run"], "seed": run["seed"], "split": "unseen", "model": model, "level": "site"}
                rows.append({**head, "metric": "balanced_accuracy", "site": SITES[run["partition"]], "value": value,
                             "low": value - 0.1, "high": value + 0.1, "n": 50})  # fmt: skip
    pd.concat([results, pd.DataFrame(rows)], ignore_index=True).to_parquet(folder / "results.parquet")
    return folder


MODELS = ("zero-shot", "1-shot", "4-shot", "local 1-shot", "local 4-shot", "1-shot - local 1-shot",
          "4-shot - local 4-shot", "1-shot - zero-shot", "4-shot - zero-shot")  # fmt: skip


@pytest.mark.parametrize(("model", "shots"), [("zero-shot", 0), ("16-shot", 16), ("local 64-shot", 64)])
def test_k_stands_in_the_name_of_a_model(model: str, shots: int) -> None:
    assert shots_of(model) == shots


def test_the_mean_is_over_sites_and_seeds_and_its_interval_over_patients_and_seeds() -> None:
    values = {("a", 0): 0.5, ("a", 1): 0.7, ("b", 0): 0.3, ("b", 1): 0.5}
    rows = pd.DataFrame([{"site": site, "seed": seed, "value": value, "low": value - 0.1, "high": value + 0.1}
                         for (site, seed), value in values.items()])  # fmt: skip
    found = estimate(rows)
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert t_quantile(0.95, 1e6) == pytest.approx(1.959964, abs=1e-4)
    patients, seeds = 2 * (0.2 / (2 * 1.959964)) ** 2 / 4, np.var([0.4, 0.6], ddof=1) / 2
    half = t_quantile(0.95, (patients + seeds) ** 2 / seeds**2) * math.sqrt(patients + seeds)
    assert found.high == pytest.approx(0.5 + half)
    assert estimate(rows.iloc[1:]) is None, "a site that lacks a seed makes no fair mean"
    alone = estimate(rows[rows["seed"] == 0].assign(low=None))
    assert alone is not None
    assert (alone.value, alone.low) == (pytest.approx(0.4), None)


def test_the_page_gathers_the_curves_of_all_sites_that_were_left_out(tmp_path: Path) -> None:
    folder = with_unseen(tmp_path, MODELS, skip=[("lora", "zero-shot"), ("lora", "1-shot - zero-shot")])
    study = load(folder)
    [section] = sections(study, "Balanced accuracy")
    figure, table = section.blocks
    assert figure.legend == [*study.methods, "alone"]  # type: ignore[union-attr]
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}  # type: ignore[union-attr]
    own = study.results.merge(study.runs[["run", "method"]], on="run").query("method == 'bitfit' and model == '4-shot'")
    assert cells["bitfit"][2] == f"{own['value'].mean():.3f}"
    assert cells["lora"][0] == cells["alone"][0] == UNDEFINED
    page.write(folder)
    assert "Sites that took no part" in (folder / "report.html").read_text()
    assert (folder / "tables" / "balanced-accuracy-at-unseen-sites-by-images-of-each-class.md").is_file()


def test_axes_other_than_the_site_stay_apart(tmp_path: Path) -> None:
    study = load(with_unseen(tmp_path, MODELS))
    same = study.results.assign(site=study.results["site"].replace({"rosendahl": "vienna"}))
    [section] = sections(Study(study.folder, study.about, study.compare, study.runs, same), "Balanced accuracy")
    assert len(section.blocks) == 4
    assert {"natural", "dirichlet"} <= set(" ".join(b.caption for b in section.blocks).replace(",", " ").split())  # type: ignore[union-attr]


def test_a_study_without_unseen_sites_has_no_such_section(tmp_path: Path) -> None:
    write_study(tmp_path)
    assert sections(load(tmp_path), "Balanced accuracy") == []
