"""Diagnostics of actor-critics: values against returns, TD errors, dormant units."""

from __future__ import annotations

import math

import pytest
import torch
from test_rounds import build, tensors, warm

from polopt.loops.inspect import against_returns, dormant, inspect


@pytest.mark.parametrize(("method", "task"), [
    ("ddpg", "gym:Pendulum-v1"), ("sac", "gym:Pendulum-v1"), ("sac-v1", "gym:Pendulum-v1"), ("sac-discrete", "gym:CartPole-v1"),
])  # fmt: skip
def test_evaluations_tell_how_the_critic_does(method: str, task: str) -> None:
    run = build(method, task, source__start=8)
    warm(run)
    found = run.measure()
    assert found["td_error_q05"] <= found["td_error_q50"] <= found["td_error_q95"]
    assert 0 <= found["dormant_policy"] <= 1
    assert 0 <= found["dormant_critic"] <= 1
    assert all(math.isfinite(v) for v in found.values())


def test_measuring_changes_nothing() -> None:
    one, two = build("sac"), build("sac")
    for run in (one, two):
        warm(run)
    one.measure()
    for run in (one, two):
        run.step()
    a, b = tensors(one), tensors(two)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_gap_is_the_value_less_the_return_that_followed() -> None:
    run = build("sac-discrete", "gym:CartPole-v1", source__start=64, evaluate__episodes=1)
    for _ in range(20):
        run.step()
    batch, returns = run.supply.monte_carlo(0.99)
    assert len(returns) > 5
    for p in run.policy.extra["critic"].parameters():
        with torch.no_grad():
            p.zero_()
    found = against_returns(run.executors, run.policy, run.supply, 0.99)
    assert found["q_return_gap"] == pytest.approx(-float(returns.mean()), rel=1e-6)
    assert batch.shape[0] == len(returns)


def test_dormant_units_are_those_that_hardly_act() -> None:
    run = build("ddpg")
    warm(run)
    batch = run.supply.sample_for(16, torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = run.policy.policy.trunk[0]
        first.weight[:4].zero_()
        first.bias[:4].zero_()
    assert dormant(run.policy, batch)["dormant_policy"] >= 4 / 32


def test_nothing_is_told_before_anything_is_kept() -> None:
    run = build("sac")
    assert inspect(run.executors, run.policy, run.supply, 0.99) == {}
