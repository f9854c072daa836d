"""A comparison weighed: scores, areas, curves, efficiency and paired differences with intervals.

- A run counts by its seed. Its final score is its last evaluation's; its area is its mean score over the budget.
- A failed run counts as the worst score seen anywhere in the comparison, in everything (score, area, curve), so that crashing never
  flatters. Unfinished runs are left out. A contestant without a finished run is listed and takes no part in pairs.
- Pairs are compared on the seeds that count for both. Final scores are one family of hypotheses, areas another; each is corrected
  after Holm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from polopt.evidence.compare.caveats import caveats
from polopt.evidence.compare.findings import Analysis, Curve, Efficiency, Measure, Outcome, Pair, Standing, to_json
from polopt.evidence.compare.results import Comparison, Contestant, RunResult, Status
from polopt.evidence.compare.statistics import (
    LEVEL,
    Estimate,
    area,
    at_level,
    band,
    difference,
    estimate,
    holm,
    improvement,
    reached,
    seeds_needed,
)

#: Share of the way from the initial to the best final score at which the target lies.
TARGET = 0.9
#: Curves keep the runs' own points of evaluation up to this number, and are sampled at COMMON points beyond.
POINTS, COMMON = 64, 51
#: Share of the budget before which an evaluation counts as one of the untrained policy.
EARLY = 0.05

Row = Float[np.ndarray, " N"]


@dataclass(frozen=True)
class _Run:
    """A run with its evaluations in order and finite; `status` is failed where a finished run has no score."""

    status: Status
    spent: Row
    score: Row
    decisions: Row | None
    seconds: Row | None
    error: str
    source: RunResult


def _tidy(run: RunResult, unit: str) -> _Run:
    spent, score = np.asarray(run.spent, dtype=np.float64), np.asarray(run.score, dtype=np.float64)
    status, error = run.status, run.error
    if status == "done" and not (score.size and np.isfinite(score[-1]) and np.isfinite(spent[-1])):
        status, error = "failed", error or ("its last score is not a number" if score.size else "it has no score")
    order = np.argsort(spent, kind="stable")
    order = order[np.isfinite(spent[order]) & np.isfinite(score[order])]

    def at(values: Row | None) -> Row | None:
        return None if values is None or len(values) != len(spent) else np.asarray(values, dtype=np.float64)[order]

    decisions = spent[order] if unit == "decisions" else at(run.decisions_at)
    seconds = at(run.seconds_at) if run.seconds_at is not None or unit != "seconds" else spent[order]
    return _Run(status, spent[order], score[order], decisions, seconds, error, run)


def analyse(comparison: Comparison) -> Analysis:
    """Weigh a comparison; see the module for what counts, and `Analysis` for what comes out. Never raises for bad runs."""
    runs = {
        c.name: {s: _tidy(r, comparison.unit) for s, r in sorted(comparison.of(c.name).items())} for c in comparison.contestants
    }
    everyone = [r for each in runs.values() for r in each.values()]
    done = [r for r in everyone if r.status == "done"]
    sign = 1.0 if comparison.higher_is_better else -1.0
    seen = np.concatenate([r.score for r in everyone]) if everyone else np.empty(0)
    worst = float(sign * (sign * seen).min()) if seen.size else None
    start = min(max((float(r.spent[0]) for r in done), default=0.0), comparison.budget)
    counted = {
        name: {s: r for s, r in each.items() if r.status != "unfinished"} if any(r.status == "done" for r in each.values()) else {}
        for name, each in runs.items()
    }

    def per_run(number: Callable[[_Run], float]) -> dict[str, dict[int, float]]:
        return {n: {s: worst if r.status == "failed" else number(r) for s, r in each.items()} for n, each in counted.items()}  # type: ignore[misc]

    finals = per_run(lambda r: float(r.score[-1]))
    areas = per_run(lambda r: area(r.spent, r.score, start, comparison.budget))
    measured = {n: (_measure(finals[n]), _measure(areas[n])) for n in runs}
    ranked = {n: final.iqm.value for n, (final, _) in measured.items() if final is not None}
    ranking = sorted(ranked, key=lambda n: -sign * ranked[n])
    early = [float(np.interp(start, r.spent, r.score)) for r in done] if start <= EARLY * comparison.budget else []
    initial = estimate(np.array(early)).value if early else None
    best = ranked[ranking[0]] if ranking else None
    gain = None if best is None or initial is None else sign * (best - initial)
    target = (
        initial + TARGET * (best - initial) if gain is not None and gain > 0 and initial is not None and best is not None else None
    )
    points = _points(done, start, comparison.budget)
    pairs = _pairs(comparison, finals, areas)
    return Analysis(
        task=comparison.task,
        budget=comparison.budget,
        unit=comparison.unit,
        metric=comparison.metric,
        higher_is_better=comparison.higher_is_better,
        level=LEVEL,
        baseline=comparison.baseline,
        seeds=comparison.seeds,
        comparisons=sum(p.final.difference.p is not None for p in pairs),
        start=start,
        initial=initial,
        best=best,
        worst=worst,
        target=target,
        gained=None if gain is None else abs(gain),
        contestants=tuple(
            _standing(comparison, c, runs[c.name], counted[c.name], measured[c.name], points, worst, target)
            for c in comparison.contestants
        ),
        pairs=pairs,
        ranking=tuple(ranking),
        warnings=tuple(
            caveats(comparison, {n: {s: (r.status, r.error) for s, r in each.items()} for n, each in runs.items()}, worst, start)
        ),
    )


def _measure(values: Mapping[int, float]) -> Measure | None:
    if not values:
        return None
    numbers = np.array(list(values.values()))
    return Measure(estimate(numbers), float(numbers.mean()), tuple(values), tuple(numbers.tolist()))


def _points(done: Sequence[_Run], start: float, stop: float) -> Row:
    """Points of spent budget at which all curves are shown."""
    own = np.unique(np.concatenate([r.spent for r in done] + [np.array([start, stop])]))
    own = own[(own >= start) & (own <= stop)]
    return own if own.size <= POINTS else np.linspace(start, stop, COMMON)


def _standing(
    comparison: Comparison,
    contestant: Contestant,
    runs: Mapping[int, _Run],
    counted: Mapping[int, _Run],
    measured: tuple[Measure | None, Measure | None],
    points: Row,
    worst: float | None,
    target: float | None,
) -> Standing:
    status = [r.status for r in runs.values()]
    missing = len(set(comparison.seeds) - set(runs))
    sources = [r.source for r in runs.values() if r.status == "done"]
    memory = [r.peak_rss for r in sources if r.peak_rss is not None]
    speed = [r.decisions / r.seconds for r in sources if r.decisions is not None and r.seconds]
    seconds = [r.seconds for r in sources if r.seconds is not None]
    return Standing(
        name=contestant.name,
        title=contestant.title,
        method=contestant.method,
        done=status.count("done"),
        failed=status.count("failed"),
        unfinished=status.count("unfinished") + missing,
        final=measured[0],
        auc=measured[1],
        curve=_curve(list(counted.values()), points, worst),
        target=_efficiency(list(counted.values()), target, comparison.higher_is_better),
        decisions_per_second=float(np.median(speed)) if speed else None,
        seconds=float(np.median(seconds)) if seconds else None,
        peak_rss_max=max(memory) if memory else None,
        peak_rss_median=int(np.median(memory)) if memory else None,
        error=next((r.error for r in runs.values() if r.status == "failed" and r.error), ""),
    )


def _curve(runs: Sequence[_Run], points: Row, worst: float | None) -> Curve | None:
    if not runs:
        return None
    rows = [np.full(points.shape, worst) if r.status == "failed" else np.interp(points, r.spent, r.score) for r in runs]
    middle, low, high = band(np.stack(rows))
    ends = [None if side is None else tuple(side.tolist()) for side in (low, high)]
    return Curve(tuple(points.tolist()), tuple(middle.tolist()), ends[0], ends[1], len(runs))


def _efficiency(runs: Sequence[_Run], target: float | None, higher: bool) -> Efficiency | None:
    """How soon a contestant's runs first met the target, by linear interpolation between evaluations; failed runs never did."""
    if target is None or not runs:
        return None

    def half(axis: Callable[[_Run], Row | None]) -> tuple[float | None, float]:
        found: list[float] = []
        for r in runs:
            x = axis(r)
            if r.status == "failed":
                found.append(np.inf)
            elif x is None:
                return None, 0.0
            else:
                found.append(reached(x, r.score, target, higher_is_better=higher))
        # by then half of the runs have arrived: of an even number the lower of the two in the middle, for the upper one may never
        middle = sorted(found)[(len(found) - 1) // 2]
        return (float(middle) if np.isfinite(middle) else None), float(np.isfinite(found).mean())

    spent, share = half(lambda r: r.spent)
    return Efficiency(share, spent, half(lambda r: r.decisions)[0], half(lambda r: r.seconds)[0])


def _pairs(
    comparison: Comparison, finals: Mapping[str, Mapping[int, float]], areas: Mapping[str, Mapping[int, float]]
) -> tuple[Pair, ...]:
    names = [n for n in dict.fromkeys(c.name for c in comparison.contestants) if finals[n]]
    chosen: Iterable[tuple[str, str]] = itertools.combinations(names, 2)
    if comparison.baseline is not None:
        chosen = [(n, comparison.baseline) for n in names if n != comparison.baseline and comparison.baseline in names]
    common = {(a, b): tuple(sorted(finals[a].keys() & finals[b].keys())) for a, b in chosen}
    common = {pair: seeds for pair, seeds in common.items() if seeds}
    outcomes = [_outcomes(values, common, comparison.higher_is_better) for values in (finals, areas)]
    return tuple(Pair(a, b, seeds, outcomes[0][a, b], outcomes[1][a, b]) for (a, b), seeds in common.items())


def _outcomes(
    values: Mapping[str, Mapping[int, float]], common: Mapping[tuple[str, str], tuple[int, ...]], higher: bool
) -> dict[tuple[str, str], Outcome]:
    """One family of hypotheses: every pair in one measure, corrected together."""
    rows = {(a, b): (_row(values[a], seeds), _row(values[b], seeds)) for (a, b), seeds in common.items()}
    raw = {pair: difference(*ab) for pair, ab in rows.items()}
    tested = [pair for pair, e in raw.items() if e.p is not None]
    adjusted, levels = holm(np.array([raw[pair].p for pair in tested], dtype=np.float64))
    step = dict(zip(tested, zip(adjusted.tolist(), levels.tolist(), strict=True), strict=True))
    needed = _needed({pair: rows[pair] for pair in tested}, raw, {pair: step[pair][1] for pair in tested})
    found = {}
    for pair, (a, b) in rows.items():
        p, level = step.get(pair, (None, LEVEL))
        gap = raw[pair].value if higher else -raw[pair].value
        decided = p is not None and p <= 1 - LEVEL
        found[pair] = Outcome(
            difference=raw[pair],
            corrected=at_level(raw[pair], level),
            p_adjusted=p,
            improvement=improvement(a, b, higher_is_better=higher),
            decision="undecided" if not decided else "better" if gap > 0 else "worse",
            seeds_needed=needed.get(pair),
        )
    return found


def _row(values: Mapping[int, float], seeds: Sequence[int]) -> Row:
    return np.array([values[s] for s in seeds], dtype=np.float64)


def _needed(
    rows: Mapping[tuple[str, str], tuple[Row, Row]],
    raw: Mapping[tuple[str, str], Estimate],
    levels: Mapping[tuple[str, str], float],
) -> dict[tuple[str, str], int]:
    """Seeds needed for each pair with a spread and a difference."""
    pairs = [pair for pair, e in raw.items() if pair in rows and not e.constant and e.value]
    if not pairs:
        return {}
    spread = np.array([np.std(rows[pair][0] - rows[pair][1], ddof=1) for pair in pairs])
    effect = np.abs(np.array([raw[pair].value for pair in pairs])) / spread
    found = seeds_needed(effect, np.array([levels[pair] for pair in pairs]))
    return dict(zip(pairs, found.tolist(), strict=True))


__all__ = ["TARGET", "Analysis", "Curve", "Efficiency", "Measure", "Outcome", "Pair", "Standing", "analyse", "to_json"]
