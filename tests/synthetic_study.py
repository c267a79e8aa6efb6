"""A study's folder without training: predictions of made-up models whose skill grows with what they exchange."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consilium import metrics

CLASSES = ("akiec", "bcc", "bkl", "mel", "nv")
METHODS = {"linear": 1_351, "bitfit": 25_700, "lora": 148_807, "full": 5_525_767}  # name -> trained scalars
GROUPS = {"natural": ("rosendahl", "vidir", "vienna"), "dirichlet": ("site_0", "site_1", "site_2")}
ROUNDS, BACKBONE = 10, 5_524_416


def images(group: str, sites: Sequence[str], n: int, split: str = "test") -> pd.DataFrame:
    """Images of a group of runs: the same for all its methods and seeds."""
    rng = np.random.default_rng(len(group))
    site = rng.choice(sites, n)
    label = rng.choice(len(CLASSES), n, p=[0.1, 0.15, 0.2, 0.2, 0.35])
    lesion = [f"{group}-{split}-{s}-{g}" for s, g in zip(site, rng.integers(0, max(2, n // 4), n), strict=True)]
    ids = [f"{group}-{split}-{k:05d}" for k in range(n)]
    return pd.DataFrame({"split": split, "model": "global", "site": site, "id": ids, "group": lesion, "label": label})


def predict(table: pd.DataFrame, skill: float, seed: int) -> pd.DataFrame:
    """Probabilities; hard images are hard for every model, so that models are alike."""
    shared, own = np.random.default_rng(1), np.random.default_rng(seed)
    logits = shared.normal(size=(len(table), len(CLASSES))) + 0.5 * own.normal(size=(len(table), len(CLASSES)))
    logits[np.arange(len(table)), table["label"]] += skill
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return table.assign(**{f"p.{name}": p[:, at] for at, name in enumerate(CLASSES)})


def tidy(run: str, seed: int, split: str, tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for metric, entry in tree.items():
        cells = [(level, "", entry[level]) for level in ("pooled", "mean", "worst")]
        cells += [("site", site, value) for site, value in entry["per_site"].items()]
        rows += [
            {"run": run, "seed": seed, "split": split, "model": "global", "metric": metric, "level": level,
             "site": site, **{key: v[key] for key in ("value", "low", "high", "n")}}
            for level, site, v in cells
        ]  # fmt: skip
    return rows


def result(trained: int, sites: Sequence[str], name: str) -> dict[str, Any]:
    roles = ["head"] if name == "linear" else ["head", name]
    wire = [{"name": f"{role}.weight", "role": role, "bytes": 4 * trained} for role in roles]
    return {"sites": {site: {} for site in sites}, "rounds": ROUNDS, "wire": {"up": wire}, "kept_at_site": []}


def write_study(
    folder: Path,
    *,
    methods: Mapping[str, int] = METHODS,
    groups: Mapping[str, Sequence[str]] = GROUPS,
    seeds: Sequence[int] = (0, 1, 2),
    n: int = 160,
    gain: float = 0.25,
    failed: Mapping[str, str] | None = None,
    missing: Sequence[str] = (),
    silent: Sequence[str] = (),
    **about: Any,
) -> Path:
    """Write a study. `gain` is skill per tenfold parameters; `failed` {run: reason}, `missing` runs, `silent` methods
    exchange nothing; runs are named <group>-<method>-<seed>."""
    rows, results = [], []
    for group, sites in groups.items():
        table = images(group, sites, n)
        for at, (name, trained) in enumerate(methods.items()):
            for seed in seeds:
                run = f"{group}-{name}-{seed}"
                one = {"run": run, "folder": f"runs/{run}", "status": "finished", "error": "", "partition": group,
                       "tuner": name, "seed": seed, "parameters.backbone": BACKBONE, "parameters.trainable": trained,
                       "parameters.exchanged": trained, "seconds": 60.0 + at, "image_passes": 1000}  # fmt: skip
                way = 0 if name in silent else 4 * trained * len(sites) * ROUNDS
                one |= {"bytes.up": way, "bytes.down": way, "bytes.total": 2 * way}
                rows.append(one)
                if run in missing or run in (failed or {}):
                    why = (failed or {}).get(run, "")
                    one |= {"status": "failed" if why else "missing", "error": why, "bytes.total": None}
                    continue
                made = predict(table, 0.4 + gain * np.log10(trained), 1000 * at + seed)
                place = folder / "runs" / run
                place.mkdir(parents=True, exist_ok=True)
                made.to_parquet(place / "predictions.parquet", index=False)
                (place / "result.json").write_text(json.dumps(result(trained, sites, name)))
                results += tidy(run, seed, "test", metrics.metric_tree(made, CLASSES, bootstrap=20))
    head = {
        "name": "synthetic",
        "axes": ["partition", "tuner"],
        "compare": {"method": "tuner", "within": ["partition"], "metric": "balanced_accuracy", "split": "test",
                    "level": "mean", "model": "global", "baseline": "full"},
        "select": None,
        "seeds": list(seeds),
        "versions": {"python": "3.11"},
        "hardware": {"cores": 4},
        "notes": ["reduced grid: 64 px, 1,200 lesions, 3 seeds"],
    }  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "runs.parquet", index=False)
    pd.DataFrame(results or [], columns=list(tidy("", 0, "", {"m": _blank()})[0])).to_parquet(
        folder / "results.parquet"
    )
    (folder / "study.json").write_text(json.dumps({**head, **about}))
    return folder


def _blank() -> dict[str, Any]:
    nothing = dict.fromkeys(("value", "low", "high", "n"))
    return {**dict.fromkeys(("pooled", "mean", "worst"), nothing), "per_site": {}}
