"""Composition: numbers of a run with stages. In: what result.json says of each stage. Out: the sums, and the stages.

Rounds go on from stage to stage: the first round of a stage is the one after the last round of the stage before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Plain = Mapping[str, Any]
_TOLD = (
    "name",
    "rounds",
    "served_round",
    "parameters",
    "bytes",
    "image_passes",
    "seconds",
    "wire",
    "frozen",
    "metrics",
)


def summed(result: Plain, stages: Sequence[Plain]) -> dict[str, Any]:
    """What takes the place of the last stage's numbers in result.json, and `stages`."""
    earlier = sum(stage["rounds"] for stage in stages[:-1])
    names = result["references"]
    references = {name: {**names[name], **_sums([stage["references"][name] for stage in stages])} for name in names}
    return {
        **_sums(stages),
        "rounds": earlier + stages[-1]["rounds"],
        "served_round": earlier + stages[-1]["served_round"],
        "references": references,
        "wire": {way: union([stage["wire"][way] for stage in stages]) for way in ("up", "down")},
        "numbers": union([stage["numbers"] for stage in stages]),
        "stages": [{key: stage[key] for key in _TOLD} for stage in stages],
    }


def union(tables: Sequence[Sequence[Plain]]) -> list[Any]:
    """Rows of all stages by name, as the last one that has it says it."""
    rows = {row["name"]: row for table in tables for row in table}
    return [rows[name] for name in rows]


def _sums(each: Sequence[Plain]) -> dict[str, Any]:
    ways = ("up", "down")
    return {
        "bytes": {
            **{way: by_site(one["bytes"][way] for one in each) for way in ways},
            "control": {way: sum(one["bytes"]["control"][way] for one in each) for way in ways},
        },
        "image_passes": by_site(one["image_passes"] for one in each),
        "site_seconds": by_site(one["site_seconds"] for one in each),
        "seconds": sum(one["seconds"] for one in each),
    }


def by_site(tables: Iterable[Plain]) -> dict[str, Any]:
    """{total, per_site} of all these."""
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table["per_site"])
    per_site = dict(sorted(total.items()))
    return {"total": sum(per_site.values()), "per_site": per_site}
