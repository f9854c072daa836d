"""What limits a comparison, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from polopt.evidence.compare.results import Comparison, RunResult, Status

#: Share of the budget by which a run may miss it unmentioned.
SLACK = 0.05

Found = Mapping[str, Mapping[int, tuple[Status, str]]]


def caveats(comparison: Comparison, found: Found, worst: float | None, start: float) -> list[str]:
    """Warnings, the gravest first. found: status and error of each contestant's runs by seed, as they count."""
    done = [r for c in comparison.contestants for s, r in comparison.of(c.name).items() if found[c.name][s][0] == "done"]
    return [
        *_failed(found, worst),
        *_unfinished(comparison, found),
        *_few(comparison, found),
        *_weights(comparison),
        *_mixed(done),
        *_budget(comparison, done),
        *_evaluations(comparison, done, start),
        *comparison.notes,
    ]


def listed(items: Iterable[object], most: int = 5) -> str:
    """`a, b and 3 more`."""
    names = [str(i) for i in items]
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


def _failed(found: Found, worst: float | None) -> Iterable[str]:
    for name, runs in found.items():
        failed = {s: error for s, (status, error) in runs.items() if status == "failed"}
        if not failed:
            continue
        why = next((e for e in failed.values() if e), "")
        cause = f": {why}" if why else ""
        if not any(status == "done" for status, _ in runs.values()):
            yield f"No run of {name} was finished ({len(failed)} failed{cause}); it takes no part in the comparison."
        else:
            seeds = f"seed{'s' * (len(failed) > 1)} {listed(failed)}"
            score = "" if worst is None else f", {worst:.4g}"
            yield f"{len(failed)} of {len(runs)} runs of {name} failed ({seeds}{cause}); they count as the worst score seen{score}."


def _unfinished(comparison: Comparison, found: Found) -> Iterable[str]:
    for name, runs in found.items():
        seeds = sorted({s for s, (status, _) in runs.items() if status == "unfinished"} | (set(comparison.seeds) - set(runs)))
        if seeds:
            many = "s" * (len(seeds) > 1)
            yield f"{len(seeds)} run{many} of {name} unfinished (seed{many} {listed(seeds)}), left out."


def _few(comparison: Comparison, found: Found) -> Iterable[str]:
    if len(comparison.contestants) == 1:
        yield "One contestant: there is nothing to compare it with."
    if len(comparison.seeds) == 1:
        yield "One seed: no interval can be given and nothing can be decided."
    if comparison.baseline is not None and not any(s == "done" for s, _ in found.get(comparison.baseline, {}).values()):
        yield f"The baseline {comparison.baseline} has no finished run, so nothing is compared with it."


def _weights(comparison: Comparison) -> Iterable[str]:
    first: dict[int, RunResult] = {}
    differ: dict[tuple[str, str], list[int]] = {}
    for contestant in comparison.contestants:
        for seed, run in sorted(comparison.of(contestant.name).items()):
            if run.weights is None:
                continue
            other = first.setdefault(seed, run)
            if other.weights != run.weights:
                differ.setdefault((other.contestant, run.contestant), []).append(seed)
    for (a, b), seeds in differ.items():
        yield f"{a} and {b} began from different weights on seed{'s' * (len(seeds) > 1)} {listed(seeds)}."


def _mixed(done: list[RunResult]) -> Iterable[str]:
    for key in sorted({k for r in done for k in r.versions}):
        kinds: dict[str, list[RunResult]] = {}
        for run in done:
            value = run.versions.get(key)
            if value is not None:
                kinds.setdefault(str(value), []).append(run)
        if len(kinds) > 1:
            words = [f"{value} ({listed((f'{r.contestant} seed {r.seed}' for r in runs), 3)})" for value, runs in kinds.items()]
            yield f"Runs differ in {key}: {'; '.join(words)}."


def _budget(comparison: Comparison, done: list[RunResult]) -> Iterable[str]:
    for contestant in comparison.contestants:
        spent = [float(np.nanmax(r.spent)) for r in done if r.contestant == contestant.name]
        off = max((s / comparison.budget - 1 for s in spent), key=abs, default=0.0)
        if abs(off) > SLACK:
            budget = f"{comparison.budget:,.0f} {comparison.unit}"
            yield f"{contestant.name} spent up to {abs(off):.0%} {'more' if off > 0 else 'less'} than the budget of {budget}."


def _evaluations(comparison: Comparison, done: list[RunResult], start: float) -> Iterable[str]:
    counts = {c.name: sorted({len(r.score) for r in done if r.contestant == c.name}) for c in comparison.contestants}
    if len({n for each in counts.values() for n in each}) > 1:
        words = (f"{name} {each[0]}" + (f" to {each[-1]}" if len(each) > 1 else "") for name, each in counts.items() if each)
        yield f"Numbers of evaluations differ: {listed(words)}."
    for contestant in comparison.contestants:
        bad = {r.seed: n for r in done if r.contestant == contestant.name and (n := int((~np.isfinite(r.score)).sum()))}
        if bad:
            number, where = sum(bad.values()), f"{contestant.name} seed{'s' * (len(bad) > 1)} {listed(bad)}"
            yield f"{number} evaluation{'s' * (number > 1)} of {where} gave no number, left out."
    if start > SLACK * comparison.budget:
        late = listed(dict.fromkeys(r.contestant for r in done if np.nanmin(r.spent) >= start))
        yield f"Areas and curves begin at {start:,.0f} {comparison.unit}: {late} has no earlier evaluation."


__all__ = ["caveats", "listed"]
