"""The tables of docs/results/personalised.md, from the folder of a finished study.

    python examples/personalised/summary.py runs/personalised-study [runs/personalised-tune]

Prints Markdown. Every number is one of statistics.json, runs.parquet or the runs' events; none is typed by hand.
"""

from __future__ import annotations

import json
import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

LEVELS = {"pooled": "all images", "mean": "mean over sites", "worst": "worst site"}
NUMBERS = {
    "overlap_right": "read (A), relative to chance",
    "overlap_left": "written (B), relative to chance",
    "overlap_received": "read, as received",
    "share_personal": "share of the personal part",
}
PARTS = {
    "label": "the label alone",
    "backbone": "frozen features",
    "shared_adds": "what the shared part adds",
    "personal_adds": "what a personal part adds",
}
MODELS = {"global": "shared part alone", "before_aggregation": "before the last mean", "personal": "as served"}


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> None:
    """A pipe table."""
    print("| " + " | ".join(head) + " |")
    print("| --- |" + " ---: |" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def metric(found: Mapping[str, Any] | None) -> str:
    """A metric with its interval."""
    if not found or found["value"] is None:
        return "-"
    limits = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['value']:.3f}{limits}"


def points(found: Mapping[str, Any], sign: int = 1) -> str:
    """A difference in points, with -1 that of the two turned round."""
    if found["value"] is None:
        return "-"
    if found["low"] is None:
        return f"{100 * sign * found['value']:+.1f}"
    low, high = sorted(100 * sign * found[key] for key in ("low", "high"))
    return f"{100 * sign * found['value']:+.1f} ({low:+.1f} to {high:+.1f})"


def p_value(p: float | None) -> str:
    """A p-value as text."""
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def main_table(found: Mapping[str, Any], runs: pd.DataFrame, axis: str) -> None:
    """Levels, harm and cost of every method."""
    harms = {harm["method"]: harm for harm in found["harms"]}
    costs = runs.groupby(axis)[["parameters.trainable", "bytes.total", "image_passes", "seconds"]].mean()

    def cells(name: str, levels: Mapping[str, Any]) -> list[str]:
        harm, cost = harms.get(name), costs.loc[name] if name in costs.index else None
        count = harm["count"] if harm and not harm["refused"] else None
        known = count and count["value"] is not None
        limits = f" ({count['low']:.0f} to {count['high']:.0f})" if known and count["low"] is not None else ""
        below = f"{count['value']}{limits}" if known else "-"
        surely = "-" if not harm else ", ".join(harm["harmed"]) or "none"
        spent = (
            ["-"] * 3
            if cost is None
            else [
                "-" if pd.isna(cost["bytes.total"]) else f"{cost['bytes.total'] / 1e6:.2f}",
                f"{cost['image_passes']:,.0f}",
                f"{cost['seconds']:.0f}",
            ]
        )
        return [name, *(metric(levels[level]) for level in LEVELS), below, surely, *spent]

    head = [
        "method",
        *LEVELS.values(),
        "sites below local",
        "whole interval below",
        "MB of the run",
        "image passes",
        "seconds",
    ]
    table(head, [cells(name, levels) for name, levels in found["estimates"].items()])


def site_table(found: Mapping[str, Any]) -> None:
    """Every method at every site."""
    sites = [key for key in next(iter(found["estimates"].values())) if key.startswith("site:")]
    rows = [[name, *(metric(levels[site]) for site in sites)] for name, levels in found["estimates"].items()]
    table(["method", *(site.removeprefix("site:") for site in sites)], rows)


def pair_table(found: Mapping[str, Any], own: str, wanted: Sequence[tuple[str, str]]) -> None:
    """Chosen pairs at all levels, with p-values after Holm over all pairs of a level."""
    by_level = {own: found["pairs"], **found["other_pairs"]}

    def cell(level: str, first: str, second: str) -> str:
        for pair in by_level[level]:
            if {pair["first"], pair["second"]} == {first, second}:
                sign = 1 if pair["first"] == first else -1
                return f"{points(pair['difference'], sign)}; {p_value(pair['p_holm'])}"
        return "-"

    known = set(found["estimates"])
    rows = [[f"{a} minus {b}", *(cell(level, a, b) for level in LEVELS)] for a, b in wanted if {a, b} <= known]
    table(["difference", *LEVELS.values()], rows)


