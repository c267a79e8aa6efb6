"""Composition: what methods do to single sites. In: a group of runs and its baseline. Out: differences at every site,
and how many sites are worse off than with the baseline.

The mean over sites hides a hospital that would have done better by itself. A baseline of sites that train alone makes
these the "sites harmed"; with any other they are sites that a method serves worse.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from consilium.bootstrap import Array
from consilium.metrics import LOWER_IS_BETTER
from consilium.study import statistics
from consilium.study.groups import Group
from consilium.study.statistics import Estimate, estimate


@dataclass(frozen=True)
class Count:
    """A number of sites with the middle 95 % of its replicates; None where undefined."""

    value: int | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Harm:
    """A method beside the baseline, means over the seeds that both have; `refused` says why there is nothing.

    `negative`: sites where the mean difference is to their harm, their number in `count`. `harmed`: those whose whole
    interval is. `corrected`: those whose p-value, after Holm over all methods and sites of the group, is below 0.05.
    """

    method: str
    differences: dict[str, Estimate] = field(default_factory=dict)  # site -> method minus baseline
    p_holm: dict[str, float | None] = field(default_factory=dict)
    count: Count = Count(None)
    negative: list[str] = field(default_factory=list)
    harmed: list[str] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)
    refused: str = ""


def harms(group: Group, baseline: str | None, metric: str) -> list[Harm]:
    """Every other method against the baseline, in their order; nothing where the group has no such method."""
    if baseline not in group.methods:
        return []
    at, sign = group.methods.index(baseline), -1.0 if metric in LOWER_IS_BETTER else 1.0
    found = [_harm(group, index, at, sign) for index in range(len(group.methods)) if index != at]
    tested = [(harm, site, each.p) for harm in found for site, each in harm.differences.items() if each.p is not None]
    for (harm, site, _), p in zip(tested, statistics.holm([p for _, _, p in tested]), strict=True):
        harm.p_holm[site] = p
        if p < 0.05 and site in harm.negative:
            harm.corrected.append(site)
    return found


def _harm(group: Group, index: int, baseline: int, sign: float) -> Harm:
    name, refused = group.methods[index], group.refusal(index, baseline)
    if refused:
        return Harm(name, refused=refused)
    drawn = {site: group.difference(index, baseline, f"site:{site}") for site in group.sites}
    found = {site: estimate(draws, number) for site, (draws, number) in drawn.items() if number}
    known = {site: each for site, each in found.items() if each.value is not None}
    negative = [site for site, each in known.items() if sign * (each.value or 0.0) < 0]
    bound = {site: each.low if sign < 0 else each.high for site, each in known.items()}
    harmed = [site for site in negative if (limit := bound[site]) is not None and sign * limit < 0]
    joint = np.stack([drawn[site][0].joint for site in known]) if known else np.empty((0, 1))
    return Harm(name, found, dict.fromkeys(found), _count(sign * joint, len(negative)), negative, harmed)


def _count(gains: Array, negative: int) -> Count:
    """How many sites lose, [sites, T]; a replicate in which a site has no value says nothing."""
    if not len(gains):
        return Count(None)
    whole = np.isfinite(gains).all(axis=0)
    limits = statistics.percentile(np.where(whole, (gains < 0).sum(axis=0), np.nan))
    return Count(negative, *(limits or (None, None)))
