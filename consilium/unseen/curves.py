"""Composition: metrics over k. In: predictions of every draw. Out: rows of numbers with intervals and spread.

A value is the mean over the draws of the k images. Its interval is a bootstrap over the site's patients, the same for
all draws and models, with the draws as they are; `sd`, `least` and `greatest` are over the draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from consilium import metrics
from consilium.bootstrap import Array, read, replicates

ZERO, K_SHOT, LOCAL = "zero-shot", "k-shot", "local k-shot"
COMPARED = ((K_SHOT, LOCAL), (K_SHOT, ZERO))
Row = dict[str, Any]
Measured = dict[tuple[str, int], dict[str, Array]]  # model and k -> metric -> replicates of each draw


def rows(table: pd.DataFrame, classes: Sequence[str], bootstrap: int, seed: int) -> list[Row]:
    """One row per split, site, model, k and metric; also of the differences between models, paired by patient and draw.

    `table` has the columns split, site, model, shots, draw, id, group, label and one p.<class> per class.
    """
    found: list[Row] = []
    for (split, site), part in table.groupby(["split", "site"]):
        n, groups = part["id"].nunique(), part["group"].nunique()
        measured: Measured = {
            (str(some["model"].iloc[0]), int(some["shots"].iloc[0])): _draws(some, classes, bootstrap, seed)
            for _, some in part.groupby(["model", "shots"])
        }
        for name, values in [*measured.items(), *_differences(measured)]:
            head = {"split": split, "site": site, "model": name[0], "shots": name[1]}
            found += [{**head, "metric": metric, **_row(value, n, groups)} for metric, value in values.items()]
    return found


def _draws(table: pd.DataFrame, classes: Sequence[str], bootstrap: int, seed: int) -> dict[str, Array]:
    """Every metric of each draw, observed and under each resampling: [draws, 1 + bootstrap]."""
    each = [
        metrics.centred(replicates(read(some, classes, bootstrap, seed)))
        for _, some in table.groupby("draw", sort=True)
    ]
    return {metric: np.stack([values[metric] for values in each]) for metric in each[0] if "." not in metric}


def _differences(measured: Measured) -> Iterator[tuple[tuple[str, int], dict[str, Array]]]:
    for (model, shots), values in measured.items():
        for name, other in COMPARED:
            beside = measured.get((other, shots)) or measured.get((other, 0))
            if model == name and beside is not None:
                yield (f"{name} - {other}", shots), {metric: values[metric] - beside[metric] for metric in values}


def _row(values: Array, n: int, groups: int) -> Row:
    observed = values[:, 0]
    spread = {"sd": float(observed.std(ddof=1)) if len(observed) > 1 else None}
    spread |= {"least": float(observed.min()), "greatest": float(observed.max())}
    return {**metrics.interval(values.mean(axis=0), n, groups), "draws": len(observed), **spread}
