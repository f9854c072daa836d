"""Micro-batches change neither the loss nor the step, through the whole loop and for every language method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import polopt
from polopt.loops.improve import Improve
from polopt.overrides import resolve

METHODS = [
    "reinforce", "rloo", "reinforce-baseline", "ppo-lm", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "sapo", "clip-cov", "kl-cov",
    "bnpo", "gdpo", "bapo",
]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "budget": "9-updates", "threads": 1, "collect.prompts": 4, "collect.max_new_tokens": 8, "evaluate.episodes": 2,
    # plain descent: Adam would blow rounding errors of vanishing gradients up to full steps
    "updates.policy.rule.optimizer": "sgd", "updates.policy.rule.lr": 0.05,
}  # fmt: skip


def step(name: str, micro: int | None) -> tuple[torch.Tensor, dict[str, float]]:
    method = polopt.method(name)
    settings = {**SETTINGS, "optim.micro": micro}
    if hasattr(method.sampler, "group_size"):
        settings["sampler.group_size"] = 2 if method.sampler.group_size > 1 else 1
    resolved = resolve(name, "text:spell_backward", settings)
    run = Improve(resolved.method, resolved.task, resolved.settings)
    metrics = run.step()
    run.collector.close()
    return run.flat.data.clone(), metrics


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_add_up(name: str) -> None:
    whole, a = step(name, None)
    parts, b = step(name, 3)  # divides no batch here: the last micro-batch is smaller
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    for key in ("loss", "kl_old", "grad_norm"):
        if key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key
    assert a["grad_norm"] > 0


@pytest.mark.parametrize(("name", "more"), [("kl-cov", True), ("sapo", False)])
def test_the_pass_of_a_survey_is_charged(name: str, more: bool) -> None:
    """Parts that look at a whole minibatch cost one more pass where it is cut into micro-batches."""
    whole, cut = (tokens_of(name, micro) for micro in (None, 3))
    assert (cut > whole) is more


def tokens_of(name: str, micro: int | None) -> float:
    resolved = resolve(name, "text:spell_backward", {**SETTINGS, "optim.micro": micro, "minibatches": 1, "sampler.group_size": 2})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    metrics = run.step()
    run.collector.close()
    return metrics["tokens"]
