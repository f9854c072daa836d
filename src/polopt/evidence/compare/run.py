"""`compare`: run every contestant on every seed, side by side, and read, weigh and show what came out."""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polopt.errors import CallError, Note, PoloptError
from polopt.evidence.compare.amounts import doubtful
from polopt.evidence.compare.entries import entries_of, external_entries, plain
from polopt.evidence.compare.jobs import Jobs
from polopt.evidence.compare.live import Table
from polopt.evidence.compare.place import alone, folder_of
from polopt.evidence.compare.plan import (
    EPISODES,
    Arm,
    Asked,
    command_of,
    external_words,
    ready,
    seeds_of,
    seeds_text,
)
from polopt.evidence.compare.read import PLAN, SPENT, read_comparison
from polopt.evidence.compare.results import Comparison
from polopt.evidence.compare.schedule import Job, Scheduler
from polopt.evidence.compare.worker import modules_for
from polopt.loops.plan import planned_updates
from polopt.run import Budget, RunFolder, environment

if TYPE_CHECKING:
    from polopt.evidence.compare.findings import Analysis


@dataclass
class Compared:
    """A comparison, what it says, and the page that shows it. signal: what interrupted it, if something did."""

    comparison: Comparison
    analysis: Analysis = field(repr=False)
    page: Path | None = None
    signal: int | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path | None:
        """Where everything lies."""
        return self.comparison.folder

    @property
    def words(self) -> str:
        """The verdicts in words."""
        from polopt.evidence.compare.verdict import verdict

        return "\n".join(verdict(self.analysis))

    def __str__(self) -> str:
        return self.words


def ask(
    contestants: Any,
    task: Any,
    *,
    budget: str,
    seeds: int | str | Sequence[int] = 5,
    baseline: str | None = None,
    metric: str = "eval_score",
    lower_is_better: bool = False,
    points: int = 10,
    episodes: int | None = None,
    tune: int = 0,
    tune_seeds: int = 2,
    search: Sequence[str] = (),
    external: Mapping[str, str] | Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    source: str = "call",
    **settings: Any,
) -> Asked:
    """What is to be compared, in one value; source says where settings were given. Raises `CallError` for unknown names."""
    given = dict(overrides or {}) | {k.replace("__", "."): v for k, v in settings.items()}
    entries = [*(entries_of(contestants) if contestants else []), *external_entries(external)]
    return Asked(
        entries=tuple(entries), task=task, seeds=seeds_of(seeds), budget=Budget.parse(budget), settings=given, points=points,
        episodes=episodes, metric=metric, higher_is_better=not lower_is_better, baseline=baseline, tune=tune,
        tune_seeds=tune_seeds, search=tuple(search), source=source,
    )  # fmt: skip


def compare(
    contestants: Any,
    task: Any,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    timeout: float | None = None,
    page: bool = True,
    quiet: bool = True,
    **asking: Any,
) -> Compared:
    """Run what was asked for (see `polopt.compare` and `ask`): every contestant on every seed, side by side.

    Raises `PoloptError` once a run that ended shows that the metric does not exist. Without a page every run is carried out all the
    same, and counts as failed: the caller reads the runs themselves.
    """
    comparing = _begin(contestants, task, out, jobs, timeout, quiet, asking)
    if said := doubtful(comparing.asked.text, comparing.arms):
        warnings.warn(said, Note, stacklevel=2)
    with alone(comparing.folder) as lock:
        try:
            return comparing.carry_out(page=page, lock=lock)
        except OSError as error:
            where = f"{error.filename or comparing.folder}: {error.strerror or error}"
            raise PoloptError(f"{where}; what was saved is kept, continue with: {comparing.command}") from error


def describe(
    contestants: Any,
    task: Any,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    timeout: float | None = None,
    **asking: Any,
) -> str:
    """What `compare` would run with the same arguments, in words; runs nothing and writes nothing."""
    comparing = _begin(contestants, task, out, jobs, timeout, True, asking)
    comparing.jobs.refuse_others(comparing.arms)
    return comparing.describe()


