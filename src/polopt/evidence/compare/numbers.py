"""The numbers of a comparison as one tree: what the page shows, and what `comparison.json` keeps for other programs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polopt.evidence.compare.analysis import TARGET, Analysis, Standing, to_json
from polopt.evidence.compare.results import Comparison, RunResult
from polopt.evidence.compare.statistics import band
from polopt.evidence.compare.verdict import verdict
from polopt.evidence.markup import strict
from polopt.evidence.watch.diagnostics import number

Tree = dict[str, Any]
POINTS = 51  # of a curve over training seconds


def record(comparison: Comparison, analysis: Analysis, out: Path) -> Tree:
    """Everything for `comparison.json`: the analysis as it is, the verdict, what was asked for, and every run with its curve."""
    tree = {
        "format": 1,
        "title": title(comparison),
        "verdict": verdict(analysis, caveats=False),
        "command": comparison.command,
        "episodes": comparison.episodes,
        "jobs": comparison.jobs,
        "settings": comparison.settings,
        "contestants": [
            {"name": c.name, "command": c.command, "settings": c.settings, "tuned": c.tuned, "trials": c.trials}
            for c in comparison.contestants
            for c in comparison.contestants
        ],
        "analysis": to_json(analysis),
        "runs": [run if r is None else run | _details(r) for run, r in _runs(comparison, out)],
    }
    cleaned: Tree = strict(tree)
    return cleaned


def _details(r: RunResult) -> Tree:
    return {
        "decisions": r.decisions,
        "updates": r.updates,
        "peak_rss": r.peak_rss,
        "weights": r.weights,
        "versions": r.versions,
        "curve": {"spent": r.spent, "score": r.score, "seconds": r.seconds_at, "decisions": r.decisions_at},
    }


def title(comparison: Comparison) -> str:
    """`grpo, dapo and gspo on text:reverse`."""
    names = [c.name for c in comparison.contestants]
    if len(names) > 4 or sum(map(len, names)) > 80:
        return f"{len(names)} contestants on {comparison.task}"
    return f"{', '.join(names[:-1])}{' and ' if len(names) > 1 else ''}{names[-1] if names else 'nothing'} on {comparison.task}"


def numbers(comparison: Comparison, analysis: Analysis, out: Path) -> Tree:
    """What the page shows, in the order of the comparison's contestants; strict JSON."""
    runs = [run for run, _ in _runs(comparison, out)]
    warnings = list(analysis.warnings)
    columns, note = _costs(analysis)
    tree = {
        "title": title(comparison),
        "verdict": verdict(analysis, caveats=False),
        "warnings": warnings,
        "notes": [n for n in comparison.notes if n not in warnings],
        "task": comparison.task,
        "budget": comparison.budget,
        "unit": comparison.unit,
        "metric": comparison.metric,
        "higher_is_better": comparison.higher_is_better,
        "seeds": comparison.seeds,
        "baseline": comparison.baseline,
        "episodes": comparison.episodes,
        "jobs": comparison.jobs,
        "command": comparison.command,
        "settings": comparison.settings,
        "contestants": [_contestant(comparison, analysis, s, place, runs) for place, s in enumerate(analysis.contestants)],
        "pairs": [
            {"a": p.a, "b": p.b, "seeds": len(p.seeds)} | {k: to_json(getattr(p, k)) for k in ("final", "auc")}
            for p in analysis.pairs
        ],
        "cost": columns,
        "cost_note": note,
        "runs": runs,
        "versions": _versions(comparison.runs),
        "how": _how(comparison, analysis),
    }
    cleaned: Tree = strict(tree)
    return cleaned


