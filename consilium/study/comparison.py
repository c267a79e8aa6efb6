"""Composition: what a study finds. In: its groups of runs. Out: estimates, slopes, fronts, paired tests and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from consilium.bootstrap import Array
from consilium.metrics import LOWER_IS_BETTER
from consilium.study import statistics
from consilium.study.groups import COSTS, Group
from consilium.study.harm import Harm, harms
from consilium.study.samples import LEVELS
from consilium.study.statistics import Draws, Estimate, Pooled, estimate, over_seeds

MIN_METHODS = 5  # below this, resampling methods says nothing


@dataclass(frozen=True)
class Slope:
    """The least-squares line of the metric over log10 of a cost, one point per method (its mean over seeds)."""

    cost: str
    subset: str
    methods: list[str]
    change: Estimate  # per tenfold cost; covers patients and seeds, the methods are fixed
    intercept: float | None = None
    explained: float | None = None  # share of the variance between methods
    with_methods: tuple[float, float] | None = None  # interval that also resamples methods
    left_out: list[str] = field(default_factory=list)  # they exchange nothing, or have no value


@dataclass(frozen=True)
class Pair:
    """`first` minus `second` on the same images, mean over the seeds that both have; or why they were not compared."""

    first: str
    second: str
    difference: Estimate
    p_holm: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Front:
    """Methods in order of cost: whether no other is both as cheap and as good, and in what share of replicates."""

    methods: list[str]
    on_front: list[bool]
    share: list[float | None]


@dataclass(frozen=True)
class Ranking:
    """Mean rank over blocks in which every method has a value, 1 is best."""

    blocks: list[str]
    methods: list[str]
    ranks: list[list[float]]  # [blocks][methods]
    left_out: list[str]
    statistic: float | None = None
    p: float | None = None
    smallest_p: float | None = None
    tested_blocks: int = 0  # of Friedman's test: seeds of a group share their patients and count once


@dataclass(frozen=True)
class Findings:
    """All that is found within one group."""

    estimates: dict[str, dict[str, Estimate]]  # method -> level or "site:<name>"
    by_seed: dict[str, dict[str, float | None]]  # method -> seed
    slopes: list[Slope]
    front: Front
    pairs: list[Pair]
    other_pairs: dict[str, list[Pair]]  # of the levels that are not the compared one
    harms: list[Harm]


def findings(group: Group, metric: str, baseline: str | None = None) -> Findings:
    """Every comparison within one group."""
    observed = group.values[group.level][:, :, 0]
    return Findings(
        {name: _estimates(group, index) for index, name in enumerate(group.methods)},
        {
            name: {str(s): _number(observed[index, at]) for at, s in enumerate(group.seeds)}
            for index, name in enumerate(group.methods)
        },
        [_slope(group, cost, *subset) for cost in COSTS for subset in subsets(group)],
        front(group, metric),
        pairs(group, baseline),
        {level: pairs(replace(group, level=level), baseline) for level in LEVELS if level != group.level},
        harms(group, baseline, metric),
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _estimates(group: Group, index: int) -> dict[str, Estimate]:
    count = group.num_seeds[index]
    names = [*LEVELS, *(f"site:{site}" for site in group.sites)]
    return {name: _bounded(estimate(over_seeds(group.values[name][index], group.weights), count)) for name in names}


def _bounded(found: Estimate) -> Estimate:
    """No metric leaves 0 to 1, so its interval does not either."""
    low, high = (None if v is None else min(max(v, 0.0), 1.0) for v in (found.low, found.high))
    return replace(found, low=low, high=high, p=None)


# ------------------------------------------------------------------------------------------------ slopes and front
def subsets(group: Group) -> list[tuple[str, list[str]]]:
    """Names of subsets and the methods that each leaves out; only those that differ."""
    heads, whole = group.marked("head_only"), group.marked("full")
    found: list[tuple[str, list[str]]] = [("all methods", [])]
    found += [("without head-only", heads)] if heads else []
    found += [("without full", whole)] if whole else []
    return found + ([("without head-only and full", [*heads, *whole])] if heads and whole else [])


MIN_DECADES = 0.5  # methods that cost nearly the same say nothing of tenfold the cost


def _slope(group: Group, cost: str, subset: str, without: Sequence[str]) -> Slope:
    x, y = group.log_cost(cost), group.main
    usable = np.isfinite(x) & np.isfinite(y.joint[:, 0])
    kept = [index for index, name in enumerate(group.methods) if usable[index] and name not in without]
    methods = [group.methods[index] for index in kept]
    left_out = [name for index, name in enumerate(group.methods) if not usable[index] and name not in without]
    if len(kept) < 2 or np.ptp(x[kept]) < MIN_DECADES:
        return Slope(cost, subset, methods, Estimate(None), left_out=left_out)
    x, joint, seeds = x[kept], y.joint[kept], y.seeds[kept]
    draws = Draws(statistics.slopes(joint, x), statistics.slopes(seeds, x))
    change = estimate(draws, min(group.num_seeds[index] for index in kept))
    _, intercept, explained = statistics.line(joint[:, 0], x)
    return Slope(
        cost, subset, methods, change, _number(intercept), _number(explained), _with_methods(joint, x), left_out
    )


def _with_methods(joint: Array, x: Array) -> tuple[float, float] | None:
    if len(x) < MIN_METHODS:
        return None
    weights = statistics.method_weights(len(x), joint.shape[1] - 1)
    return statistics.percentile(statistics.slopes(joint, x, weights))


def front(group: Group, metric: str) -> Front:
    """The Pareto front of bytes against the metric; exchanging nothing costs nothing, so such a method takes part."""
    cost, sign = group.mean("bytes"), -1 if metric in LOWER_IS_BETTER else 1
    kept = [index for index in np.argsort(cost, kind="stable") if np.isfinite(cost[index])]
    gain = sign * group.main.joint[kept]
    on = statistics.on_front(cost[kept], gain)
    drawn = [row[1:][np.isfinite(row[1:])] for row in on]
    shares = [float(row.mean()) if len(row) else None for row in drawn]
    return Front([group.methods[index] for index in kept], [bool(row[0] == 1) for row in on], shares)


# ------------------------------------------------------------------------------------------------ paired tests
def pairs(group: Group, baseline: str | None = None) -> list[Pair]:
    """Every pair of methods, those with the baseline first; p-values corrected over all pairs of the group.

    Two or three seeds hardly know how much seeds vary, and by chance some pair of many seems not to vary at all: the
    variance of seeds is therefore taken at least as large as its mean over the pairs of the group.
    """
    order = sorted(range(len(group.methods)), key=lambda index: group.methods[index] != baseline)
    tried = [(a, b) for at, b in enumerate(order) for a in order[at + 1 :]]
    drawn = {pair: group.difference(*pair, group.level) for pair in tried if not group.refusal(*pair)}
    pooled = _pooled(group, list(drawn.values()))
    found = {pair: estimate(*difference, pooled) for pair, difference in drawn.items()}
    tested = {pair: each.p for pair, each in found.items() if each.p is not None}
    corrected = dict(zip(tested, statistics.holm(list(tested.values())), strict=True))
    return [
        Pair(group.methods[a], group.methods[b], found.get((a, b), Estimate(None)), corrected.get((a, b)),
             group.refusal(a, b))
        for a, b in tried
    ]  # fmt: skip


def _pooled(group: Group, drawn: Sequence[tuple[Draws, int]]) -> Pooled | None:
    known = [statistics.seed_variance(draws) * count for draws, count in drawn if count > 1]
    if not known:
        return None
    return Pooled(float(np.mean(known)), max(1, sum(group.num_seeds) - len(group.methods) - len(group.seeds) + 1))


# ------------------------------------------------------------------------------------------------ ranks
def ranking(all_groups: Sequence[Group], metric: str) -> Ranking:
    """Ranks over (group, seed); where that is a single block, over its sites.

    Seeds of a group share their test patients, so Friedman's test takes the mean over seeds: its blocks are groups or,
    of a single group, sites.
    """
    methods = list(dict.fromkeys(name for group in all_groups for name in group.methods))
    blocks = {
        f"{group.name}, seed {seed}": _block(group, group.level, at, methods)
        for group in all_groups
        for at, seed in enumerate(group.seeds)
    }
    if len(blocks) == 1:
        group = all_groups[0]
        blocks = {f"site {site}": _block(group, f"site:{site}", 0, methods) for site in group.sites}
    values = np.stack(list(blocks.values()))
    rows, columns = complete(np.isfinite(values))
    left_out = [name for at, name in enumerate(blocks) if at not in rows]
    left_out += [name for at, name in enumerate(methods) if at not in columns]
    whole, kept = [list(blocks)[at] for at in rows], [methods[at] for at in columns]
    if not whole or len(kept) < 2:
        return Ranking([], [], [], left_out)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    ranked = statistics.ranks(sign * values[np.ix_(rows, columns)])
    apart = sign * _apart(all_groups, kept)
    apart = apart[np.isfinite(apart).all(axis=1)]
    if len(apart) < 2:
        return Ranking(whole, kept, ranked.tolist(), left_out)
    tested = statistics.friedman(statistics.ranks(apart))
    smallest = statistics.smallest_friedman(len(apart), len(kept))
    return Ranking(whole, kept, ranked.tolist(), left_out, *tested, smallest, len(apart))


def _apart(all_groups: Sequence[Group], methods: Sequence[str]) -> Array:
    """[blocks, M] values whose blocks are other patients, or the same under another partition: means over seeds."""
    levels = [(group, group.level) for group in all_groups]
    if len(all_groups) == 1:
        levels = [(group, f"site:{site}") for group in all_groups for site in group.sites]
    return np.stack(
        [
            np.mean([_block(group, level, at, methods) for at in range(len(group.seeds))], axis=0)
            for group, level in levels
        ]
    )


def complete(known: Array) -> tuple[list[int], list[int]]:
    """Rows and columns of a table of truth values that hold no gap: columns with the most gaps are dropped, one by one,
    for as long as the rest has more cells for it."""
    order = np.argsort(-known.sum(axis=0), kind="stable")
    best: tuple[list[int], list[int]] = [], []
    for number in range(1, len(order) + 1):
        columns = sorted(order[:number].tolist())
        rows = np.flatnonzero(known[:, columns].all(axis=1)).tolist()
        if len(rows) * number >= len(best[0]) * len(best[1]):
            best = rows, columns
    return best


def _block(group: Group, level: str, seed: int, methods: Sequence[str]) -> Array:
    here = [group.methods.index(name) if name in group.methods else None for name in methods]
    return np.array([np.nan if at is None else group.values[level][at, seed, 0] for at in here])
