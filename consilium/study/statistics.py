"""Composition: the study's statistics. In: arrays over methods, seeds and replicates. Out: estimates with intervals,
slopes, Pareto fronts, ranks and corrected p-values.

Names of sizes: M methods, S seeds, T = 1 + replicates; entry 0 of a replicate axis is the observed value. Two things
vary at random: patients (replicates that `bootstrap` drew) and seeds (`seed_weights`). Nothing here needs SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from consilium import seeds
from consilium.bootstrap import Array, divide

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its interval and the p-value of being zero; None where undefined. `df` is None where it is huge."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    se: float | None = None
    df: float | None = None
    num_seeds: int = 0


@dataclass(frozen=True)
class Draws:
    """A statistic under both sources of chance, [..., T], and with the patients as they are, [..., T]."""

    joint: Array
    seeds: Array


def seed_weights(num_seeds: int, replicates: int, seed: int = 0) -> Array:
    """Share of each seed in each replicate, [T, S]; row 0 is the plain mean.

    S - 1 of the S seeds are drawn with replacement: the variance of a resampled mean is then the unbiased one (Rao and
    Wu, JASA 1988), where S of S would understate it by (S - 1) / S, a third with three seeds.
    """
    weights = np.full((1 + replicates, num_seeds), 1 / num_seeds)
    if num_seeds > 1:
        generator = seeds.numpy_generator(seed, purpose="study.seeds")
        drawn = generator.multinomial(num_seeds - 1, np.full(num_seeds, 1 / num_seeds), replicates)
        weights[1:] = drawn / (num_seeds - 1)
    return weights


def over_seeds(values: Array, weights: Array) -> Draws:
    """Mean over the seeds that have a value: [..., S, T] to [..., T]; weights [T, S] are shared by all methods."""
    observed = np.broadcast_to(values[..., :1], values.shape)
    return Draws(_weighted(values, weights), _weighted(observed, weights))


def _weighted(values: Array, weights: Array) -> Array:
    known = ~np.isnan(values[..., :1]) & np.ones(values.shape, dtype=bool)  # a seed is there or not, in all replicates
    total = (np.where(known, values, 0) * weights.T).sum(axis=-2)
    return divide(total, (known * weights.T).sum(axis=-2))


@dataclass(frozen=True)
class Pooled:
    """Variance of one run over seeds as many estimates together know it, and how many degrees of freedom that has."""

    variance: float
    df: float


def estimate(draws: Draws, num_seeds: int, pooled: Pooled | None = None) -> Estimate:
    """The observed value +- Student's t times the standard deviation of the joint replicates.

    Degrees of freedom after Satterthwaite: S - 1 where only seeds vary, ever more as the share of the patients in the
    variance grows (theirs count as infinite). With `pooled`, the variance of seeds is not taken smaller than that. No
    interval where less than half of the replicates have a value.
    """
    value = float(draws.joint[0])
    drawn = draws.joint[1:][np.isfinite(draws.joint[1:])]
    if not math.isfinite(value):
        return Estimate(None, num_seeds=num_seeds)
    if 2 * len(drawn) < len(draws.joint) - 1 or len(drawn) < 2:
        return Estimate(value, num_seeds=num_seeds)
    variance, df = _spread(float(drawn.var()), seed_variance(draws), num_seeds, pooled)
    se = math.sqrt(variance)
    if se < 1e-12:
        return Estimate(value, value, value, se=0.0, num_seeds=num_seeds)
    half = t_quantile(LEVEL, df) * se
    p = t_two_sided(value / se, df)
    return Estimate(value, value - half, value + half, p, se, df if df < 1e4 else None, num_seeds)


def seed_variance(draws: Draws) -> float:
    """Variance of a mean over seeds, from the replicates in which the patients stay as they are."""
    alone = draws.seeds[1:][np.isfinite(draws.seeds[1:])]
    return float(alone.var()) if len(alone) else 0.0


def _spread(variance: float, of_seeds: float, num_seeds: int, pooled: Pooled | None) -> tuple[float, float]:
    """Variance and degrees of freedom."""
    df: float = num_seeds - 1
    if pooled and pooled.variance / num_seeds > of_seeds:
        variance += pooled.variance / num_seeds - of_seeds
        of_seeds, df = pooled.variance / num_seeds, pooled.df
    share = of_seeds / variance if variance else 0.0
    return variance, max(1.0, df / share**2) if share > 1e-6 and df else math.inf


def t_two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) of Student's t with any positive number of degrees of freedom."""
    if df > 1e4:
        return math.erfc(abs(t) / math.sqrt(2))
    angle = math.atan(abs(t) / math.sqrt(df))  # t = sqrt(df) tan(a) makes the density cos(a)^(df - 1), bounded
    grid = np.linspace(0.0, angle, 1001)
    inside = float(np.trapezoid(np.cos(grid) ** (df - 1), grid))
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return min(max(1 - 2 * scale * inside, 0.0), 1.0)