def _contestant(comparison: Comparison, analysis: Analysis, standing: Standing, place: int, runs: Sequence[Tree]) -> Tree:
    given = comparison.contestants[place]
    failed = {r["seed"] for r in runs if r["contestant"] == standing.name and r["status"] == "failed"}
    final, auc = standing.final, standing.auc
    target = standing.target
    curves = {"budget": _budget_curve(comparison, standing), "seconds": _seconds_curve(comparison, analysis, standing)}
    return {
        "name": standing.name,
        "place": place,
        "method": given.method,
        "title": given.title,
        "command": given.command,
        "settings": given.settings,
        "tuned": given.tuned,
        "trials": given.trials,
        "done": standing.done,
        "failed": standing.failed,
        "unfinished": standing.unfinished,
        "final": None if final is None else to_json(final.iqm),
        "area": None if auc is None else to_json(auc.iqm),
        "seeds": []
        if final is None
        else [{"seed": s, "final": v, "failed": s in failed} for s, v in zip(final.seeds, final.values, strict=True)],
        "curves": {k: v for k, v in curves.items() if v},
        "cost": {
            "spent": target and target.spent,
            "seconds_to": target and target.seconds,
            "share": target and target.share,
            "seconds": standing.seconds,
            "speed": standing.decisions_per_second,
            "memory": standing.peak_rss_max,
        },
    }


# -------------------------------------------------------------------------------------------------------------- curves
def _budget_curve(comparison: Comparison, standing: Standing) -> Tree | None:
    """marks: where the contestant's runs were evaluated themselves; the curve has the points of all contestants."""
    c = standing.curve
    if c is None:
        return None
    missing = (math.nan,) * len(c.spent)
    own = [r.spent[np.isfinite(r.spent)] for r in comparison.of(standing.name).values() if status(r) == "done"]
    marks = np.unique(np.concatenate(own)) if own else np.empty(0)
    return {"x": c.spent, "mid": c.iqm, "low": c.low or missing, "high": c.high or missing, "marks": marks}


def _seconds_curve(comparison: Comparison, analysis: Analysis, standing: Standing) -> Tree | None:
    """Scores at equal training time; a run's last score stays after its end, and failed runs count as the worst score seen.

    None where a run that counts does not know its times.
    """
    if standing.curve is None or analysis.worst is None:
        return None
    counted = [r for r in comparison.of(standing.name).values() if r.seed in (standing.final.seeds if standing.final else ())]
    known: list[tuple[Any, Any]] = []
    for r in counted:
        if status(r) == "failed":
            continue
        if r.seconds_at is None or len(r.seconds_at) != len(r.score):
            return None
        good = np.isfinite(r.seconds_at) & np.isfinite(r.score)
        if not good.any():
            return None
        known.append((r.seconds_at[good], r.score[good]))
    if not known:
        return None
    start, stop = max(float(t[0]) for t, _ in known), max(float(t[-1]) for t, _ in known)
    x = np.linspace(start, stop, POINTS) if stop > start else np.array([stop])
    rows = [np.interp(x, t, s) for t, s in known] + [np.full(x.shape, analysis.worst)] * (len(counted) - len(known))
    mid, low, high = band(np.stack(rows))
    missing = np.full(x.shape, math.nan)
    return {"x": x, "mid": mid, "low": missing if low is None else low, "high": missing if high is None else high}


# ---------------------------------------------------------------------------------------------------------------- runs
def status(run: RunResult) -> str:
    """The run's status as the analysis takes it: without a last score that is a number, a run has failed."""
    if run.status == "done" and not (len(run.score) and math.isfinite(run.score[-1])):
        return "failed"
    return run.status


def _runs(comparison: Comparison, out: Path) -> list[tuple[Tree, RunResult | None]]:
    """Every run that there is or should be."""
    found: list[tuple[Tree, RunResult | None]] = []
    for c in comparison.contestants:
        runs = comparison.of(c.name)
        for seed in sorted(runs.keys() | set(comparison.seeds)):
            r = runs.get(seed)
            if r is None:
                found.append((_run(c.name, seed, "unfinished", error="not begun"), None))
                continue
            last = float(r.score[-1]) if len(r.score) else None
            known = {"score": last, "seconds": r.seconds, "wall_seconds": r.wall_seconds, "error": r.error}
            found.append((_run(c.name, seed, status(r), folder=Path(os.path.relpath(r.folder, out)).as_posix(), **known), r))
    return found


