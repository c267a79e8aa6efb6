"""Tables of docs/results/deployment.md: `python examples/deployment/summary.py runs/deployment`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from consilium.deployment import files
from consilium.deployment.journal import Journal
from consilium.report.load import Run, Value, load_run
from consilium.report.text import UNDEFINED, bytes_text

METRICS = ("balanced_accuracy", "macro_auroc", "accuracy", "expected_calibration_error")


def main() -> None:
    """Print them, or put them between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="the folder that run.sh made; left out: the faults alone")
    faults = sorted(Path("runs").glob("faults-*.json"))
    parser.add_argument("--faults", type=Path, nargs="+", default=faults, help="what `make faults` wrote, by release")
    parser.add_argument("--into", type=Path, help="the page whose tables are renewed")
    wanted = parser.parse_args()
    parts = {"run": of_run(wanted.out) if wanted.out else "", "faults": of_faults(wanted.faults)}
    if wanted.into is None:
        print("\n\n".join(filter(None, parts.values())))
        return
    page = wanted.into.read_text()
    for name, text in parts.items():
        start, end = f"<!-- {name}: written by summary.py -->", f"<!-- end of {name} -->"
        page = f"{page.split(start)[0]}{start}\n\n{text}\n\n{end}{page.split(end)[1]}" if text else page
    wanted.into.write_text(page)


def of_run(out: Path) -> str:
    """What happened to whom, in words of the script and of the coordinator, and what came of it."""
    folders = out / "folders"
    run = load_run(folders / "coordinator" / "run")
    versions = ", ".join(f"{name} {value}" for name, value in run.result.versions.items())
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; {versions}."
    parts = [f"Commit {commit()}, {machine}", "\n".join(["```text", (out / "story.txt").read_text().strip(), "```"])]
    parts.append(table(["round", *run.result.sites, "seconds", "left hospitals"], rounds(run)))
    for model in run.result.metrics.test:
        parts.append(f"The model `{model}` on each hospital's test images:")
        parts.append(table(["", "images", *METRICS], metrics(run, model)))
    parts.append("What each hospital's journal says, verified line by line:")
    head = ["hospital", "lines", "answered", "refused", "left", "came in", "last hash"]
    parts.append(table(head, journals(folders, run)))
    return "\n\n".join(parts)


def of_faults(paths: Sequence[Path]) -> str:
    """What the tests of faults found with each release of Flower; nothing where they were not run."""
    found = [json.loads(path.read_text()) for path in paths]
    if not found:
        return ""
    columns = ("commit", "cores", "tried", "recovered", "rounds_lost", "bytes_lost")
    rows = [[each["flower"], *(str(each[key]) for key in columns), f"{each['seconds'] / 60:.0f}"] for each in found]
    head = ["Flower", "commit", "cores", "faults tried", "recovered", "rounds lost", "bytes lost", "minutes"]
    releases: dict[str, dict[str, Any]] = {}
    for each in found:  # those of one release together, as of a whole run and of a test that was added or repeated
        releases.setdefault(each["flower"], {}).update(each["faults"])
    names = sorted(set().union(*releases.values()), key=str.lower)
    costs = [[name, *(cost(faults.get(name)) for faults in releases.values())] for name in names]
    said = "Rounds lost by each fault; **no**, where it was not recovered from:"
    return f"{table(head, rows)}\n\n{said}\n\n{table(['fault', *releases], costs)}"


def cost(row: dict[str, Any] | None) -> str:
    """Rounds that a fault cost; undefined where it was not tried."""
    if row is None:
        return UNDEFINED
    return f"{row['rounds_lost']}" if row["recovered"] else "**no**"


def commit() -> str:
    """Of the checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


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
        kept = [log for log in (folders / site / files.LOG).read_text().splitlines() if '"repeated"' in log]
        answered = f"{len(entries) - refused}" + (f", {len(kept)} of them twice" if kept else "")
        last = Journal(folders / site).last()[:16]
        rows.append([site, str(len(entries)), answered, str(refused), *sizes, f"`{last}`"])
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
