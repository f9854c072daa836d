"""Whether a budget can be spent: what no contestant could ever spend, or what is smaller than one update, is refused beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from polopt.errors import CallError
from polopt.evidence.compare.caveats import listed
from polopt.loops.build import iteration_size
from polopt.loops.plan import refuse_untrained
from polopt.loops.supplies import refuse_budget
from polopt.overrides import Resolved
from polopt.parts.replay import Dataset
from polopt.recipe import Length, Recipe
from polopt.run import UNITS, Budget

if TYPE_CHECKING:
    from polopt.evidence.compare.plan import Arm


def refuse_amount(text: str, arms: Iterable[Arm]) -> None:
    """Raise `CallError` for a budget in a unit that a contestant never spends, or one that is smaller than its update.

    text: the budget as settings hold it. External programs are not looked at.
    """
    runs = {a.name: a.resolved for a in arms if a.resolved is not None}
    for name, run in runs.items():
        try:
            _refuse_unit(run, run.settings.budget)
        except CallError as error:
            fit = [u for u in UNITS if all(_spends(r, u) for r in runs.values())]
            raise CallError(f"{name}: {error} (units that fit all contestants: {', '.join(fit)})") from error
    _refuse_small(text, runs)


def _refuse_unit(run: Resolved, budget: str) -> None:
    """What a run refuses when it begins; each stage of a recipe for itself."""
    own = replace(run.settings, budget=budget)
    if not isinstance(run.method, Recipe):
        refuse_budget(run.method, run.task, own)
        return
    for stage in run.method.stages:
        of_stage = replace(own, budget=stage.length) if Length.parse(stage.length).kind == "amount" else own
        refuse_budget(run.method.method_of(stage), run.task, of_stage)


def _spends(run: Resolved, unit: str) -> bool:
    try:
        _refuse_unit(run, f"1-{unit}")
    except CallError:
        return False
    return True


def _refuse_small(text: str, runs: Mapping[str, Resolved]) -> None:
    budget = Budget.parse(text)
    if budget.unit == "updates" and budget.amount < 1:
        raise CallError(f"budget {text} is smaller than one update; the smallest is 1-updates")
    least: dict[str, int] = {}
    for name, run in runs.items():
        if not isinstance(run.method, Recipe):  # a stage may take over what another one collected
            refuse_untrained(run.method, run.settings)
        if budget.unit in LEAST:
            least[name] = LEAST[budget.unit](run)
    worst = max(least, key=lambda name: least[name], default=None)
    if worst is not None and least[worst] > budget.amount:
        takes = f"{'at least ' * (budget.unit == 'tokens')}{least[worst]:,} {budget.unit}"
        raise CallError(
            f"budget {text} is smaller than one update of {worst}, which takes {takes}; "
            f"the smallest budget that works for all contestants is {least[worst]}-{budget.unit}"
        )


def _decisions(run: Resolved) -> int:
    return iteration_size(run.task, run.method, run.settings)[0]


def _rounds(run: Resolved) -> int:
    """Rounds of a run's first iteration that makes any: they are made all or none."""
    source: Any = run.method.source
    if isinstance(run.method, Recipe):
        return 1
    if isinstance(source, Dataset):
        return int(source.rounds)
    block, ratio = run.settings.collect.steps * run.settings.collect.envs, Fraction(repr(source.utd))
    # the first iteration after which a whole round is due, of those that come after the first `start` decisions
    iterations = math.ceil((source.start + 1 / ratio) / block)
    return int((iterations * block - source.start) * ratio)


#: The least that one update spends, in the units in which it is known before a run.
LEAST: Mapping[str, Callable[[Resolved], int]] = {"decisions": _decisions, "tokens": _decisions, "rounds": _rounds}


def doubtful(text: str, arms: Iterable[Arm]) -> str:
    """A sentence where one update of a contestant probably spends more than the whole budget; empty if none does.

    It cannot be known before the run: completions end when they end, at the latest at `collect.max_new_tokens`.
    """
    budget, found = Budget.parse(text), []
    for arm in arms:
        run = arm.resolved
        if run is None or budget.unit not in ("decisions", "tokens"):
            continue
        least, most = iteration_size(run.task, run.method, run.settings)
        # every token is written once, and read by every pass of the updates over it
        passes = 1 + sum(u.epochs for u in run.method.updates) if budget.unit == "tokens" else 1
        if most is not None and least < most and most * passes > budget.amount:
            found.append(f"{arm.name} (about {most * passes:,} {budget.unit})")
    if not found:
        return ""
    return (
        f"the budget of {text} is probably less than one update of {listed(found)}, where completions run to their limit "
        "collect.max_new_tokens: it would be overspent"
    )


__all__ = ["doubtful", "refuse_amount"]
