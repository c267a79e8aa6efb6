"""Stage 10, report. In: what hospitals sent of their metrics. Out: the same in the words of a simulation's result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from consilium.report.load import Plain, Value


class Sent(Plain):
    """What result.json of a run across hospitals says in its own way: {split: {site: {model: {metric: value}}}}."""

    metrics: dict[str, dict[str, dict[str, dict[str, Value]]]] = Field(default_factory=dict)
    num_examples: dict[str, int] = Field(default_factory=dict)
    untested: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """The same as a simulation says it, with nothing pooled over images."""
        trees = {split: _by_model(sites) for split, sites in self.metrics.items()}
        away = [f"{site} was away at the end: its test images were not read" for site in self.untested]
        sizes = {site: {"train": {"n": n}, **self._tested(site)} for site, n in sorted(self.num_examples.items())}
        return {"metrics": trees, "sites": sizes, "warnings": [*self.warnings, *away]}

    def _tested(self, site: str) -> dict[str, dict[str, int]]:
        """The most images that any of a site's numbers comes from."""
        found = {}
        for split in ("val", "test"):
            models = self.metrics.get(split, {}).get(site, {}).values()
            found[split] = {"n": max([value.n or 0 for tree in models for value in tree.values()] or [0])}
        return found


def _by_model(sites: Mapping[str, Mapping[str, Mapping[str, Value]]]) -> dict[str, dict[str, Any]]:
    """{model: {metric: entry}}; the mean is over the sites whose value is known, each weighing the same."""
    found: dict[str, dict[str, dict[str, Value]]] = {}
    for site, models in sites.items():
        for model, tree in models.items():
            for metric, value in tree.items():
                found.setdefault(model, {}).setdefault(metric, {})[site] = value
    return {model: {metric: _entry(metric, values) for metric, values in tree.items()} for model, tree in found.items()}


def _entry(metric: str, values: Mapping[str, Value]) -> dict[str, Any]:
    from consilium.metrics import LOWER_IS_BETTER

    known = {site: value.value for site, value in sorted(values.items()) if value.value is not None}
    mean: dict[str, Any] = {"value": math.fsum(known.values()) / len(known) if known else None, "sites": len(known)}
    worst: dict[str, Any] = {"value": None}
    if known:
        site = (max if metric in LOWER_IS_BETTER else min)(known, key=lambda name: known[name])
        worst = {**values[site].model_dump(), "site": site}
    per_site = {site: value.model_dump() for site, value in values.items()}
    return {"pooled": {"value": None}, "mean": mean, "worst": worst, "per_site": per_site}
