"""What can be said about a run before it starts: its number of updates and whether compiling pays."""

from __future__ import annotations

from collections.abc import Iterable

from polopt.loops.compiled import can_compile
from polopt.loops.executor import Executor
from polopt.run import Budget
from polopt.settings import Settings


def compile_from(settings: Settings, executors: Iterable[Executor], budget: Budget) -> int | None:
    """The iteration at which compiled updates start, decided once and kept in the checkpoint; None: never."""
    optim = settings.optim
    if optim.compile_from is not None:
        return optim.compile_from
    if optim.compile == "never" or not any(can_compile(e) for e in executors):
        return None
    return 0 if optim.compile == "always" else None
