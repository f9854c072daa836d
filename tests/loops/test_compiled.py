"""Compiled steps make the same numbers as eager ones, for every rule and method that offers them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import polopt.loops.compiled as compiled_steps
from polopt import objective
from polopt.batch import Batch, Clock, Final
from polopt.loops.executor import Executor
from polopt.loops.flat import FlatParameters
from polopt.method import Method
from polopt.parts.rule.descend import Descend
from polopt.policies.mlp import MLPPolicy
from polopt.policies.mlp_spaces import Action, Observation
from polopt.registry import get_method
from polopt.settings import OptimSettings, PolicySettings
from polopt.stats import OLD, split, with_prerequisites

B, T, D = 4, 16, 3


@pytest.fixture(autouse=True)
def recorded_only(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Run the recorded program as it is; one test (marked) also goes through the compiler, which takes seconds."""
    if "inductor" not in request.keywords:
        monkeypatch.setattr(compiled_steps, "BACKEND", "eager")


def spaces() -> tuple[Observation, Action]:
    import gymnasium as gym

    box = gym.spaces.Box(-1.0, 1.0, (D,))
    return Observation.of(box, "test"), Action.of(gym.spaces.Discrete(2), "test")


def batch_of(policy: MLPPolicy, method: Method, seed: int) -> tuple[Batch, torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(B, T, dtype=torch.bool)
    final = Final(torch.stack([torch.arange(B), torch.full((B,), T - 1)], 1), torch.randn(B, D, generator=g))
    batch = Batch(
        mask=mask, reward=torch.randn(B, T, 1, generator=g), terminated=torch.rand(B, T, generator=g) < 0.1,
        truncated=torch.zeros_like(mask), obs=torch.randn(B, T, D, generator=g),
        action=torch.randint(0, 2, (B, T), generator=g), horizon=T, final=final,
    )  # fmt: skip
    needs = with_prerequisites(method.needs())
    batch = batch.adding({f"{k}@old": v for k, v in policy.evaluate(batch, split(needs)["old"] - {"return"}, OLD).items()})
    update, memory = method.update(), method.memory()
    batch = batch.adding({"return@old": objective.returns(method, update, batch, memory)})
    return batch, objective.advantages(method, update, batch, memory)


def trained(method: Method, compiled: list[bool], **policy: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], Executor]:
    torch.manual_seed(0)
    net = MLPPolicy(*spaces(), PolicySettings(hidden=(8,), **policy), method.nets(), 0)
    flat = FlatParameters(net.nets())
    executor = Executor(
        method, method.update(), net, flat, method.memory(), OptimSettings(),
        torch.Generator().manual_seed(1), torch.Generator().manual_seed(2),
    )  # fmt: skip
    info: dict[str, torch.Tensor] = {}
    for i, how in enumerate(compiled):
        batch, advantage = batch_of(net, method, i)
        info = executor.run(batch, advantage, Clock(i, 0.1 * i), compiled=4 if how else 0)
    return flat.data.clone(), info, executor


PPO = get_method("ppo")
RULES = {
    "adam": Descend(eps=1e-5),
    "adamw": Descend(optimizer="adamw", weight_decay=0.1, schedule="linear"),
    "rmsprop-tf": Descend(optimizer="rmsprop-tf", lr=7e-4, eps=1e-5),
    "sgd": Descend(optimizer="sgd", lr=0.1, momentum=0.9, max_grad_norm=None),
}


@pytest.mark.parametrize("rule", RULES)
def test_compiled_equals_eager(rule: str) -> None:
    method = PPO.but("m", rule=RULES[rule], epochs=2, minibatch=32)
    eager, a, _ = trained(method, [False, False])
    mixed, b, executor = trained(method, [False, True])
    assert executor.compiled is not None
    torch.testing.assert_close(mixed, eager, rtol=1e-4, atol=2e-6)
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name].float(), b[name].float(), rtol=1e-3, atol=1e-5, msg=name)


def test_remainder_minibatches_and_one_step_updates() -> None:
    method = PPO.but("m", rule=RULES["adam"], epochs=2, minibatch=24)
    torch.testing.assert_close(trained(method, [True])[0], trained(method, [False])[0], rtol=1e-4, atol=2e-6)
    a2c = get_method("a2c")
    torch.testing.assert_close(trained(a2c, [True, True])[0], trained(a2c, [False, False])[0], rtol=1e-4, atol=2e-6)


def test_observation_statistics_are_inputs_not_constants() -> None:
    method = PPO.but("m", rule=RULES["adam"], epochs=1, minibatch=64)

    def run(compiled: bool) -> torch.Tensor:
        net = MLPPolicy(*spaces(), PolicySettings(hidden=(8,), normalize_obs=True), method.nets(), 0)
        flat = FlatParameters(net.nets())
        g = torch.Generator().manual_seed(1)
        executor = Executor(method, method.update(), net, flat, method.memory(), OptimSettings(), g, g)
        for i in range(3):
            batch, advantage = batch_of(net, method, i)
            executor.run(batch, advantage, Clock(i, 0.0), compiled=4 if compiled else 0)
            net.remember(replace(batch, obs=3 * batch.obs + i))
        return flat.data.clone()

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=2e-6)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    method = PPO.but("m", rule=RULES["adam"], epochs=1, minibatch=64)
    for compiled in (False, True):
        net = MLPPolicy(*spaces(), PolicySettings(hidden=(8,)), method.nets(), 0)
        flat = FlatParameters(net.nets())
        g = torch.Generator().manual_seed(1)
        executor = Executor(method, method.update(), net, flat, method.memory(), OptimSettings(), g, g)
        batch, advantage = batch_of(net, method, 0)
        before = flat.data.clone()
        assert advantage is not None
        info = executor.run(batch, advantage * float("inf"), Clock(), compiled=4 if compiled else 0)
        assert float(info["skipped"]) == 1.0
        assert torch.equal(flat.data, before)


@pytest.mark.inductor
def test_through_the_compiler() -> None:
    method = PPO.but("m", rule=RULES["adam"], epochs=1, minibatch=32)
    torch.testing.assert_close(trained(method, [True])[0], trained(method, [False])[0], rtol=1e-4, atol=2e-6)
