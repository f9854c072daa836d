"""The whole chain on the real task: the shipped model, its preset, and a few updates."""

from __future__ import annotations

import pytest

from polopt.loops.improve import Improve
from polopt.overrides import resolve


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_few_updates_raise_held_out_accuracy(name: str) -> None:
    found = resolve(name, "text:spell_backward", {"budget": "12-updates", "seed": 1, "threads": 1})
    run = Improve(found.method, found.task, found.settings)
    before = run.collector.evaluate(128)["score"]
    for _ in range(12):
        run.step()
    after = run.collector.evaluate(128)["score"]
    assert before < 0.5
    assert after > before + 0.2
