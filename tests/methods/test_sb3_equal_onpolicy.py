"""One update of PPO and A2C against Stable-Baselines3: equal networks, rollout and minibatches give equal parameters.

Stable-Baselines3 collects and learns as it always does; our run gets its initial weights and its rollout, with rewards as the
environment gave them, and draws its minibatches in the order that is handed to the other side.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.batch import Batch, Final
from polopt.loops.improve import Improve
from polopt.overrides import resolve

sb3 = pytest.importorskip("stable_baselines3", reason="comes with the extra 'peers'")

HIDDEN = (16, 16)
LIMIT = 14  # decisions after which episodes are cut; in CartPole some end by themselves before


@dataclass
class Seen:
    """What Stable-Baselines3's environments returned, step by step, before it changed rewards at cuts."""

    rewards: list[Any] = field(default_factory=list)
    dones: list[Any] = field(default_factory=list)
    infos: list[Any] = field(default_factory=list)


def collected(algorithm: str, env: str, envs: int, steps: int, settings: dict[str, Any]) -> tuple[Any, Seen]:
    """The algorithm after its rollout, returns and advantages estimated, nothing learned yet."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Note(BaseCallback):  # type: ignore[misc]
        def _on_step(self) -> bool:
            seen.rewards.append(self.locals["rewards"].copy())
            seen.dones.append(self.locals["dones"].copy())
            seen.infos.append(copy.deepcopy(self.locals["infos"]))
            return True

    seen = Seen()
    vector = DummyVecEnv([lambda: gym.make(env, max_episode_steps=LIMIT)] * envs)
    kind = {"ppo": sb3.PPO, "a2c": sb3.A2C}[algorithm]
    architecture = {"net_arch": {"pi": list(HIDDEN), "vf": list(HIDDEN)}, **settings.pop("policy_kwargs", {})}
    model = kind("MlpPolicy", vector, n_steps=steps, policy_kwargs=architecture, seed=0, device="cpu", **settings)
    _, callback = model._setup_learn(steps * envs, Note())
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=steps)
    return model, seen


def batch_of(model: Any, seen: Seen) -> Batch:
    """The rollout as our collector would return it."""

    def rows(x: Any) -> Tensor:
        return torch.as_tensor(np.stack(x)).transpose(0, 1).contiguous()

    buffer = model.rollout_buffer
    steps, envs = buffer.buffer_size, buffer.n_envs
    truncated = rows([[i.get("TimeLimit.truncated", False) for i in infos] for infos in seen.infos])
    terminated = rows(seen.dones) & ~truncated
    at, final = [], []
    for b in range(envs):
        for t in range(steps):
            info = seen.infos[t][b]
            if bool(truncated[b, t]) or (t == steps - 1 and not bool(terminated[b, t])):
                at.append([b, t])
                final.append(info["terminal_observation"] if bool(truncated[b, t]) else model._last_obs[b])
    action = rows(buffer.actions)
    discrete = isinstance(model.action_space, gym.spaces.Discrete)
    return Batch(
        mask=torch.ones(envs, steps, dtype=torch.bool), reward=rows(seen.rewards)[..., None].float(), terminated=terminated,
        truncated=truncated, obs=rows(buffer.observations).float(), action=action[..., 0].long() if discrete else action,
        final=Final(torch.tensor(at), torch.as_tensor(np.stack(final)).float()), horizon=steps,
    )  # fmt: skip


def pairs(model: Any, policy: Any) -> list[tuple[Tensor, Tensor]]:
    """(theirs, ours) of every parameter."""
    theirs, extractor = model.policy, model.policy.mlp_extractor
    found = []
    for net, head, ours in (
        (extractor.policy_net, theirs.action_net, policy.policy), (extractor.value_net, theirs.value_net, policy.value),
    ):  # fmt: skip
        layers = [*zip(net[::2], ours.trunk[::2], strict=True), (head, ours.head)]
        found += [(getattr(a, n), getattr(b, n)) for a, b in layers for n in ("weight", "bias")]
    return [*found, *([(theirs.log_std, policy.policy.log_std)] if policy.policy.log_std is not None else [])]


def updated(
    monkeypatch: pytest.MonkeyPatch, method: str, env: str, envs: int, steps: int, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    """Make one update on both sides and compare everything on the way."""
    model, seen = collected(method, env, envs, steps, theirs)
    given = {
        "collect.envs": envs, "collect.steps": steps, "policy.hidden": HIDDEN, "policy.activation": "tanh",
        "policy.normalize_obs": False, "policy.normalize_reward": False, "policy.shared": False, "optim.compile": "never",
        "budget": "1000-updates", "schedule": "constant", "threads": 1, "penalty": "none", "advantage.gamma": 0.99, **ours,
    }  # fmt: skip
    resolved = resolve(method, f"gym:{env}", given)
    run = Improve(resolved.method, resolved.task, resolved.settings)
    with torch.no_grad():
        for a, b in pairs(model, run.policy):
            b.copy_(a)
    before = run.flat.data.clone()
    batch = batch_of(model, seen)
    assert bool(batch.truncated.any())  # type: ignore[union-attr]
    run.collector._fragment = lambda n: batch  # type: ignore[attr-defined]
    order = torch.Generator()
    order.set_state(run.executors["policy"].shuffle.get_state())
    monkeypatch.setattr(np.random, "permutation", lambda n: torch.randperm(n, generator=order).numpy())
    filled, inner = [], run.prepare

    def noted(*args: Any, **more: Any) -> Any:
        filled.append(inner(*args, **more))
        return filled[-1]

    run.prepare = noted  # type: ignore[method-assign]
    run.step()
    model.train()
    run.collector.close()

    (whole, advantage, _) = filled[0]
    buffer = model.rollout_buffer
    flat = {"values": whole.stats["value@old"], "log_probs": whole.stats["logp@old"], "returns": whole.stats["return@old"]}
    if not resolved.method.advantage.standardise:
        flat["advantages"] = advantage
    for name, x in flat.items():  # their buffer is flattened environment by environment once it was read
        np.testing.assert_allclose(np.reshape(getattr(buffer, name), x.shape), x.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
    for a, b in pairs(model, run.policy):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
    assert float((run.flat.data - before).abs().max()) > 1e-3  # a hundred times what they may differ by


# -------------------------------------------------------------------- PPO
@pytest.mark.identity("ppo", "one update of four epochs of minibatches leaves Stable-Baselines3's parameters, to 1e-5")
@pytest.mark.parametrize(("env", "clip"), [("CartPole-v1", 0.2), ("MountainCarContinuous-v0", 0.05)])
def test_ppo_equals_stable_baselines(monkeypatch: pytest.MonkeyPatch, env: str, clip: float) -> None:
    """Theirs standardises advantages per minibatch, ours per batch: off on both sides here, the next test has it on."""
    updated(
        monkeypatch, "ppo", env, 3, 40,
        {"batch_size": 30, "n_epochs": 4, "learning_rate": 1e-3, "clip_range": clip, "normalize_advantage": False, "ent_coef": 0.0},
        {"minibatch": 30, "epochs": 4, "lr": 1e-3, "surrogate.low": clip, "surrogate.high": clip, "advantage.standardise": False},
    )  # fmt: skip


@pytest.mark.identity(
    "ppo", "with standardised advantages and an entropy bonus, on whole batches, it leaves Stable-Baselines3's parameters"
)
@pytest.mark.parametrize("env", ["CartPole-v1", "MountainCarContinuous-v0"])
def test_ppo_with_standardised_advantages_equals_stable_baselines(monkeypatch: pytest.MonkeyPatch, env: str) -> None:
    updated(
        monkeypatch, "ppo", env, 3, 40,
        {"batch_size": 120, "n_epochs": 5, "learning_rate": 1e-3, "ent_coef": 0.02, "gae_lambda": 0.9},
        {"minibatch": None, "epochs": 5, "lr": 1e-3, "penalty": "entropy", "penalty.entropy.coef": 0.02, "advantage.lam": 0.9},
    )  # fmt: skip


# -------------------------------------------------------------------- A2C
@pytest.mark.identity(
    "a2c", "one update leaves Stable-Baselines3's parameters, to 1e-5, with TensorFlow's RMSProp and with PyTorch's"
)
@pytest.mark.parametrize("env", ["CartPole-v1", "MountainCarContinuous-v0"])
@pytest.mark.parametrize("optimizer", ["rmsprop-tf", "rmsprop"])
def test_a2c_equals_stable_baselines(monkeypatch: pytest.MonkeyPatch, env: str, optimizer: str) -> None:
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    theirs: dict[str, Any] = {"learning_rate": 7e-3, "ent_coef": 0.0}
    if optimizer == "rmsprop-tf":
        kwargs = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5, "weight_decay": 0}}
        theirs |= {"use_rms_prop": False, "policy_kwargs": kwargs}
    updated(monkeypatch, "a2c", env, 4, 30, theirs, {"lr": 7e-3, "optimizer": optimizer, "alpha": 0.99})
