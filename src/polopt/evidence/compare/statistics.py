"""Statistics of scores over seeds: what a few runs say about a method, with intervals that hold for few runs.

A seed is the unit everywhere: a run gives one number, and only runs are resampled, never episodes.

Intervals of the interquartile mean (IQM) come from a stratified bootstrap over seeds. The usual percentile bootstrap (and BCa)
of few seeds is too narrow, so it is widened: with at least five degrees of freedom the percentiles are taken further out
(Hesterberg's expanded percentiles), with fewer the bootstrap's standard error is multiplied by Student's t.
Coverage of the 95 % interval in %, by benchmarks/coverage.py with 8000 repetitions (standard error 0.25; percentile bootstrap:
4000), for scores that are normal, Student's t3, lognormal, beta(8, 1), and in two modes
50:50 and 70:30; in brackets the percentile bootstrap:
 3 seeds: 95 (74), 96 (75), 93 (74), 93 (77), 75 (74), 78 (64); 5: 96 (90), 97 (90), 95 (90), 95 (90), 94 (94), 82 (81);
10 seeds: 96 (94), 97 (94), 96 (93), 96 (94), 96 (93), 96 (92); 20: 95 (95), 95 (94), 96 (95), 95 (95), 95 (94), 95 (94).
Five draws from two modes 70:30 fall into one mode alone in 17 % of all cases; no interval made of them alone can then cover.

Paired differences are summarised by their mean with Student's t: it is what the bootstrap's standard error times t is for a
mean, without noise from drawing; under equal methods differences are symmetric, so that mean and IQM agree; and with five seeds
the mean's interval is the narrower one (2.3 against 2.6 standard deviations on normal scores, 3.0 against 3.3 on Student's t3).
A permutation test cannot decide with five seeds at all (its smallest two-sided p is 2/32).

Sources: Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice" (arXiv 2108.13264), for the
IQM, the stratified bootstrap and the probability of improvement; Tukey and McLaughlin 1963 and Yuen 1974 for trimmed means;
Hesterberg 2015, "What teachers should know about the bootstrap", for the narrowness bias and expanded percentiles; Clopper and
Pearson 1934 for the binomial interval; Holm 1979, "A simple sequentially rejective multiple test procedure".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special  # what scipy.stats is made of: loading that would take longer than everything that is computed here

LEVEL = 0.95
DRAWS = 2000
TRIM = 0.25
#: Degrees of freedom from which percentiles are used; below, standard errors are.
ENOUGH = 5
#: Largest number of seeds that is looked for.
MOST_SEEDS = 10_000

Seeds = Float[np.ndarray, " N"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    low and high are None where seeds are too few for an interval (one, or two equal differences). p belongs to the hypothesis
    that the value is 0 (two-sided), for differences only. constant: all numbers were equal, the interval has no width.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None = None
    n: int = 0
    level: float = LEVEL
    constant: bool = False


def iqm(scores: Float[np.ndarray, "*batch N"]) -> Float[np.ndarray, "*batch"]:
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter (rounded down in number).

    With fewer than four seeds nothing is cut off and this is the mean.
    """
    count = scores.shape[-1]
    cut = int(TRIM * count)
    last = count - cut - 1
    return np.asarray(np.partition(scores, (cut, last), axis=-1)[..., cut : last + 1].mean(-1))


