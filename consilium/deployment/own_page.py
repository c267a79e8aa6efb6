"""Composition: a hospital's own page. In: what a run left in the site's folder. Out: report.html, which stays there.

Its numbers come from the predictions that the site wrote at the end of the run, and from its journal, verified anew.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pandas as pd

from consilium import checkpoint, results
from consilium.deployment import files
from consilium.deployment.files import SiteFile
from consilium.deployment.journal import Journal
from consilium.engines.site import Site
from consilium.errors import StateError
from consilium.metrics import without_nan

PREDICTIONS = "predictions.parquet"
Tree = dict[str, Any]


def newest(states: Path) -> str:
    """The run whose end came last; StateError where none has ended here."""
    ended = sorted(states.glob(f"*/{PREDICTIONS}"), key=lambda path: path.stat().st_mtime_ns)
    if not ended:
        raise StateError("no run has ended at this hospital", where=str(states), remedy="the page is made at its end")
    return ended[-1].parent.name


def write(own: SiteFile, site: Site, run: str) -> Path:
    """The page of one run; StateError where it has not ended here, or a file of it cannot be read."""
    state, page = site.folder / run, own.folder / files.PAGE
    if Path(run).name != run or not (state / PREDICTIONS).is_file():  # the coordinator names runs: no way out of here
        raise StateError("this run has not ended here", where=str(state), remedy="the page is made at its end")
    checkpoint.write_json(state / "config.json", {"config": own.config.to_dict()})
    checkpoint.write_json(state / "result.json", without_nan(_result(own, site, run)))
    importlib.import_module("consilium.report.html").render([state], page)
    return page


def _result(own: SiteFile, site: Site, run: str) -> Tree:
    experiment, name = site.experiment, own.name
    table = pd.read_parquet(site.folder / run / PREDICTIONS)
    journal = _journal(own.folder, run)
    ways = {way: sum(visit[key] for visit in journal["visits"]) for way, key in (("up", "left"), ("down", "came_in"))}
    return {
        "kind": "site",
        "run": run,
        **results.head(experiment, [name], {}, remote=True),
        "bytes": {way: {"total": total, "per_site": {name: total}} for way, total in ways.items()},
        "sites": {name: results.site_table(site.data, experiment.task.classes)},
        "metrics": results.trees(table, experiment, [name]),
        "journal": journal,
    }


def _journal(folder: Path, run: str) -> Tree:
    """What the journal says of one run, and how it ends."""
    entries = list(Journal(folder).entries())
    visits = [
        {
            "time": entry["time"],
            "kind": entry["kind"],
            "round": entry["round"],
            "came_in": entry["request"]["bytes"],
            "left": entry["reply"]["bytes"],
            "tensors": len(entry["tensors"]),
            "numbers": len(entry["numbers"]),
            "blanked": entry["blanked"],
            "refused": (entry["failure"] or {}).get("message", ""),
        }
        for entry in entries
        if entry["run"] == run
    ]
    return {"lines": len(entries), "hash": Journal(folder).last(), "visits": visits}