def _begin(
    contestants: Any,
    task: Any,
    out: str | Path | None,
    jobs: int | None,
    timeout: float | None,
    quiet: bool,
    asking: dict[str, Any],
) -> _Comparing:
    asked = ask(contestants, task, **asking)
    if jobs is not None and jobs < 1:
        raise CallError(f"--jobs {jobs}: at least 1 is needed")
    if timeout is not None and not timeout > 0:
        raise CallError(f"--timeout {timeout:g}: must be positive")
    arms = ready(asked)
    return _Comparing(asked, arms, folder_of(asked, out), jobs, timeout, quiet)


class _Comparing:
    """One call of `compare`, while it goes on."""

    def __init__(self, asked: Asked, arms: list[Arm], folder: Path, jobs: int | None, timeout: float | None, quiet: bool) -> None:
        self.asked, self.arms, self.folder, self.quiet = asked, arms, folder, quiet
        accelerated = any(a.resolved is not None and a.resolved.settings.device != "cpu" for a in arms)
        self.slots = jobs or (1 if accelerated else len(os.sched_getaffinity(0)))
        self.timeout = timeout
        self.versions = {**environment(), "cpu": _cpu()}
        self.jobs = Jobs(asked, folder, self.versions)
        self.notes: list[str] = []
        self.command = command_of(asked, folder, jobs)

    def carry_out(self, *, page: bool, lock: int | None = None) -> Compared:
        """Tune, run, read, weigh, show. lock: an open file to be held as long as any run lives."""
        if not self.asked.tune:
            self.jobs.refuse_others(self.arms)
        domains = dict.fromkeys(a.resolved.task.domain for a in self.arms if a.resolved is not None)
        modules = [m for d in domains for m in modules_for(d)]
        scheduler = Scheduler(self.folder, self.slots, modules, _Silent(), timeout=self.timeout, lock=lock)
        scheduler.metric_exists = not page  # or so it is taken: nobody looks
        self.save_plan()
        try:
            if self.asked.tune:
                from polopt.evidence.compare.tune import tune

                go = partial(self.run, scheduler, what="tuning")
                self.arms = tune(self.asked, self.arms, self.folder / "tune", self.jobs.make, go)
                self.notes += [a.note for a in self.arms if a.note]
                self.save_plan()
                if scheduler.signal is None:
                    self.jobs.refuse_others(self.arms)
            if scheduler.signal is None:
                jobs = [self.jobs.make(arm, self.jobs.place(arm), self.asked.seeds) for arm in self.arms]
                paired = [job for same_seed in zip(*jobs, strict=True) for job in same_seed]
                scheduler.idle = _weighing
                self.run(scheduler, paired)
        finally:
            scheduler.close()
        found = read_comparison(self.folder)
        from polopt.evidence.compare.analysis import analyse

        analysis = analyse(found)
        if not page or scheduler.signal is not None:
            return Compared(found, analysis, None, scheduler.signal)
        from polopt.evidence.compare.page import make_page

        return Compared(found, analysis, make_page(found, analysis, self.folder))

    def describe(self) -> str:
        """Contestants, runs and updates, before anything runs."""
        a = self.asked
        lines = [
            f"{len(self.arms)} x {len(a.seeds)} runs on {a.task_name}, {a.text} each, {self.slots} at a time, in {self.folder}"
        ]
        for arm in self.arms:
            words = [f"  {arm.name}:"]
            if arm.resolved is None:
                words.append(shlex.join(external_words(a, arm.entry, a.seeds[0], self.jobs.place(arm) / f"s{a.seeds[0]}")))
            elif (updates := planned_updates(arm.resolved.method, arm.resolved.task, arm.resolved.settings)) is not None:
                words.append(f"{updates[0]:,}{f' to {updates[1]:,}' * (updates[0] < updates[1])} updates per run")
            there = sum(self.jobs.finished(arm, seed) for seed in a.seeds)
            lines.append(" ".join(words) + f" ({there} of {len(a.seeds)} runs are there)" * bool(there))
        if a.tune:
            from polopt.evidence.compare.tune import search_space

            for arm in self.arms:
                if arm.resolved is not None:
                    search_space(a, arm)  # refuses what cannot be searched
            lines.append(f"before that {a.tune} settings x {a.tune_seeds} seeds for each method to tune it")
        if said := doubtful(a.text, self.arms):
            lines.append(f"note: {said}")
        return "\n".join(lines)

    def run(self, scheduler: Scheduler, jobs: Sequence[Job], what: str = "comparing") -> bool:
        """Run jobs under a table; False when a signal ended it."""
        for job in jobs if scheduler.signal is None else ():
            if job.state == "done":
                scheduler.look_for_metric(job)
        self._refuse_metric(scheduler, jobs)
        if scheduler.signal is not None or not any(j.state == "waiting" for j in jobs):
            return scheduler.signal is None
        there = sum(j.state == "done" for j in jobs)
        a = self.asked
        title = f"{what}: {', '.join(x.name for x in self.arms)} on {a.task_name}, {a.text}, "
        title += f"seeds {seeds_text(sorted({j.seed for j in jobs}))}, {self.slots} at a time"
        title += f"; {there} of {len(jobs)} runs are there already" * bool(there)
        table = Table(
            jobs,
            budget=a.budget.amount,
            key=SPENT.get(a.budget.unit, a.budget.unit),
            metric=a.metric,
            title=title,
            quiet=self.quiet,
        )
        scheduler.watcher = table
        try:
            scheduler.run(jobs)
        finally:
            table.close()
            scheduler.watcher = _Silent()
        self._refuse_metric(scheduler, jobs)
        return scheduler.signal is None

    def _refuse_metric(self, scheduler: Scheduler, jobs: Sequence[Job]) -> None:
        """Raise `PoloptError` where a run that ended shows that the metric does not exist."""
        if scheduler.absent:
            left = sum(j.state in ("waiting", "unfinished") for j in jobs)
            raise PoloptError(
                f"{scheduler.absent}. {left} of {len(jobs)} runs were not begun; what ran is kept in {self.folder}, and is used "
                "when the same command is given with another --metric"
            )

    # --------------------------------------------------------------------------------------------------------- the plan
    def save_plan(self) -> None:
        """Write what was asked, from which `read_comparison` reads the whole."""
        a = self.asked
        contestants = [_contestant(arm) for arm in self.arms]
        try:
            before = json.loads((self.folder / PLAN).read_text(encoding="utf-8")).get("notes", [])
        except (OSError, ValueError, AttributeError):
            before = []
        RunFolder(self.folder).write_json(
            PLAN,
            {
                "format": 1, "task": a.task_name, "budget": a.budget.amount, "unit": a.budget.unit, "metric": a.metric,
                "higher_is_better": a.higher_is_better, "seeds": list(a.seeds), "contestants": contestants,
                "folders": {arm.name: f"runs/{arm.entry.folder}" for arm in self.arms}, "baseline": a.baseline,
                "settings": {k: _plain(v) for k, v in a.settings.items()}, "command": self.command,
                "episodes": self._episodes(), "points": a.points, "jobs": self.slots, "tune": a.tune,
                "notes": list(dict.fromkeys([*before, *self.notes])), "versions": self.versions,
            },
        )  # fmt: skip

    def _episodes(self) -> int:
        found = [a.resolved.settings.evaluate.episodes for a in self.arms if a.resolved is not None]
        return found[0] if found else self.asked.episodes or EPISODES


def _contestant(arm: Arm) -> dict[str, Any]:
    """A contestant as the plan has it."""
    method = arm.resolved.method if arm.resolved is not None else None
    return {
        "name": arm.name, "method": "" if method is None else method.name, "title": "" if method is None else method.title,
        "command": arm.entry.command, "settings": {k: _plain(v) for k, v in arm.entry.settings.items()},
        "tuned": {k: _plain(v) for k, v in arm.tuned.items()}, "trials": arm.trials,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "name", None) or getattr(value, "__name__", None) or plain(value)


def _weighing() -> None:
    """Import what is needed after the last run."""
    for name in ("polopt.evidence.compare.analysis", "polopt.evidence.compare.page", "matplotlib.figure"):
        import_module(name)


class _Silent:
    """Watches nothing."""

    def started(self, job: Job) -> None: ...

    def ended(self, job: Job) -> None: ...

    def tick(self) -> None: ...


def _cpu() -> str | None:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


__all__ = ["Compared", "ask", "compare", "describe"]
