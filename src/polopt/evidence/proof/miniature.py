"""Miniature experiments: what a method's own small experiment is, its runs as numbers, and the word that they come to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from polopt.claim import Miniature
from polopt.errors import CallError
from polopt.evidence.compare.entries import Entry, plain
from polopt.evidence.compare.folders import code_of
from polopt.evidence.compare.plan import Asked, arm_of
from polopt.evidence.compare.results import RunResult
from polopt.evidence.compare.statistics import Estimate, area, difference, estimate
from polopt.method import Method
from polopt.overrides import Resolved
from polopt.part import Part
from polopt.run import Budget

Word = Literal["shown", "not shown", "undecided"]
#: Baseline of a method that has no parent: its own score before training.
UNTRAINED = "untrained"
#: Share of a run's range by which a score must fall between two evaluations to count as a drop.
DROP = 0.2
#: Fields of a miniature that say nothing about its runs or their judgement.
TEXTS = ("claim",)


@dataclass(frozen=True)
class Arm:
    """One side of a miniature: a method, by name where it has one, with the settings that the miniature gives it."""

    name: str
    method: str | Method
    settings: Mapping[str, Any]


def miniature_of(method: Method) -> Miniature:
    """The miniature a method declares. Raises `CallError` if it declares none."""
    if method.miniature is None:
        raise CallError(f"{method.name} declares no miniature experiment; add miniature=Miniature(...) where it is made")
    return method.miniature


def baseline_name(method: Method) -> str:
    """What a method's miniature compares it with: the named method, else its parent, else itself before training.

    The method itself with other settings is called by these.
    """
    m = miniature_of(method)
    name = m.baseline or (method.parent.name if method.parent else UNTRAINED)
    return ",".join([name, *(f"{k}={plain(v)}" for k, v in m.other.items())]) if name == method.name else name


def arms(method: Method, given: str | None = None) -> list[Arm]:
    """The method and its baseline; the method alone where the baseline is itself before training.

    given: what the method was asked for as, if by name. A baseline may be the method itself with other settings.
    """
    m, other = miniature_of(method), baseline_name(method)
    found = [Arm(method.name, given or method, {**m.settings, **m.own})]
    if other != UNTRAINED:
        base: str | Method = m.baseline or method.parent or ""
        if m.baseline and m.baseline == method.name:
            base = given or method
        found.append(Arm(other, base, {**m.settings, **m.other}))
    return found


def resolved(arm: Arm, m: Miniature) -> Resolved:
    """An arm as the comparison runs it, with every value filled in."""
    entry = Entry(arm.name, arm.method, arm.settings)
    asked = Asked((entry,), m.task, m.runs, Budget.parse(m.budget), points=m.points)
    found = arm_of(asked, entry).resolved
    assert found is not None
    return found


def values(found: Resolved) -> dict[str, Any]:
    """Every setting of a run by path, as JSON can hold it; parts by their names."""
    return {path: _plain(leaf.value) for path, leaf in found.leaves().items() if path != "seed"}


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return type(value).__qualname__
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else getattr(value, "__qualname__", type(value).__qualname__)


def declared(m: Miniature) -> dict[str, Any]:
    """What a miniature says about its runs and their judgement."""
    return {k: _plain(v) for k, v in asdict(m).items() if k not in TEXTS}


def fingerprint(method: Method) -> str:
    """Changes when the miniature, or any setting of its arms, does."""
    m = miniature_of(method)
    return digest({"miniature": declared(m), "arms": {a.name: values(resolved(a, m)) for a in arms(method)}})


def digest(tree: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]


def stale(method: Method, stored: Mapping[str, Any]) -> list[str]:
    """In what the method's present experiment differs from the one that a stored result came from; empty if in nothing.

    Settings that did not exist then are not looked at: what is new in the library leaves old runs what they were. So does its
    code, which `--check` is for; the code of somebody's own parts counts.
    """
    m = miniature_of(method)
    found = _changes("the miniature's ", stored.get("miniature"), declared(m))
    known = stored.get("arms")
    for arm in arms(method):
        entry = known.get(arm.name) if isinstance(known, Mapping) else None
        side = entry if isinstance(entry, Mapping) else {}
        now = resolved(arm, m)
        found += _changes(f"{arm.name}'s ", side.get("settings"), values(now))
        if side.get("code", "") != code_of(now):
            found.append(f"the code of {arm.name}'s own parts has changed")
    return found


def _changes(whose: str, was: Any, now: Mapping[str, Any]) -> list[str]:
    if not isinstance(was, Mapping):
        return [f"{whose}settings are not stored"]
    return [f"{whose}{k} was {was[k]}, is {now.get(k, '(absent)')}" for k in was if k not in now or was[k] != now[k]]


# -------------------------------------------------------------------- numbers
def number(run: RunResult, m: Miniature) -> float:
    """A run as one number. NaN where it has none, as where it ended without one: what it had before does not stand for it."""
    if m.metric == "peak_rss":
        return float(run.peak_rss) if run.peak_rss else np.nan
    keep = np.isfinite(run.score)
    spent, score = run.spent[keep], run.score[keep]
    if not (score.size and keep[-1]):
        return np.nan
    if m.reduce == "auc":
        return area(spent, score, float(spent[0]), float(spent[-1]))
    if m.reduce == "drops":
        span = float(np.ptp(score))
        return float((np.diff(score) < -DROP * span).sum()) if span > 0 else 0.0
    return float({"final": score[-1], "best": score.max(), "lowest": score.min()}[m.reduce])


def untrained(run: RunResult, m: Miniature) -> float:
    """The metric of a run before training. NaN where it was not recorded."""
    return float(run.score[0]) if run.score.size and run.spent[0] == 0 else np.nan


def judge(found: Estimate, m: Miniature) -> Word:
    """Whether an interval of method - baseline shows what the miniature expects, shows that it is not so, or tells neither.

    "higher" and "lower" are shown by more than the margin, and not shown by less; "not worse" is shown by no worse than it.
    """
    if found.low is None or found.high is None:
        return "undecided"
    low, high = (found.low, found.high) if m.expect != "lower" else (-found.high, -found.low)
    if m.expect == "not worse":
        return "shown" if low >= -m.margin else "not shown" if high < -m.margin else "undecided"
    return "shown" if low > m.margin else "not shown" if high <= m.margin else "undecided"


def weigh(method: Method, mine: Iterable[RunResult], theirs: Iterable[RunResult]) -> dict[str, Any]:
    """The result of a miniature from the runs of both arms: numbers over paired seeds, their difference, and the word.

    Seeds on which either arm failed are left out of the pairs and named; a method that failed anywhere is never "shown".
    For the baseline "untrained", `theirs` are the method's own runs.
    """
    m, other = miniature_of(method), baseline_name(method)
    mine, theirs = list(mine), list(theirs)
    ours, base = _numbers(mine, m, number), _numbers(theirs, m, untrained if other == UNTRAINED else number)
    pairs = sorted(ours.keys() & base.keys())
    a, b = np.array([ours[s] for s in pairs]), np.array([base[s] for s in pairs])
    found = difference(a, b) if pairs else Estimate(np.nan, None, None)
    word = judge(found, m)
    if word == "shown" and len(ours) < len(mine):
        word = "undecided"
    both = ((method.name, ours, mine), (other, base, theirs))
    return {
        "result": word,
        "difference": {"mean": found.value, "low": found.low, "high": found.high, "p": found.p, "level": found.level},
        "arms": {name: _arm(known, pairs, runs) for name, known, runs in both},
        "pairs": len(pairs),
    }


def _numbers(runs: Iterable[RunResult], m: Miniature, of: Any) -> dict[int, float]:
    found = {r.seed: of(r, m) for r in runs if r.status == "done"}
    return {s: x for s, x in found.items() if np.isfinite(x)}


def _arm(known: Mapping[int, float], pairs: list[int], runs: list[RunResult]) -> dict[str, Any]:
    found = estimate(np.array([known[s] for s in pairs])) if pairs else Estimate(np.nan, None, None)
    failed = {str(r.seed): r.error or "no number" for r in runs if r.seed not in known}
    return {
        "iqm": found.value, "low": found.low, "high": found.high, "values": {str(s): x for s, x in sorted(known.items())},
        "failed": failed,
    }  # fmt: skip


def sentence(method: Method, result: Mapping[str, Any]) -> str:
    """What came out, in words."""
    m, other = miniature_of(method), baseline_name(method)
    gap = result["difference"]
    spread = "" if gap["low"] is None else f" [{gap['low']:.3g}, {gap['high']:.3g}]"
    gained = "no seed gave a number" if gap["mean"] is None or gap["mean"] != gap["mean"] else f"{gap['mean']:+.3g}{spread}"
    what = f"{metric_name(m)} on {m.task} after {m.budget}"
    lost = len(result["arms"][method.name]["failed"])
    failed = f"; {lost} failed" if lost else ""
    pairs = f"{result['pairs']} paired seed{'' if result['pairs'] == 1 else 's'}"
    return f"{method.name} against {other}, {what}: {gained} ({goal(m)} expected; {pairs}{failed})"


def goal(m: Miniature) -> str:
    """What a miniature expects of the difference, in words."""
    more = f" by more than {m.margin:g}" if m.margin else ""
    return {"higher": f"higher{more}", "lower": f"lower{more}", "not worse": f"at most {m.margin:g} worse"}[m.expect]


def metric_name(m: Miniature) -> str:
    """The number of a run, in words."""
    name = {"peak_rss": "peak memory in bytes"}.get(m.metric, m.metric.removeprefix("eval_").replace("_", " "))
    how = {
        "final": "final {}", "auc": "mean {} over the budget", "best": "best {}", "lowest": "lowest {}", "drops": "drops of the {}",
    }  # fmt: skip
    return name if m.metric == "peak_rss" else how[m.reduce].format(name)


__all__ = [
    "UNTRAINED", "Arm", "arms", "baseline_name", "declared", "digest", "fingerprint", "goal", "judge", "metric_name",
    "miniature_of", "number", "resolved", "sentence", "stale", "untrained", "values", "weigh",
]  # fmt: skip
