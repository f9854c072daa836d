"""Small recipes and runs of them, for tests of stages."""

from __future__ import annotations

from typing import Any

from polopt.loops.drive import build_run
from polopt.loops.stages import Staged
from polopt.method import Method
from polopt.overrides import resolve
from polopt.recipe import Recipe, Stage
from polopt.registry import get_method

GRPO = get_method("grpo").but("plain", penalty=())
SMALL = {"collect.prompts": 4, "evaluate.points": 4, "evaluate.every": 0}


def two(*stages: Stage, base: Method = GRPO, name: str = "two", **changes: Any) -> Recipe:
    return Recipe.of(base, name, stages=stages, **changes)


def built(recipe: Method, budget: str = "10-updates", task: str = "table:arms", **over: Any) -> Staged:
    run = build_run(resolve(recipe, task, {**SMALL, "budget": budget, **over}))
    assert isinstance(run, Staged)
    return run
