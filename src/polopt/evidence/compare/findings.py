"""What an analysis found, as plain values that go into JSON as they are."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from polopt.evidence.compare.statistics import Estimate

#: Of A against B, in the direction of the metric.
Decision = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Measure:
    """One number for each run of a contestant and what it comes to. Failed runs are in it, with the worst score seen."""

    iqm: Estimate
    mean: float
    seeds: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Interquartile mean of the runs' curves with pointwise 95 % intervals, at common points of spent budget."""

    spent: tuple[float, ...]
    iqm: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    runs: int


@dataclass(frozen=True)
class Efficiency:
    """What it took until half of the runs had reached the target score; None where fewer than half did, or it is unknown."""

    share: float  # of the runs that reached it
    spent: float | None  # in the unit of the budget
    decisions: float | None
    seconds: float | None  # of training


@dataclass(frozen=True)
class Standing:
    """One contestant. final, auc, curve and target are None where no run was finished."""

    name: str
    title: str
    method: str
    done: int
    failed: int
    unfinished: int
    final: Measure | None
    auc: Measure | None  # mean score over the budget
    curve: Curve | None
    target: Efficiency | None
    decisions_per_second: float | None  # of training, median
    seconds: float | None  # of training, median
    peak_rss_max: int | None  # bytes
    peak_rss_median: int | None
    error: str  # of the first failed run


@dataclass(frozen=True)
class Outcome:
    """A pair in one measure: A − B in units of the metric.

    difference: with its 95 % interval and p. corrected: the same at the level at which Holm's procedure tested this pair; it
    excludes 0 exactly where the pair is decided. improvement: probability that a run of A is better than the run of B on the same
    seed. seeds_needed: in all, for 80 % power at that level if the true effect were the estimated one; None where it cannot be
    told, 10001 for anything above 10000.
    """

    difference: Estimate
    corrected: Estimate
    p_adjusted: float | None
    improvement: Estimate
    decision: Decision
    seeds_needed: int | None


@dataclass(frozen=True)
class Pair:
    """Contestants A and B, on the seeds that count for both."""

    a: str
    b: str
    seeds: tuple[int, ...]
    final: Outcome
    auc: Outcome


@dataclass(frozen=True)
class Analysis:
    """Everything that a comparison says.

    comparisons: number of pairs for which final scores were corrected (and those of areas as well, as a family of their own).
    start: budget from which areas and curves count, the latest first evaluation. best: the best contestant's final interquartile
    mean. target: score at 90 % of the way from `initial` to `best`. gained: |best − initial|. worst: the worst score seen, which
    failed runs count as. ranking: by final interquartile mean, best first; contestants without a finished run are not in it.
    """

    task: str
    budget: float
    unit: str
    metric: str
    higher_is_better: bool
    level: float
    baseline: str | None
    seeds: tuple[int, ...]
    comparisons: int
    start: float
    initial: float | None
    best: float | None
    worst: float | None
    target: float | None
    gained: float | None
    contestants: tuple[Standing, ...]
    pairs: tuple[Pair, ...]
    ranking: tuple[str, ...]
    warnings: tuple[str, ...]

    def of(self, contestant: str) -> Standing:
        """A contestant by name."""
        return next(s for s in self.contestants if s.name == contestant)

    def pair(self, a: str, b: str) -> Pair | None:
        """A − B, turned round where it was computed as B − A; None if the two were not compared."""
        for p in self.pairs:
            if (p.a, p.b) == (a, b):
                return p
            if (p.a, p.b) == (b, a):
                return Pair(a, b, p.seeds, _turned(p.final), _turned(p.auc))
        return None


def _turned(outcome: Outcome) -> Outcome:
    def negative(e: Estimate) -> Estimate:
        low, high = (None if e.high is None else -e.high), (None if e.low is None else -e.low)
        return dataclasses.replace(e, value=-e.value, low=low, high=high)

    def complement(e: Estimate) -> Estimate:
        low, high = (None if e.high is None else 1 - e.high), (None if e.low is None else 1 - e.low)
        return dataclasses.replace(e, value=1 - e.value, low=low, high=high)

    turn: dict[Decision, Decision] = {"better": "worse", "worse": "better", "undecided": "undecided"}
    return dataclasses.replace(
        outcome,
        difference=negative(outcome.difference),
        corrected=negative(outcome.corrected),
        improvement=complement(outcome.improvement),
        decision=turn[outcome.decision],
    )


def to_json(value: Any) -> Any:
    """Dictionaries, lists, strings and finite numbers (strict JSON); None where a number is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


__all__ = ["Analysis", "Curve", "Decision", "Efficiency", "Measure", "Outcome", "Pair", "Standing", "to_json"]
