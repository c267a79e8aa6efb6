"""All benchmarks, one after another: `python -m benchmarks [--only round,flower] [--quick]`.

Prints a table, writes every raw sample to `benchmarks/results.json`, and renews the tables and figures of
docs/results/performance.md. A quick look writes to `runs/bench/quick.json` and leaves the page alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import job, page
from benchmarks.frame import Result, Row, Scale, Skipped
from benchmarks.measure import ENVIRONMENT, ROOT

MODULES = {
    "limit": "limit",
    "round": "rounds",
    "flower": "flower",
    "deepcopy": "copies",
    "prefix": "prefix",
    "data": "data_path",
    "workers": "workers",
    "memory": "memory",
    "combine": "combine",
    "start": "start",
    "wire": "wire",
    "stacked": "stacked",
    "growth": "growth",
    "deployment": "deployment",
}
PACKAGES = ("torch", "timm", "peft", "numpy", "flwr", "ray", "consilium")


def main(arguments: list[str]) -> int:
    """Exit code 1 where a benchmark failed; a target that is missed is a result, not a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help=f"some of: {', '.join(MODULES)}")
    parser.add_argument("--quick", action="store_true", help="small jobs, one repeat: a look, no results")
    wanted = parser.parse_args(arguments)
    names = [name for name in wanted.only.split(",") if name] or list(MODULES)
    unknown = sorted(set(names) - set(MODULES))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: there are {', '.join(MODULES)}")
    torch.set_num_threads(1)
    os.environ.update(ENVIRONMENT)
    target = job.FOLDER / "quick.json" if wanted.quick else page.RESULTS
    failed = run(names, Scale(wanted.quick), target)
    if not wanted.quick:
        page.write()
    return int(failed)


def run(names: Iterable[str], scale: Scale, target: Path) -> bool:
    """Run some benchmarks, keeping earlier results of others in `target`; whether one failed."""
    found: dict[str, Any] = json.loads(target.read_text()) if target.is_file() else {}
    console, failed = Console(), False
    for name in names:
        console.print(f"[bold]{name}[/bold] ...")
        entry = one(name, scale)
        failed = failed or "failed" in entry
        found[name] = entry
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({key: found[key] for key in MODULES if key in found}, indent=1) + "\n")
        show(console, name, entry)
    return failed


def one(name: str, scale: Scale) -> dict[str, Any]:
    """One benchmark as plain JSON values, with the machine it ran on and how long it took."""
    module = importlib.import_module(f"benchmarks.{MODULES[name]}")
    entry: dict[str, Any] = {"title": module.TITLE, "machine": machine(), "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"}
    started = time.perf_counter()
    try:
        result: Result = module.run(scale)
        entry |= result.to_dict()
    except Skipped as reason:
        entry |= {"rows": [], "skipped": str(reason)}
    except Exception as error:
        entry |= {"rows": [], "failed": f"{type(error).__name__}: {error}"}
    return {**entry, "seconds": round(time.perf_counter() - started, 1)}


def machine() -> dict[str, Any]:
    """Hardware, versions, threads and load."""
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "versions": versions,
        "threads": "1 per worker (OMP_NUM_THREADS=1) unless a row says otherwise",
        "load": [round(value, 2) for value in os.getloadavg()],
        "commit": _commit(),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def show(console: Console, name: str, entry: dict[str, Any]) -> None:
    """The table of one benchmark."""
    if entry.get("skipped") or entry.get("failed"):
        console.print(f"  {'skipped' if 'skipped' in entry else 'failed'}: {entry.get('skipped') or entry['failed']}")
        return
    table = Table("what", "target", "measured", "met", title=f"{name}: {entry['title']} ({entry['seconds']:.0f} s)")
    for row in map(page.row, entry["rows"]):
        table.add_row(*cells(row))
    console.print(table)


def cells(row: Row) -> tuple[str, str, str, str]:
    """One row in words."""
    met = {None: "", True: "[green]yes[/green]", False: "[red]no[/red]"}[row.met]
    return (f"{row.what} ({row.note})" if row.note else row.what, page.target(row), page.measured(row), met)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
