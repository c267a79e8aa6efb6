"""Write the Markdown tables of a grid of runs. In: run folders. Out: Markdown on standard output.

    python scripts/results_table.py RUN... > docs/results/tables.md

One row per configuration and model; values are means over seeds, with the range over seeds where there are several; the
second table has every seed with its own bootstrap interval.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = tuple[str, str, int, Mapping[str, Any]]  # configuration, model, seed, metric tree of the test split
METRICS = ("balanced_accuracy", "macro_auroc")
PLACES = ("pooled", "mean", "worst")


def rows_of(folder: Path) -> list[Row]:
    """The run's own models and its references."""
    result = json.loads((folder / "result.json").read_text())
    tuner, strategy = names(folder)
    found: list[Row] = []
    for model, tree in result["metrics"]["test"].items():
        if not (model == "personal" and "global" in result["metrics"]["test"]):
            found.append((tuner, f"{strategy}, {model.replace('_', ' ')}", result["seed"], tree))
    for name, reference in result["references"].items():
        found.append((tuner, f"{name} reference", result["seed"], reference["metrics"]["test"]["personal"]))
    return found


def names(folder: Path) -> tuple[str, str]:
    """Tuner and strategy of a run folder."""
    config = json.loads((folder / "config.json").read_text())["config"]
    return "+".join(table["name"] for table in config["tuner"]), config["strategy"]["name"]


def cell(values: Sequence[float]) -> str:
    """Mean, and the range over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    return f"{mean:.3f}" if len(known) == 1 else f"{mean:.3f} ({min(known):.3f} to {max(known):.3f})"


def interval(value: Mapping[str, Any]) -> str:
    """One estimate with its interval."""
    if value["value"] is None:
        return "-"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def over_seeds(rows: Sequence[Row]) -> Iterable[str]:
    """Means over seeds."""
    heads = [f"{metric.replace('_', ' ')}, {place}" for metric in METRICS for place in PLACES]
    yield table_line(["tuner", "model", "seeds", *heads])
    yield table_line(["---"] * (3 + len(heads)))
    for tuner, model in sorted({(row[0], row[1]) for row in rows}):
        mine = {row[2]: row[3] for row in rows if row[:2] == (tuner, model)}  # a reference shared by runs counts once
        cells = [cell([tree[m][p]["value"] for tree in mine.values()]) for m in METRICS for p in PLACES]
        yield table_line([tuner, model, str(len(mine)), *cells])


def per_site(rows: Sequence[Row]) -> Iterable[str]:
    """Every seed, every site, with intervals."""
    sites = sorted({site for row in rows for site in row[3]["balanced_accuracy"]["per_site"]})
    yield table_line(["tuner", "model", "seed", "pooled", *sites])
    yield table_line(["---"] * (4 + len(sites)))
    for tuner, model, seed in sorted({row[:3] for row in rows}):
        tree = next(row[3] for row in rows if row[:3] == (tuner, model, seed))["balanced_accuracy"]
        yield table_line([tuner, model, str(seed), interval(tree["pooled"]),
                          *(interval(tree["per_site"][site]) for site in sites)])  # fmt: skip


def costs(folders: Sequence[Path]) -> Iterable[str]:
    """What each run trained, sent and took."""
    yield table_line(["run", "trained", "exchanged", "bytes up", "bytes down", "image passes", "seconds", "harmed"])
    yield table_line(["---"] * 8)
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        harmed = result.get("sites_harmed", {})
        parameters, sent, passes = result["parameters"], result["bytes"], result["image_passes"]["total"]
        numbers = [parameters["trainable"], parameters["exchanged"], sent["up"]["total"], sent["down"]["total"], passes]
        unknown = "unknown" if harmed.get("count") is None else "none"
        last = [f"{result['seconds']:.0f}", ", ".join(harmed.get("sites", [])) or unknown]
        yield table_line([folder.name, *(f"{number:,}" for number in numbers), *last])


def table_line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> None:
    """Print the three tables."""
    folders = [Path(argument) for argument in arguments]
    rows = [row for folder in folders for row in rows_of(folder)]
    titles = ("Test split, mean over seeds (range)", "Balanced accuracy per seed and site, 95 % interval", "Cost")
    for title, lines in zip(titles, (over_seeds(rows), per_site(rows), costs(folders)), strict=True):
        print(f"## {title}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
