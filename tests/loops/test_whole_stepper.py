"""Rules that add terms to the loss and look at the whole update batch: when they are asked, and what they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.interfaces import Problem
from polopt.loops.improve import Improve
from polopt.overrides import resolve
from polopt.parts.rule.descend import DescendStepper, FirstOrder
from polopt.registry import get_method

SEEN: list[tuple[Any, ...]] = []


class Spy(DescendStepper):
    """Notes every call; adds half the mean entropy to the loss."""

    def step(self, problem: Problem) -> dict[str, Tensor]:
        count = problem.batch.mask.sum()

        def terms(batch: Batch, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"half": 0.5 * (now["entropy"] * batch.mask).sum() / count}

        report = problem.backward(terms)
        SEEN.append(("step", problem.batch.shape[0], self.parameters[0].grad.clone()))  # type: ignore[union-attr]
        return {**report, **self.apply()}

    def begin(self, whole: Problem) -> None:
        SEEN.append(("begin", whole.batch.shape[0]))

    def after_epoch(self, whole: Problem) -> None:
        SEEN.append(("epoch", whole.batch.shape[0]))

    def finish(self, whole: Problem) -> dict[str, Tensor]:
        pieces = whole.split(20)
        joined = torch.cat([p.batch.action for p in pieces])
        SEEN.append(("finish", [p.batch.shape[0] for p in pieces], torch.equal(joined, whole.batch.action)))
        with torch.no_grad():
            each = torch.cat([p.kl_each() for p in pieces])
            assert each.mean().item() == pytest.approx(whole.kl().item(), rel=1e-4, abs=1e-8)
        return {"seen": torch.tensor(7.0)}


@dataclass(frozen=True)
class Looking(FirstOrder):
    """A rule that binds to `Spy`."""

    kind = "rule"
    name = "looking"
    host = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy@now", "kl@now"})

    def bind(self, parameters: Sequence[Tensor]) -> Spy:
        return Spy(self, parameters)


def run_one(method: str | Any, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    SEEN.clear()
    resolved = resolve(method, task, {"budget": "1-updates", "threads": 1, "optim.compile": "never", **settings})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    metrics = run.step()
    run.collector.close()
    return metrics


def test_it_is_asked_before_after_each_epoch_and_at_the_end() -> None:
    settings = {"collect.envs": 2, "collect.steps": 24, "minibatch": 16, "epochs": 2, "policy.hidden": (8,)}
    metrics = run_one(get_method("ppo").but("x", rule=Looking()), "gym:CartPole-v1", settings)
    inside = [("step", 16)] * 3 + [("epoch", 48)]
    assert [s[:2] for s in SEEN[:-1]] == [("begin", 48), *inside, *inside]
    assert SEEN[-1] == ("finish", [20, 20, 8], True)
    assert metrics["seen"] == 7.0  # as it is, not a mean over steps
    assert metrics["loss/half"] == pytest.approx(0.5 * metrics["entropy"], rel=0.05)


def test_early_stopping_still_finishes() -> None:
    settings = {"collect.envs": 2, "collect.steps": 24, "minibatch": 16, "epochs": 5, "lr": 0.1, "target_kl": 1e-6}
    run_one(get_method("ppo").but("x", rule=Looking()), "gym:CartPole-v1", settings)
    assert [s[0] for s in SEEN].count("epoch") == 1
    assert SEEN[-1][0] == "finish"


def test_terms_add_up_over_micro_batches() -> None:
    found = []
    for micro in (None, 3):
        settings = {"collect.prompts": 8, "optim.micro": micro, "minibatch": None, "epochs": 1}
        run_one(get_method("ppo").but("x", rule=Looking()), "table:lengths", settings)
        found.append(next(s[2] for s in SEEN if s[0] == "step"))
    torch.testing.assert_close(found[0], found[1])
