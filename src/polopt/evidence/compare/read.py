"""From run folders to a `Comparison`: statuses, curves, costs, and what was noted on the way."""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from polopt.errors import CallError
from polopt.evidence.compare.caveats import listed
from polopt.evidence.compare.folders import Damaged, read_metrics, read_record
from polopt.evidence.compare.results import Comparison, Contestant, RunResult, Status

PLAN = "plan.json"
#: Where metrics.jsonl says what was spent; an external program may use the unit's own name as well.
SPENT = {"updates": "update"}
#: An external program that spent less than this share of the budget was not compared at equal budget.
LEAST = 0.9
#: Up to this many keys are named where the metric is not among them.
FEW = 8


def read_comparison(out: Path | str) -> Comparison:
    """The comparison in a folder, as far as its runs have come. Raises `CallError` if there is none."""
    out = Path(out)
    try:
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
        contestants = tuple(Contestant(**c) for c in plan["contestants"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CallError(f"{out} holds no comparison (its {PLAN} cannot be read: {error})") from error
    runs = [read_run(out / plan["folders"][c.name] / f"s{seed}", c, seed, plan) for c in contestants for seed in plan["seeds"]]
    return Comparison(
        task=plan["task"], budget=plan["budget"], unit=plan["unit"], metric=plan["metric"],
        higher_is_better=plan["higher_is_better"], seeds=tuple(plan["seeds"]), contestants=contestants, runs=tuple(runs),
        baseline=plan["baseline"], settings=plan["settings"], command=plan["command"], folder=out, episodes=plan["episodes"],
        jobs=plan["jobs"], notes=tuple(dict.fromkeys([*plan["notes"], *_notes(runs)])),
    )  # fmt: skip


def _notes(runs: Sequence[RunResult]) -> list[str]:
    """What was noted about single runs; the same about several seeds of a contestant is one sentence."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        own = f"{run.contestant}, seed {run.seed}, "
        for text in map(str, read_record(run.folder).get("notes", [])):
            key = (run.contestant, text.removeprefix(own)) if text.startswith(own) else ("", text)
            seeds.setdefault(key, []).append(run.seed)
    return [
        f"{name}, seed{'s' * (len(set(of)) > 1)} {listed(dict.fromkeys(of))}, {text}" if name else text
        for (name, text), of in seeds.items()
    ]


def read_run(folder: Path, contestant: Contestant, seed: int, plan: Mapping[str, Any]) -> RunResult:
    """One run, whatever state it is in."""
    record, summary = read_record(folder), _json(folder / "summary.json")
    try:
        lines = read_metrics(folder, whole=False)
        problem = ""
    except Damaged as error:
        lines, problem = [], str(error)
    key, spent_key = plan["metric"], spent_in(lines, plan["unit"])
    scored = _scored(lines, key, spent_key)
    score = [_number(line[key]) for line in scored]
    columns = {k: [_number(line.get(k)) for line in scored] for k in dict.fromkeys((spent_key, "seconds", "decisions"))}
    if key == "eval_score" and "eval_score_initial" in summary and not (columns[spent_key] and columns[spent_key][0] == 0):
        score = [_number(summary["eval_score_initial"]), *score]
        columns = {k: [0.0, *v] for k, v in columns.items()}
    elif not scored and key in summary:
        score = [_number(summary[key])]
        columns = {k: [_number(summary.get(k, summary.get("updates")))] for k in columns}
    status, reason = _status(contestant, record, summary, folder)
    if status == "done":
        status, reason = _judge(score, columns[spent_key], lines, spent_key, plan, contestant)
    weights = record.get("weights") or {}
    return RunResult(
        contestant=contestant.name, seed=seed, status="failed" if problem else status, folder=folder,
        spent=_array(columns[spent_key]), score=_array(score), decisions=_last("decisions", summary, lines),
        updates=_last("updates", summary, lines, "update"), seconds=_last("seconds", summary, lines),
        wall_seconds=record.get("wall_seconds"), peak_rss=_peak(record, summary),
        seconds_at=_array(columns["seconds"]), decisions_at=_array(columns["decisions"]), error=problem or reason,
        weights=weights.get("policy") if isinstance(weights, dict) else None,
        versions={**_entries(record), **_entries(summary)},  # the comparison notes the processor, the run what it ran with
    )  # fmt: skip


def _status(contestant: Contestant, record: Mapping[str, Any], summary: Mapping[str, Any], folder: Path) -> tuple[Status, str]:
    """What the files say, before the scores are looked at."""
    noted = record.get("status")
    if noted == "failed":
        return "failed", str(record.get("error") or "failed")
    if contestant.command:
        return ("done" if noted == "done" else "unfinished"), ""
    said = summary.get("status")
    if said == "done":
        return "done", ""
    if said == "failed":
        return "failed", str(record.get("error") or _last_of(folder / "error.txt") or "failed")
    return "unfinished", ""


def _judge(
    score: Sequence[float], spent: Sequence[float], lines: Sequence[Mapping[str, Any]], key: str, plan: Mapping[str, Any],
    contestant: Contestant,
) -> tuple[Status, str]:  # fmt: skip
    """Whether a run that ended by itself counts: its last score is a number, and it spent the budget."""
    if not score:
        return "failed", missing(lines, plan)
    if not math.isfinite(score[-1]):
        return "failed", f"its last {plan['metric']} is not a number"
    if contestant.command:
        most = max((_number(line.get(key)) for line in lines if line.get(key) is not None), default=0.0)
        if most < LEAST * plan["budget"]:
            return "failed", f"ended after {most:g} of {plan['budget']:g} {plan['unit']}"
        if back := _backwards(lines, key):
            return "failed", back
    return "done", ""


def _backwards(lines: Sequence[Mapping[str, Any]], key: str) -> str:
    """Where what was spent goes back, in words: a curve with such lines could be read in more than one way. Empty if nowhere."""
    spent = [_number(line[key]) for line in lines if math.isfinite(_number(line.get(key)))]
    for before, after in itertools.pairwise(spent):
        if after < before:
            return f"metrics.jsonl goes back from {before:g} to {after:g} {key}: lines must be in order"
    return ""


def verdict_on(folder: Path, contestant: Contestant, seed: int, plan: Mapping[str, Any]) -> str:
    """Why a run that came to its end counts as failed all the same, empty if it counts."""
    found = read_run(folder, contestant, seed, plan)
    return found.error if found.status == "failed" else ""


def offered(folder: Path) -> set[str]:
    """What a finished run can be compared by: keys of its lines, and numbers of its summary."""
    try:
        lines = read_metrics(folder, whole=False)
    except Damaged:
        return set()
    numbers = {k for k, v in _json(folder / "summary.json").items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k for line in lines for k in line} | (numbers if lines else set())


def absent(metric: str, contestant: str, seed: int, keys: Iterable[str]) -> str:
    """That a run's metric does not exist, the nearest key that does, and all of them."""
    known = sorted(set(keys))
    close = difflib.get_close_matches(metric, known, n=1)
    near = f"; did you mean '{close[0]}'?" if close else "."
    return f"there is no metric '{metric}' in the run of {contestant}, seed {seed}{near} It has {', '.join(known)}"


def spent_in(lines: Sequence[Mapping[str, Any]], unit: str) -> str:
    """The key under which these lines say what was spent."""
    usual = SPENT.get(unit, unit)
    return unit if lines and not any(usual in line for line in lines) and any(unit in line for line in lines) else usual


def _scored(lines: Sequence[Mapping[str, Any]], key: str, spent_key: str) -> list[Mapping[str, Any]]:
    """The lines with a score and with a number for what was spent."""
    return [line for line in lines if key in line and math.isfinite(_number(line.get(spent_key)))]


def missing(lines: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> str:
    """What metrics.jsonl lacks to count, empty if nothing."""
    key, keys = plan["metric"], {k for line in lines for k in line}
    if key not in keys:
        close = difflib.get_close_matches(key, sorted(keys), n=1)
        near = f", did you mean '{close[0]}'?" if close else f"; it has {', '.join(sorted(keys))}" if 0 < len(keys) <= FEW else ""
        return f"no '{key}' in metrics.jsonl{near}"
    spent_key = spent_in(lines, plan["unit"])
    if not _scored(lines, key, spent_key):
        return f"no line of metrics.jsonl has both '{key}' and a number for '{spent_key}', what was spent of the budget"
    return ""


def _number(value: Any) -> float:
    """A number as it came; what is missing or null is NaN."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return math.nan


def _array(values: Sequence[float]) -> Float[np.ndarray, " N"]:
    return np.asarray(values, dtype=np.float64)


def _last(name: str, summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], in_line: str = "") -> float | None:
    """The summary's number, or that of the last line that has it."""
    value = summary.get(name)
    if value is None:
        value = next((line[in_line or name] for line in reversed(lines) if line.get(in_line or name) is not None), None)
    return float(value) if isinstance(value, int | float) else None


def _peak(record: Mapping[str, Any], summary: Mapping[str, Any]) -> int | None:
    found = [int(x) for x in (record.get("peak_rss"), summary.get("peak_rss")) if isinstance(x, int | float) and x]
    return max(found, default=None)


def _entries(found: Mapping[str, Any]) -> dict[str, Any]:
    """The versions in a record or a summary."""
    versions = found.get("versions")
    return versions if isinstance(versions, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_of(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


__all__ = ["PLAN", "absent", "missing", "offered", "read_comparison", "read_run", "spent_in", "verdict_on"]
