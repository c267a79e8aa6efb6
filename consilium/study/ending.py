"""Composition: what is said of a study. In: a study before or after its runs. Out: its costs, or how its runs ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consilium import config_file
from consilium.study.axes import named
from consilium.study.chosen import FILE
from consilium.study.collect import Collection
from consilium.study.conduct import Options, examine, resources
from consilium.study.plan import plan
from consilium.study.prepare import Job
from consilium.study.runner import room_here


def summary(made: Collection) -> dict[str, Any]:
    """The outcome for programs."""
    rows = [
        {"run": job.run, "what": job.words, "folder": str(made.folders[job.run]), "error": made.outcomes[job.run].error}
        | {"status": made.outcomes[job.run].status, "log": str(made.out / "logs" / f"{job.run}.log")}
        for job in made.jobs
    ]
    return {
        "name": made.plan.study.name,
        "folder": str(made.out),
        "report": str(made.out / "report.html"),
        "selected": str(made.out / FILE) if made.selects else None,
        "at_edge": _at_edge(made) if made.selects else {},
        "done": made.count("done"),
        "failed": [row for row in rows if row["status"] == "failed"],
        "refused": [row for row in rows if row["status"] == "refused"],
        "excluded": [dict(cell) for cell in made.plan.excluded],
        "warnings": list(made.warnings),
    }


def text(made: Collection) -> str:
    """The outcome for people."""
    found = summary(made)
    lines = [f"{found['done']} runs done, {len(found['failed'])} failed, {len(found['refused'])} refused"]
    lines += [f"refused: {text}" for text in dict.fromkeys(_brief(row) for row in found["refused"])]
    for row in found["failed"]:
        lines += [f"failed: {_brief(row)}", f"  log: {row['log']}"]
    lines += _selected(made) if made.selects else []
    return "\n".join([*lines, f"tables: {made.out}", f"report: {found['report']}"])


def _at_edge(made: Collection) -> dict[str, list[str]]:
    """Keys whose chosen value is the first or the last tried, for each method."""
    found: dict[str, list[str]] = config_file.read(made.out / FILE)["at_edge"]
    return {method: keys for method, keys in found.items() if keys}


def _selected(made: Collection) -> list[str]:
    edges = [f"{method}: {', '.join(keys)}" for method, keys in _at_edge(made).items()]
    warning = [f"warning: chosen at an end of the searched range, so search wider: {'; '.join(edges)}"] if edges else []
    return [f"selected: {made.out / FILE}", *warning]


def _brief(row: dict[str, Any]) -> str:
    return f"{row['what']}: {' '.join(str(row['error']).split())}"


def foretell(file: Path, overrides: Sequence[str], options: Options) -> dict[str, Any]:
    """What a study would take; nothing is trained or written."""
    planned = plan(file, overrides)
    jobs, warnings = examine(planned, options.quiet)
    able = [job for job in jobs if not job.refused]
    room = room_here(resources(planned, options), able)
    first = {named(job.settings): job for job in reversed(jobs)}
    return {
        "name": planned.study.name,
        "runs": len(able),
        "seeds": list(planned.study.seeds),
        "room": {"runs": room.runs, "cores": room.cores, "memory_bytes": room.memory_bytes},
        "image_passes": sum(job.facts.image_passes for job in able if job.facts is not None),
        "variants": {name: _costs(job) for name, job in reversed(first.items()) if not job.refused},
        "refused": {name: job.refused for name, job in first.items() if job.refused},
        "excluded": [named(cell) for cell in planned.excluded],
        "warnings": warnings,
    }


def _costs(job: Job) -> dict[str, Any]:
    assert job.facts is not None
    facts = job.facts
    return {
        "trainable": facts.parameters["trainable"],
        "exchanged": facts.parameters["exchanged"],
        "bytes": sum(facts.bytes.values()),
        "image_passes": facts.image_passes,
        "memory_bytes": facts.memory_bytes,
        "cores": facts.cores,
    }