def t_quantile(level: float, df: float) -> float:
    """The t that holds `level` of the distribution between -t and t, by bisection."""
    low, high = 0.0, 1e3
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > 1 - level else (low, middle)
    return (low + high) / 2


# ------------------------------------------------------------------------------------------------ slope
def slopes(y: Array, x: Array, weights: Array | None = None) -> Array:
    """Least-squares slope of y [M, T] on x [M] in each replicate, [T]; NaN where x does not vary.

    `weights` [T, M]: how often each method counts, once each where left out.
    """
    w = np.ones(y.shape[::-1]) if weights is None else weights
    centre = divide(w @ x, w.sum(axis=1))
    gap = x[None, :] - centre[:, None]  # [T, M]
    spread = (w * gap**2).sum(axis=1)
    return divide((w * gap * y.T).sum(axis=1), np.where(spread < 1e-12, 0, spread))


def line(y: Array, x: Array) -> tuple[float, float, float]:
    """Slope, intercept and the share of the variance of y [M] that the line on x [M] explains."""
    slope = float(slopes(y[:, None], x)[0])
    intercept = float(y.mean() - slope * x.mean())
    rest, total = float(((y - intercept - slope * x) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    return slope, intercept, 1 - rest / total if total > 0 else math.nan


def method_weights(num_methods: int, replicates: int, seed: int = 0) -> Array:
    """How often each replicate draws each method, [T, M]; row 0 is once each."""
    generator = seeds.numpy_generator(seed, purpose="study.methods")
    drawn = generator.multinomial(num_methods, np.full(num_methods, 1 / num_methods), replicates)
    return np.concatenate([np.ones((1, num_methods)), drawn])


def percentile(draws: Array) -> tuple[float, float] | None:
    """The middle 95 % of the replicates [T]; None where less than half of them have a value."""
    known = draws[1:][np.isfinite(draws[1:])]
    if len(known) < 2 or 2 * len(known) < len(draws) - 1:
        return None
    low, high = np.percentile(known, [50 - 50 * LEVEL, 50 + 50 * LEVEL]).tolist()
    return low, high


# ------------------------------------------------------------------------------------------------ front and ranks
def on_front(cost: Array, gain: Array) -> Array:
    """1.0 where no other method costs as little or less and gains as much or more: cost [M], gain [M, T] to [M, T]."""
    cheaper = cost[None, :, None] <= cost[:, None, None]
    better = gain[None, :, :] >= gain[:, None, :]
    strictly = (cost[None, :, None] < cost[:, None, None]) | (gain[None, :, :] > gain[:, None, :])
    dominated = (cheaper & better & strictly).any(axis=1)
    return np.where(np.isnan(gain), np.nan, ~dominated)


def ranks(values: Array) -> Array:
    """Rank of each method in each block [blocks, M], 1 for the largest value; equal values share their mean rank."""
    above = (values[:, None, :] > values[:, :, None]).sum(axis=2)
    equal = (values[:, None, :] == values[:, :, None]).sum(axis=2)
    return np.asarray(above + (equal + 1) / 2, dtype=np.float64)


def friedman(ranked: Array, permutations: int = 9999, seed: int = 0) -> tuple[float, float]:
    """Friedman's statistic, corrected for ties, of ranks [blocks, M], and its p-value from permuted blocks.

    Permutation within blocks is exact for any number of blocks, where the chi-squared approximation needs many.
    """
    num_blocks, num_methods = ranked.shape
    spread = float(((ranked - (num_methods + 1) / 2) ** 2).sum())
    if spread == 0:
        return 0.0, 1.0
    scale = num_blocks**2 * (num_methods - 1) / spread
    generator = seeds.numpy_generator(seed, purpose="study.friedman")

    def statistic(sums: Array) -> Array:
        return np.asarray(scale * ((sums / num_blocks - (num_methods + 1) / 2) ** 2).sum(axis=-1))

    drawn = sum(generator.permuted(np.tile(block, (permutations, 1)), axis=1) for block in ranked)
    observed = float(statistic(ranked.sum(axis=0)))
    reached = int((statistic(np.asarray(drawn)) >= observed - 1e-9).sum())
    return observed, (1 + reached) / (1 + permutations)


def smallest_friedman(num_blocks: int, num_methods: int, permutations: int = 9999) -> float:
    """The smallest p-value that a permutation within blocks can reach: all blocks agree."""
    return float(max(1 / (1 + permutations), float(math.factorial(num_methods)) ** -(num_blocks - 1)))


def smallest_sign_flip(num_pairs: int) -> float:
    """The smallest two-sided p-value of a sign-flip or Wilcoxon test over this many pairs: all of one sign."""
    return float(min(1.0, 2.0 ** (1 - num_pairs)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scand. J. Stat. 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for position, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[index]))
        corrected[index] = highest
    return corrected