def mechanism_table(folder: Path, runs: pd.DataFrame, axis: str) -> None:
    """What the runs logged of their two adapters in the last round: median over sites and seeds; and what the models
    reach without the personal part, before the last mean, and as they are served: all test images, mean over seeds."""
    results = pd.read_parquet(folder / "results.parquet")
    pooled = (results["split"] == "test") & (results["metric"] == "balanced_accuracy") & (results["level"] == "pooled")
    reached = results[pooled].groupby([axis, "model"])["value"].mean()
    rows = []
    for name, own in runs.groupby(axis, sort=False):
        last = [json.loads((folder / run / "events.jsonl").read_text().splitlines()[-1]) for run in own["folder"]]
        sites = [site for event in last for site in event["sites"].values()]
        learned = [site["learned"] for site in sites if site.get("learned")]
        if not learned or "share_personal" not in learned[0]:
            continue
        middle = [f"{statistics.median(each[key] for each in learned):.2f}" for key in NUMBERS]
        models = [f"{reached[name, m]:.3f}" if (name, m) in reached.index else "-" for m in MODELS]
        rows.append([str(name), *middle, *models])
    table(["method", *NUMBERS.values(), *MODELS.values()], rows)


def probe_table(folder: Path, runs: pd.DataFrame, axis: str) -> None:
    """How well a probe tells the site, of runs that `consilium mechanism` was asked about."""
    rows = []
    for run in runs.itertuples():
        path = folder / str(run.folder) / "mechanism.json"
        if not path.is_file():
            continue
        told = json.loads(path.read_text())
        parts = [metric(told["parts"].get(part)) for part in PARTS]
        more = points(told["differences"]["personal_adds - shared_adds"])
        rows.append([f"{getattr(run, axis)}, seed {run.seed}", *parts, more])
    if rows:
        table(["run", *PARTS.values(), "personal minus shared, points"], rows)


def tried_table(path: Path) -> None:
    """What was tried and chosen on validation images."""
    tried = tomllib.loads(path.read_text())["tried"]
    rows = []
    for name in dict.fromkeys(point["method"] for point in tried):
        own = [point for point in tried if point["method"] == name]
        said = [f"{p['try']}: {p['mean']:.3f}" if "mean" in p else f"{p['try']}: failed" for p in own]
        rows.append(
            [name, ", ".join(f"**{text}**" if p["chosen"] else text for text, p in zip(said, own, strict=True))]
        )
    table(["method", "tries, pooled validation balanced accuracy"], rows)


PAIRS = [
    ("fedit", "local"), ("pooled reference", "local"), ("fedper", "fedit"), ("fedper", "local"), ("fedsa", "local"),
    ("fedsa", "fedper"), ("dual_lora", "fedit"), ("dual_head", "dual_lora"), ("dual_head", "fedper"),
    ("dual_head", "fedsa"), ("fedopal_weights", "dual_lora"), ("fedopal_representations", "dual_lora"),
    ("fedopal_hard", "dual_lora"), ("fedopal_head", "dual_head"), ("fedopal_head_left", "dual_head"),
    ("fedopal_head_representations", "dual_head"), ("fedopal_weights", "fedsa"), ("fedopal_head", "fedsa"),
    ("fedopal_head", "local"), ("fedopal_head_left", "fedsa"), ("fedopal_head_left", "local"),
    ("fedopal_head_representations", "fedsa"), ("ditto", "local"), ("ffa", "fedit"), ("feddpa_t", "dual_lora"),
]  # fmt: skip


def main(folder: Path, tuning: Path | None) -> None:
    """Print every table."""
    numbers = json.loads((folder / "statistics.json").read_text())
    runs = pd.read_parquet(folder / "runs.parquet")
    print(f"{len(runs)} runs, {runs['seconds'].sum() / 3600:.1f} hours of rounds\n")
    done, axis = runs[runs["status"] == "done"], numbers["compare"]["method"]
    for name, found in numbers["groups"].items():
        print(f"## {name}, {len(done)} runs\n")
        main_table(found, done, axis)
        site_table(found)
        pair_table(found, numbers["compare"]["level"], PAIRS)
    mechanism_table(folder, done, axis)
    probe_table(folder, done, axis)
    if tuning is not None:
        tried_table(tuning / "selected.toml")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