@lru_cache(maxsize=64)
def _resamples(strata: int, seeds: int, draws: int) -> Int[np.ndarray, "draws strata seeds"]:
    """Indices of bootstrap samples of sorted seeds.

    The generator depends on the numbers of strata and seeds alone, so that equal scores have equal intervals wherever they are
    computed, and shifted and scaled scores shifted and scaled ones. Every draw comes with its mirror image, so that scores of
    opposite sign have the opposite interval.
    """
    half = np.random.default_rng((20210813, strata, seeds)).integers(0, seeds, (draws // 2, strata, seeds))
    both = np.concatenate([half, seeds - 1 - half])
    both.setflags(write=False)
    return both


def _constant(scores: Float[np.ndarray, "*shape"], axis: int = -1) -> Bool[np.ndarray, "*batch"]:
    """Whether numbers along an axis are equal up to rounding of their sums."""
    scale = np.abs(scores).max(axis)
    return np.asarray(np.ptp(scores, axis) <= 1e-12 * scale)


def _quantile_pair(drawn: Float[np.ndarray, "draws P"], tail: float) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Lower and upper order statistics of the draws with a share `tail` of them outside on either side."""
    last = len(drawn) - 1
    k = round(tail * last)
    part = np.partition(drawn, [k, last - k], axis=0)
    return part[k], part[last - k]


def interval(
    scores: Float[np.ndarray, "strata seeds P"], level: float = LEVEL, draws: int = DRAWS
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Bounds of the IQM over strata and seeds, for each of P columns by themselves: stratified bootstrap over seeds.

    Seeds are resampled within each stratum (a task); one task is one stratum. Raises ValueError with fewer than two seeds.
    """
    strata, seeds, width = scores.shape
    if seeds < 2:
        raise ValueError(f"an interval needs at least 2 seeds, got {seeds}")
    freedom = strata * (seeds - 1)
    ordered = np.sort(scores, axis=1)
    index = _resamples(strata, seeds, draws)
    drawn = np.empty((len(index), width))
    step = max(1, 4_000_000 // (len(index) * strata * seeds))  # columns at a time, about 32 MB
    rows = np.arange(strata)[:, None]
    for at in range(0, width, step):
        sample = ordered[:, :, at : at + step][rows, index]  # [draws, strata, seeds, columns]
        drawn[:, at : at + step] = iqm(np.moveaxis(sample.reshape(len(index), strata * seeds, -1), 1, 2))
    # A resample's spread is divided by n, not by n - 1, which narrows it; where seeds are cut off, losing them in resamples widens
    # it by as much.
    trimmed = strata == 1 and int(TRIM * seeds) > 0
    quantile = _student(freedom, level) * (1.0 if trimmed else math.sqrt(seeds / (seeds - 1)))
    if freedom >= ENOUGH:
        return _quantile_pair(drawn, float(special.ndtr(-quantile)))
    half = quantile * drawn.std(0, ddof=1)
    centre = iqm(ordered.reshape(strata * seeds, width).T)
    return centre - half, centre + half


def estimate(scores: Float[np.ndarray, "*strata N"], level: float = LEVEL, draws: int = DRAWS) -> Estimate:
    """IQM of scores over seeds [N] or strata and seeds [M, N] with its interval.

    One seed: no interval. All equal within strata: an interval without width, marked `constant`. Raises ValueError if a score is
    not finite.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    _check(table)
    value, n = float(iqm(np.sort(table, axis=None))), table.size  # sorted: sums round alike in any order of seeds
    if table.shape[1] < 2:
        return Estimate(value, None, None, n=n, level=level)
    if bool(_constant(table).all()):
        return Estimate(value, value, value, n=n, level=level, constant=True)
    low, high = interval(table[:, :, None], level, draws)
    return Estimate(value, float(low[0]), float(high[0]), n=n, level=level)


def band(
    curves: Float[np.ndarray, "N P"], level: float = LEVEL, draws: int = DRAWS
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"] | None, Float[np.ndarray, " P"] | None]:
    """IQM and pointwise interval of N seeds' curves at P common points; no interval with one seed."""
    middle = iqm(curves.T)
    if len(curves) < 2:
        return middle, None, None
    low, high = interval(curves[None], level, draws)
    same = _constant(curves, 0)
    return middle, np.where(same, middle, low), np.where(same, middle, high)


def difference(a: Seeds, b: Seeds, level: float = LEVEL) -> Estimate:
    """Mean of a − b over pairs (the same seed in both) with Student's interval, and p of no difference.

    One pair: no interval and no p. Two pairs: an interval with one degree of freedom, very wide; none if they are equal. Three or
    more equal differences: an interval without width, p = 0 (or 1 if all are 0). Raises ValueError for unequal lengths or scores
    that are not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"paired scores need equal numbers of seeds, got {a.shape} and {b.shape}")
    _check(a)
    _check(b)
    gaps, n = a - b, a.size
    value = float(gaps.mean())
    scale = max(float(np.abs(a).max()), float(np.abs(b).max()))  # differences are known to the scores' rounding
    if n == 1:
        return Estimate(value, None, None, n=1, level=level)
    if np.ptp(gaps) <= 1e-12 * scale:
        value = 0.0 if abs(value) <= 1e-12 * scale else value
        if n == 2 and value:
            return Estimate(value, None, None, n=2, level=level)
        return Estimate(value, value, value, 0.0 if value else 1.0, n, level, constant=True)
    error = float(gaps.std(ddof=1)) / math.sqrt(n)
    p = 2 * float(special.stdtr(n - 1, -abs(value) / error))
    half = error * _student(n - 1, level)
    return Estimate(value, value - half, value + half, p, n, level)


def at_level(known: Estimate, level: float) -> Estimate:
    """A difference with its interval at another level."""
    if known.low is None or known.high is None or known.constant:
        return replace(known, level=level)
    half = (known.high - known.low) / 2 * _student(known.n - 1, level) / _student(known.n - 1, known.level)
    return replace(known, low=known.value - half, high=known.value + half, level=level)


@lru_cache(maxsize=4096)
def _student(freedom: int, level: float) -> float:
    """Half width of Student's two-sided interval in standard errors."""
    return float(-special.stdtrit(freedom, (1 - level) / 2))


@lru_cache(maxsize=4096)
def _binomial(k: int, n: int, level: float) -> tuple[float, float]:
    """Exact interval of a probability after k of n."""
    tail = (1 - level) / 2
    low = special.betaincinv(k, n - k + 1, tail) if k else 0.0
    return float(low), float(special.betaincinv(k + 1, n - k, 1 - tail) if k < n else 1.0)


def improvement(a: Seeds, b: Seeds, *, higher_is_better: bool = True, level: float = LEVEL) -> Estimate:
    """Probability that a run of A is better than the run of B on the same seed: (wins + ties/2) / N.

    The interval is the exact binomial one (Clopper-Pearson); under ties it is conservative: its low end counts them as losses, its
    high end as wins. rliable compares every run of A with every run of B instead (Mann-Whitney): that disregards
    what runs on the same seed share, and resamples the two sides apart.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"paired scores need equal numbers of seeds, got {a.shape} and {b.shape}")
    _check(a)
    _check(b)
    n = a.size
    wins, ties = int(((a > b) if higher_is_better else (a < b)).sum()), int((a == b).sum())
    low, high = _binomial(wins, n, level)[0], _binomial(wins + ties, n, level)[1]
    return Estimate((wins + ties / 2) / n, low, high, n=n, level=level)


def area(spent: Seeds, score: Seeds, start: float, stop: float) -> float:
    """Mean score between two budgets: area under the linearly interpolated curve over its width (trapezoids).

    Before the first and after the last evaluation the curve is level, so that runs with different evaluations compare.
    """
    if stop <= start:
        return float(np.interp(stop, spent, score))
    points = np.concatenate([[start], spent[(spent > start) & (spent < stop)], [stop]])
    return float(np.trapezoid(np.interp(points, spent, score), points) / (stop - start))


def reached(x: Seeds, score: Seeds, target: float, *, higher_is_better: bool = True) -> float:
    """Where the linearly interpolated curve first meets the target; infinite if it never does."""
    sign = 1.0 if higher_is_better else -1.0
    gap = sign * (score - target)
    hits = np.flatnonzero(gap >= 0)
    if not hits.size:
        return np.inf
    i = int(hits[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * -gap[i - 1] / (gap[i] - gap[i - 1]))


def holm(p: Float[np.ndarray, " K"], level: float = LEVEL) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Holm's adjusted p, and the confidence level at which each hypothesis was tested.

    The k-th smallest p is compared with α / (K − k + 1); the first one that fails stops the procedure, and all further ones share
    its step. So an interval at the returned level excludes 0 exactly where the hypothesis is rejected.
    """
    count = p.size
    order = np.argsort(p, kind="stable")
    factor = count - np.arange(count)
    adjusted = np.minimum(np.maximum.accumulate(p[order] * factor), 1.0)
    accepted = np.flatnonzero(adjusted > 1 - level)
    if accepted.size:
        factor = np.maximum(factor, factor[accepted[0]])
    back = np.empty(count, dtype=np.int64)
    back[order] = np.arange(count)
    return adjusted[back], 1 - (1 - level) / factor[back]


def power(effect: Float[np.ndarray, " K"], n: Float[np.ndarray, " K"], level: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Power of the two-sided paired t-test with n pairs at an effect of mean over standard deviation (noncentral t)."""
    t = -special.stdtrit(n - 1, (1 - level) / 2)
    # the other tail counts for nothing where the effect is large, and is computed worst there
    shift = np.minimum(np.abs(effect) * np.sqrt(n), t + 30)
    return np.asarray(1 - special.nctdtr(n - 1, shift, t))


def seeds_needed(
    effect: Float[np.ndarray, " K"], level: Float[np.ndarray, " K"], wanted: float = 0.8, most: int = MOST_SEEDS
) -> Int[np.ndarray, " K"]:
    """Seeds with which the paired t-test at a level finds an effect (mean over standard deviation) with the power `wanted`.

    At least 2, and `most + 1` if more than `most`. The effect is usually itself estimated, so the number is a rough one.
    """
    low, high = np.full(effect.shape, 1), np.full(effect.shape, most + 1)  # not enough, enough (or given up)
    while np.any(high - low > 1):
        middle = np.maximum((low + high) // 2, 2)
        enough = power(effect, middle.astype(np.float64), level) >= wanted
        high = np.where(enough & (high - low > 1), middle, high)
        low = np.where(~enough & (high - low > 1), middle, low)
    return high


def _check(scores: Float[np.ndarray, "*shape"]) -> None:
    if not np.isfinite(scores).all():
        raise ValueError(f"scores over seeds must be finite, got {scores.tolist()}; a run without a score counts as failed")


__all__ = [
    "LEVEL", "Estimate", "area", "at_level", "band", "difference", "estimate", "holm", "improvement", "interval", "iqm", "power",
    "reached", "seeds_needed",
]  # fmt: skip
