"""A2C is a special case of PPO (arXiv 2205.09123), through the whole loop on CartPole: the same weights after 3000 steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import polopt
from polopt.loops.improve import Improve
from polopt.overrides import resolve
from polopt.parts.advantage.gae import GAE
from polopt.parts.critic import ValueLoss

COMMON: dict[str, Any] = {
    "collect.envs": 2, "collect.steps": 5, "policy.hidden": (16,), "policy.normalize_reward": False, "budget": "300-updates",
    "advantage.gamma": 0.99, "updates.policy.rule.lr": 7e-4, "updates.policy.rule.schedule": "constant", "optim.compile": "never",
}  # fmt: skip
A2C = polopt.method("a2c")
# PPO with every switch of the paper's table, and no other change: its clipped ratio stays
PPO = polopt.method("ppo").but(
    "ppo-as-a2c",
    advantage=GAE(gamma=0.99, lam=1.0, standardise=False),
    critic=ValueLoss(coef=0.5, clip=None),
    rule=A2C.update().rule,
    epochs=1,
    minibatch=None,
)


def weights(method: Any, seed: int, **changes: Any) -> list[torch.Tensor]:
    resolved = resolve(method, "gym:CartPole-v1", {**COMMON, "seed": seed, **changes})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    found = []
    while run.fraction() < 1:
        metrics = run.step()
        found.append(run.flat.data.clone())
        assert metrics.get("clip_pos", 0.0) == 0.0
    run.collector.close()
    return found


@pytest.mark.identity(
    "ppo", "a2c", "A2C and PPO under its settings have the same weights after each of 300 updates, 3000 steps of CartPole"
)
@pytest.mark.parametrize("seed", [0, 1])
def test_same_weights_after_every_update(seed: int) -> None:
    a2c, ppo = weights(A2C, seed), weights(PPO, seed)
    assert len(a2c) == 300
    for a, b in zip(a2c, ppo, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert not torch.equal(a2c[0], a2c[-1])


@pytest.mark.identity("ppo", "a2c", "in whole runs, several epochs, lam < 1 or Adam break the equality of A2C and PPO")
@pytest.mark.parametrize(
    "change", [{"updates.policy.epochs": 4}, {"advantage.lam": 0.95}, {"updates.policy.rule.optimizer": "adam"}]
)
def test_any_other_setting_breaks_it(change: dict[str, Any]) -> None:
    short = {"budget": "3-updates"}
    a2c, ppo = weights(A2C, 0, **short), weights(PPO, 0, **short, **change)
    assert not torch.allclose(a2c[-1], ppo[-1], rtol=0, atol=1e-6)
