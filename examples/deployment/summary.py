"""Tables of docs/results/deployment.md: `python examples/deployment/summary.py runs/deployment [runs/faults.json]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from consilium.deployment import hospital
from consilium.deployment.journal import Journal
from consilium.report.load import Run, Value, load_run
from consilium.report.text import UNDEFINED, bytes_text

METRICS = ("balanced_accuracy", "macro_auroc", "accuracy", "expected_calibration_error")


def main(out: Path, faults: Path | None) -> None:
    """Print them."""
    folders = out / "folders"
    run = load_run(folders / "coordinator" / "run")
    print("```text", (out / "story.txt").read_text().strip(), "```\n", sep="\n")
    print(table(["round", *run.result.sites, "seconds", "left hospitals"], rounds(run)))
    for model in run.result.metrics.test:
        print(f"\nThe model `{model}` on each hospital's test images:\n")
        print(table(["", "images", *METRICS], metrics(run, model)))
    print("\n" + table(["hospital", "lines", "answered", "refused", "left", "came in", "hash"], journals(folders, run)))
    if faults is not None and faults.is_file():
        found = json.loads(faults.read_text())["faults"]
        keys = ("recovered", "rounds_lost", "bytes_lost")
        print(
            "\n" + table(["fault", *keys], [[name, *(str(each[key]) for key in keys)] for name, each in found.items()])
        )


def rounds(run: Run) -> list[list[str]]:
    """Who did what in each round."""
    rows = []
    for event in run.events:
        states = [event.sites[site].status.replace("ok", "replied") for site in run.result.sites]
        seconds, left = f"{event.seconds or 0:.0f}", bytes_text(sum(event.bytes.get("up", {}).values()))
        rows.append([str(event.round), *states, seconds, left])
    full = [event.seconds or 0 for event in run.events if all(each.status == "ok" for each in event.sites.values())]
    return [*rows, ["median of rounds with everybody", *[""] * len(run.result.sites), f"{median(full):.0f}", ""]]


def metrics(run: Run, model: str) -> list[list[str]]:
    """Values with intervals, and their means over hospitals."""
    tree = run.result.metrics.test[model]
    rows = []
    for site, size in run.result.sites.items():
        cells = [text(tree[name].per_site.get(site)) if name in tree else "" for name in METRICS]
        rows.append([site, str(size.test.n), *cells])
    for part in ("mean", "worst"):
        rows.append([part, "", *(text(getattr(tree[name], part)) if name in tree else "" for name in METRICS)])
    return rows


def text(value: Value | None) -> str:
    """A number with its interval."""
    if value is None or value.value is None:
        return UNDEFINED
    known = value.low is not None and value.high is not None
    return f"{value.value:.3f}" + (f" ({value.low:.3f} to {value.high:.3f})" if known else "")


def journals(folders: Path, run: Run) -> list[list[str]]:
    """What each hospital's journal says, checked line by line."""
    rows = []
    for site in run.result.sites:
        entries = list(Journal(folders / site).entries())
        refused = sum(entry["failure"] is not None for entry in entries)
        sizes = [bytes_text(sum(entry[way]["bytes"] for entry in entries)) for way in ("reply", "request")]
        kept = [log for log in (folders / site / hospital.LOG).read_text().splitlines() if '"repeated"' in log]
        answered = f"{len(entries) - refused}" + (f", {len(kept)} of them twice" if kept else "")
        last = Journal(folders / site).last()[:16]
        rows.append([site, str(len(entries)), answered, str(refused), *sizes, f"`{last}`"])
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
