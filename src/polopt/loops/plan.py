"""What can be said about a run before it starts: its number of updates and whether compiling pays."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from polopt.interfaces import Task
from polopt.loops.build import iteration_size
from polopt.loops.compiled import can_compile
from polopt.loops.executor import Executor
from polopt.method import Method
from polopt.run import Budget
from polopt.settings import Settings

#: Below this many small gradient steps a run ends sooner without compiling (10 to 15 s once, 1 ms saved per step).
STEPS_WORTH_COMPILING = 12_000
#: Steps per graph from this many planned steps on: a larger graph runs faster and compiles longer (10, 25, 50 s).
STEPS_PER_GRAPH = {0: 1, 100_000: 4, 500_000: 8}


def planned_updates(method: Method, task: Task, settings: Settings) -> tuple[int, int] | None:
    """Fewest and most iterations that the budget allows; None when only time or tokens limit it."""
    budget = Budget.parse(settings.budget)
    if budget.unit == "updates":
        return (math.ceil(budget.amount),) * 2
    if budget.unit != "decisions":
        return None
    low, high = iteration_size(task, method, settings)
    return math.ceil(budget.amount / high) if high else 1, math.ceil(budget.amount / low)


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
    updates, (low, _) = planned_updates(method, task, settings), iteration_size(task, method, settings)
    planned = updates[0] * sum(e.steps_per_batch(low) for e in able) if updates else 0
    most = optim.compile_steps or max(k for least, k in STEPS_PER_GRAPH.items() if planned >= least)
    if optim.compile == "always" or optim.compile_from is not None:
        return Compile(optim.compile_from or 0, most)
    return Compile(0, most) if planned >= STEPS_WORTH_COMPILING else Compile()
