"""What can be said about a run before it starts: its number of updates and whether compiling pays."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from polopt.interfaces import Task
from polopt.loops.compiled import can_compile
from polopt.loops.executor import Executor
from polopt.method import Method
from polopt.part import Can
from polopt.run import Budget
from polopt.settings import Settings

#: Below this many small gradient steps a run ends sooner without compiling (10 to 15 s once, 1 ms saved per step).
STEPS_WORTH_COMPILING = 12_000
#: Steps per graph from this many planned steps on: a larger graph runs faster and compiles longer (10, 25, 50 s).
STEPS_PER_GRAPH = {0: 1, 100_000: 4, 500_000: 8}


def decisions_per_iteration(method: Method, task: Task, settings: Settings) -> int | None:
    """Decisions that one iteration collects; an upper bound for text, None where episodes end when they end."""
    group = int(getattr(method.sampler, "group_size", 1))
    collect = settings.collect
    if task.domain == "text":
        return collect.prompts * group * collect.max_new_tokens
    if method.requires() & {Can.EPISODES, Can.GROUPS}:
        return None
    return collect.envs * collect.steps


def planned_updates(method: Method, task: Task, settings: Settings) -> int | None:
    """Iterations that the budget allows (at least, where completions may end early), or None when that is unknown."""
    budget = Budget.parse(settings.budget)
    if budget.unit == "updates":
        return math.ceil(budget.amount)
    each = decisions_per_iteration(method, task, settings)
    return math.ceil(budget.amount / each) if each and budget.unit == "decisions" else None


@dataclass(frozen=True)
class Compile:
    """From which iteration on updates are compiled (None: never), and the most gradient steps in one graph."""

    start: int | None = None
    steps: int = 1


def compile_plan(method: Method, task: Task, settings: Settings, executors: Iterable[Executor]) -> Compile:
    """Whether and how compiling pays, decided once from the configuration and kept in the checkpoint."""
    optim = settings.optim
    able = [e for e in executors if can_compile(e)]
    if optim.compile == "never" or not able:
        return Compile()
    updates, each = planned_updates(method, task, settings), decisions_per_iteration(method, task, settings)
    planned = updates * sum(e.steps_per_batch(each) for e in able) if updates and each else 0
    most = optim.compile_steps or max(k for least, k in STEPS_PER_GRAPH.items() if planned >= least)
    if optim.compile == "always" or optim.compile_from is not None:
        return Compile(optim.compile_from or 0, most)
    return Compile(0, most) if planned >= STEPS_WORTH_COMPILING else Compile()