def _run(contestant: str, seed: int, state: str, **known: Any) -> Tree:
    empty = {"score": None, "seconds": None, "wall_seconds": None, "folder": "", "error": ""}
    return {"contestant": contestant, "seed": seed, "status": state} | empty | known


def _versions(runs: Sequence[RunResult]) -> list[Tree]:
    """Versions and hardware, once for all runs that agree in them."""
    groups: dict[str, list[RunResult]] = {}
    for r in runs:
        if r.versions:
            groups.setdefault(json.dumps(strict(r.versions), sort_keys=True), []).append(r)
    return [{"of": _whose(group), "versions": group[0].versions} for group in groups.values()]


def _whose(runs: Sequence[RunResult]) -> str:
    seeds: dict[str, list[str]] = {}
    for r in runs:
        seeds.setdefault(r.contestant, []).append(str(r.seed))
    said = [f"{name} (seeds {', '.join(s[:8])}{' …' if len(s) > 8 else ''})" for name, s in seeds.items()]
    return f"{len(runs)} runs: {'; '.join(said[:6])}{'; …' if len(said) > 6 else ''}"


# --------------------------------------------------------------------------------------------------------------- words
def _costs(analysis: Analysis) -> tuple[list[Tree], str]:
    """Columns of the table of efficiency, and how to read it."""
    columns: list[Tree] = []
    note = "Medians over runs that are done; memory is the largest of any run."
    if analysis.target is not None:
        goal = number(analysis.target)
        columns = [
            _cost("spent", f"{analysis.unit.capitalize()} to {goal}", "ascending"),
            _cost("seconds_to", f"Training time to {goal}", "ascending", "seconds"),
            _cost("share", f"Runs that reached {goal}", "descending", "percent"),
        ]
        if analysis.unit == "seconds":
            columns.pop(0)
        note = (
            f"The target {goal} is {TARGET:.0%} of the way from the first score to the best final one. "
            f"A dash where fewer than half of the runs reached it. {note}"
        )
    columns += [
        _cost("seconds", "Training time in all", "ascending", "seconds"),
        _cost("speed", "Decisions per second", "descending"),
        _cost("memory", "Peak memory", "ascending", "bytes"),
    ]
    return columns, note


def _cost(key: str, name: str, first: str, kind: str = "") -> Tree:
    return {"key": key, "title": name, "first": first, "kind": kind}


def _how(comparison: Comparison, analysis: Analysis) -> list[tuple[str, str]]:
    level = f"{analysis.level:.0%}"
    episodes = f" over {comparison.episodes} episodes or held-out items" if comparison.episodes else ""
    n = analysis.comparisons
    return [
        ("Scores", f"A run's final score is its last evaluation{episodes}; its mean over training is the area under its curve of "
                   "evaluations, divided by the budget. A run is one number, whatever the number of episodes behind it."),
        ("Intervals", f"Interquartile means (the mean without the highest and the lowest quarter of the runs) with {level} "
                      "intervals from a stratified bootstrap over seeds, widened for small numbers of seeds."),
        ("Pairs", "Runs with the same seed share initial weights, prompts and environments, so differences are taken seed by seed: "
                  "their mean, Student's interval and p."),
        ("Correction", f"{n} pair{' was' if n == 1 else 's were'} compared. p values are corrected after Holm, and intervals are "
                       "as wide as that asks: they leave out 0 exactly where the pair is decided."),
        ("Probability of improvement", "The share of seeds on which the first is better, ties as half, with the exact "
                                       "binomial interval."),
        ("Seeds needed", "For a power of 80 % at the corrected level, if the true difference and spread were those seen: rough."),
        ("Training time", "Seconds of training without evaluations. On that axis a run keeps its last score after its end."),
        ("Failed runs", "A failed run counts as the worst score seen anywhere in the comparison; an unfinished one is left out."),
    ]  # fmt: skip


__all__ = ["numbers", "record", "status", "title"]
