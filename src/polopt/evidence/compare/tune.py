"""Equal tuning: as many settings for each contestant, tried on seeds of their own, the best one taken into the comparison.

Trials are proposed by Optuna's TPE in generations of fixed size, so that the same scores lead to the same trials however many
run side by side; the first trial is the setting as it is. Runs of trials lie under `tune/<contestant>/t<trial>/s<seed>` and are
reused like any others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polopt.errors import CallError, unknown
from polopt.evidence.compare.plan import Arm, Asked, arm_of, tuning_seeds
from polopt.evidence.compare.results import Contestant
from polopt.paths import canonical, guess
from polopt.run import RunFolder

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import Trial

    from polopt.evidence.compare.schedule import Job

MakeJobs = Callable[[Arm, Path, Sequence[int]], "list[Job]"]
#: Trials that are proposed together.
GENERATION = 4
#: Settings that decide how far an update moves, by preference; and the range around their present value.
RATES, AROUND = ("lr", "delta"), 10.0


@dataclass
class _Search:
    """The search of one contestant."""

    arm: Arm
    space: Mapping[str, BaseDistribution]
    first: Mapping[str, Any]
    study: Study
    trials: list[dict[str, Any]] = field(default_factory=list)  # number, values, scores by seed, mean
    asked: list[tuple[Trial, Arm, Path]] = field(default_factory=list)


def tune(asked: Asked, arms: Sequence[Arm], root: Path, make_jobs: MakeJobs, run: Callable[[Sequence[Job]], bool]) -> list[Arm]:
    """The contestants with the best setting found for each; external programs as they are.

    run carries out jobs and says whether to go on. Raises `CallError` without Optuna, or for a search that fits no contestant.
    """
    searches = [_begin(asked, arm) for arm in arms if arm.resolved is not None]
    going = True
    while going and any(len(s.trials) < asked.tune for s in searches):
        for s in searches:
            _propose(asked, s, root)
        jobs = [make_jobs(arm, path, tuning_seeds(asked)) for s in searches for _, arm, path in s.asked]
        for job in itertools.chain(*jobs):
            job.trial = job.folder.parent.name
        going = run([job for same_seed in zip(*jobs, strict=True) for job in same_seed])
        if going:
            for s in searches:
                _judge(asked, s)
    for s in searches:
        (root / s.arm.entry.folder).mkdir(parents=True, exist_ok=True)
        RunFolder(root / s.arm.entry.folder).write_json("trials.json", s.trials)
    found = {s.arm.name: _best(asked, s) for s in searches}
    return [found.get(a.name) or Arm(a.entry, note=f"{a.name} is an external program and was not tuned") for a in arms]


def _begin(asked: Asked, arm: Arm) -> _Search:
    try:
        import optuna
    except ImportError as error:
        raise CallError("--tune needs Optuna: pip install 'polopt[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, first = search_space(asked, arm)
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=max(GENERATION, asked.tune // 2), multivariate=False)
    study = optuna.create_study(sampler=sampler, direction="maximize" if asked.higher_is_better else "minimize")
    if first:
        study.enqueue_trial(dict(first))
    return _Search(arm, space, first, study)


def _propose(asked: Asked, s: _Search, root: Path) -> None:
    """Ask for the next generation."""
    s.asked = []
    for number in range(len(s.trials), min(len(s.trials) + GENERATION, asked.tune)):
        trial = s.study.ask(dict(s.space))
        # the first trial is the setting as it is, also where that lies outside of the range
        values = {} if number == 0 else dict(trial.params)
        s.asked.append((trial, arm_of(asked, s.arm.entry, values), root / s.arm.entry.folder / f"t{number}"))


def _judge(asked: Asked, s: _Search) -> None:
    """Tell the scores of a generation, in order."""
    from optuna.trial import TrialState

    for trial, arm, path in s.asked:
        scores = {str(seed): final_score(asked, arm, path / f"s{seed}", seed) for seed in tuning_seeds(asked)}
        counted = [x for x in scores.values() if x is not None]
        mean = sum(counted) / len(counted) if len(counted) == len(scores) else None
        if mean is None or (not arm.tuned and not s.first):  # the preset, outside of the range: no point of the space
            s.study.tell(trial, state=TrialState.FAIL)
        else:
            s.study.tell(trial, mean)
        s.trials.append({"trial": len(s.trials), "values": dict(arm.tuned), "scores": scores, "mean": mean})


def final_score(asked: Asked, arm: Arm, folder: Path, seed: int) -> float | None:
    """The last score of a run, None if it does not count."""
    from polopt.evidence.compare.read import read_run

    plan = {"metric": asked.metric, "unit": asked.budget.unit, "budget": asked.budget.amount}
    found = read_run(folder, Contestant(arm.name), seed, plan)
    return float(found.score[-1]) if found.status == "done" and len(found.score) else None


def _best(asked: Asked, s: _Search) -> Arm:
    """The contestant with its best setting; as it was where no trial came through, or none is better."""
    sign = 1.0 if asked.higher_is_better else -1.0
    counted = [t for t in s.trials if t["mean"] is not None]
    if not counted:
        note = "" if len(s.trials) < asked.tune else f"{s.arm.name}: no trial of tuning came through; its setting stays as it was"
        return Arm(s.arm.entry, s.arm.layers, s.arm.resolved, note=note)
    best = max(counted, key=lambda t: (sign * t["mean"], -t["trial"]))
    return replace(arm_of(asked, s.arm.entry, best["values"]), trials=len(s.trials))


# -------------------------------------------------------------------- what is varied
def search_space(asked: Asked, arm: Arm) -> tuple[dict[str, BaseDistribution], dict[str, Any]]:
    """Distributions by path, and the values that the contestant has now."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    assert arm.resolved is not None
    leaves = arm.resolved.leaves()
    space: dict[str, BaseDistribution] = {}
    first: dict[str, Any] = {}
    for text in asked.search:
        path, low, high, log, choices = read_search(text)
        full = canonical(path, arm.resolved.method)
        if full not in leaves:
            raise CallError(f"--search {text}: {arm.name} has {unknown('setting', path, leaves)}".replace("has unknown", "has no"))
        now = leaves[full].value
        if choices:
            space[full] = CategoricalDistribution(choices)
        elif isinstance(now, int) and not isinstance(now, bool) and low == int(low) and high == int(high):
            space[full] = IntDistribution(int(low), int(high), log=log)
        else:
            space[full] = FloatDistribution(low, high, log=log)
        shown = getattr(now, "name", now)
        if shown in choices if choices else isinstance(shown, int | float) and low <= shown <= high:
            first[full] = shown
    if not asked.search:
        for update in arm.resolved.method.updates:
            paths = [f"updates.{update.name}.rule.{r}" for r in RATES if f"updates.{update.name}.rule.{r}" in leaves][:1]
            for path in paths:
                now = float(leaves[path].value)
                if now > 0:
                    space[path], first[path] = FloatDistribution(now / AROUND, now * AROUND, log=True), now
    if not space:
        raise CallError(f"--tune: {arm.name} has no learning rate to vary; say what with --search PATH=LOW..HIGH")
    return space, first if len(first) == len(space) else {}


def read_search(text: str) -> tuple[str, float, float, bool, list[Any]]:
    """`lr=1e-4..1e-2:log` or `surrogate.high=0.1|0.2|0.3`: path, low, high, whether logarithmic, choices."""
    path, equals, rest = text.partition("=")
    wrong = CallError(f"--search '{text}': write PATH=LOW..HIGH, PATH=LOW..HIGH:log or PATH=A|B|C")
    if not equals or not path.strip() or not rest.strip():
        raise wrong
    path = path.strip().removeprefix("--")
    if "|" in rest:
        return path, 0.0, 0.0, False, [guess(w.strip()) for w in rest.split("|")]
    span, _, scale = rest.partition(":")
    low_text, dots, high_text = span.partition("..")
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        raise wrong from None
    if not dots or scale not in ("", "log") or not (math.isfinite(low) and math.isfinite(high)):
        raise wrong
    if low >= high or (scale and low <= 0):
        raise CallError(f"--search '{text}': the lower end must be below the upper one" + (", and positive" * bool(scale)))
    return path, low, high, bool(scale), []


__all__ = ["read_search", "search_space", "tune"]
