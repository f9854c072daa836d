"""One round of updates equals that of Stable-Baselines3 (and sb3-contrib), from equal weights, on equal data and noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.batch import Batch, Clock
from polopt.draws import Draws
from polopt.loops.improve import Improve
from polopt.overrides import resolve

sb3 = pytest.importorskip("stable_baselines3", reason="comes with the extra 'peers'")
N, RATE = 32, 1e-3


def transitions(obs: int, actions: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "obs": torch.randn(N, obs, generator=g), "next_obs": torch.randn(N, obs, generator=g),
        "action": torch.rand(N, actions, generator=g) * 2 - 1, "reward": torch.randn(N, 1, generator=g),
        "done": (torch.rand(N, 1, generator=g) < 0.2).float(),
    }  # fmt: skip


def ours(method: str, hidden: tuple[int, ...], **more: Any) -> Improve:
    over = {
        "policy.hidden": hidden, "budget": "100-decisions", "threads": 1, "source.size": 128, "source.batch": N, "source.start": 0,
        **{k.replace("__", "."): v for k, v in more.items()},
    }  # fmt: skip
    resolved = resolve(method, "gym:Pendulum-v1", over, sources="call")
    rates = {f"updates.{u.name}.rule.lr": RATE for u in resolved.method.updates}
    resolved = resolve(method, "gym:Pendulum-v1", {**over, **rates}, sources="call")
    return Improve(resolved.method, resolved.task, resolved.settings)


def theirs(cls: Any, hidden: tuple[int, ...], **more: Any) -> Any:
    kwargs = {"net_arch": list(hidden), **more.pop("policy_kwargs", {})}
    model = cls("MlpPolicy", "Pendulum-v1", learning_rate=RATE, batch_size=N, policy_kwargs=kwargs, device="cpu", seed=1, **more)
    model._setup_learn(100)
    return model


def feed(model: Any, data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the peer's buffer return exactly these transitions."""
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    sample = model.replay_buffer.sample(1, env=None) if model.replay_buffer.size() else None
    fields = {
        "observations": data["obs"], "actions": data["action"], "next_observations": data["next_obs"],
        "dones": data["done"], "rewards": data["reward"],
    }  # fmt: skip
    names = ReplayBufferSamples._fields
    made = ReplayBufferSamples(**{n: fields.get(n) for n in names})
    assert sample is None
    monkeypatch.setattr(model.replay_buffer, "sample", lambda *_, **__: made)


def batch_of(data: dict[str, Tensor]) -> Batch:
    return Batch(
        mask=torch.ones(N, 1, dtype=torch.bool), reward=data["reward"][:, None], terminated=data["done"].bool(),
        truncated=torch.zeros(N, 1, dtype=torch.bool), obs=data["obs"][:, None], action=data["action"][:, None],
        next_obs=data["next_obs"][:, None], row={"steps": torch.ones(N)},
    )  # fmt: skip


@torch.no_grad()
def copy_actor(run: Improve, latent: Any, heads: list[Any]) -> None:
    """Their actor's layers into ours; several heads lie one after the other in ours."""
    net = run.policy.policy
    mine, others = [m for m in net.trunk if hasattr(m, "weight")], [m for m in latent if hasattr(m, "weight")]
    for m, o in zip(mine, others, strict=True):
        m.weight.copy_(o.weight)
        m.bias.copy_(o.bias)
    net.head.weight.copy_(torch.cat([h.weight for h in heads]))
    net.head.bias.copy_(torch.cat([h.bias for h in heads]))


def actor_tensors(latent: Any, heads: list[Any]) -> list[Tensor]:
    layers = [m for m in latent if hasattr(m, "weight")]
    found = [t for m in layers for t in (m.weight, m.bias)]
    return [*found, torch.cat([h.weight for h in heads]), torch.cat([h.bias for h in heads])]


def own_actor(net: Any) -> list[Tensor]:
    layers = [m for m in net.trunk if hasattr(m, "weight")]
    return [*(t for m in layers for t in (m.weight, m.bias)), net.head.weight, net.head.bias]


@torch.no_grad()
def copy_critics(ensemble: Any, members: list[Any]) -> None:
    for e, member in enumerate(members):
        for k, layer in enumerate(m for m in member if hasattr(m, "weight")):
            ensemble.weights[k][e].copy_(layer.weight.T)
            ensemble.biases[k][e, 0].copy_(layer.bias)


def same_critics(ensemble: Any, members: list[Any], before: list[Tensor] | None = None) -> None:
    for e, member in enumerate(members):
        for k, layer in enumerate(m for m in member if hasattr(m, "weight")):
            torch.testing.assert_close(ensemble.weights[k][e], layer.weight.T, rtol=0, atol=1e-5)
            torch.testing.assert_close(ensemble.biases[k][e, 0], layer.bias, rtol=0, atol=1e-5)


def same(mine: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(mine, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def synchronise(run: Improve) -> None:
    """Slow copies start as the networks."""
    with torch.no_grad():
        for slow, now in run.rounds.copies.values():
            for s, n in zip(slow, now, strict=True):
                s.copy_(n)


def rounds(run: Improve, data: dict[str, Tensor], draws: list[list[Tensor]]) -> None:
    for noise in draws:
        shared = Draws.given(noise)
        for executor in run.executors.values():
            executor.draws = shared
        run.rounds.run(batch_of(data), 1, Clock())


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.identity("td3", "two rounds equal Stable-Baselines3's to 1e-5")
def test_td3(smooth: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = theirs(sb3.TD3, (16, 16), policy_delay=2, target_policy_noise=0.2 if smooth else 0.0)
    run = ours("td3", (16, 16), target__noise=0.2 if smooth else 0.0)
    critics = [list(q) for q in model.critic.q_networks]
    copy_actor(run, model.actor.mu[:-2], [model.actor.mu[-2]])
    copy_critics(run.policy.extra["critic"], critics)
    synchronise(run)
    data = transitions(3, 1)
    feed(model, data, monkeypatch)
    start = [t.clone() for t in own_actor(run.policy.policy)]
    torch.manual_seed(7)
    noise = [torch.empty(N, 1).normal_(0, 0.2) / 0.2 for _ in range(2)]
    torch.manual_seed(7)
    model.train(gradient_steps=2, batch_size=N)
    rounds(run, data, [[n] if smooth else [] for n in noise])
    same_critics(run.policy.extra["critic"], critics)
    same(own_actor(run.policy.policy), actor_tensors(model.actor.mu[:-2], [model.actor.mu[-2]]))
    same_critics(run.policy.slow["critic"], [list(q) for q in model.critic_target.q_networks])
    same(own_actor(run.policy.slow["policy"]), actor_tensors(model.actor_target.mu[:-2], [model.actor_target.mu[-2]]))
    assert any(float((a - b).detach().abs().max()) > 1e-4 for a, b in zip(start, own_actor(run.policy.policy), strict=True))


@pytest.mark.identity("ddpg", "two rounds equal Stable-Baselines3's to 1e-5")
def test_ddpg(monkeypatch: pytest.MonkeyPatch) -> None:
    model = theirs(sb3.DDPG, (16, 16))
    run = ours("ddpg", (16, 16))
    critics = [list(q) for q in model.critic.q_networks]
    assert len(critics) == 1
    copy_actor(run, model.actor.mu[:-2], [model.actor.mu[-2]])
    copy_critics(run.policy.extra["critic"], critics)
    synchronise(run)
    data = transitions(3, 1)
    feed(model, data, monkeypatch)
    model.train(gradient_steps=2, batch_size=N)
    rounds(run, data, [[], []])
    same_critics(run.policy.extra["critic"], critics)
    same(own_actor(run.policy.policy), actor_tensors(model.actor.mu[:-2], [model.actor.mu[-2]]))
    same_critics(run.policy.slow["critic"], [list(q) for q in model.critic_target.q_networks])


def soft(
    cls: Any, method: str, monkeypatch: pytest.MonkeyPatch, critics_of: Any, more: dict[str, Any], policy: dict[str, Any]
) -> None:
    model = theirs(cls, (16, 16), policy_kwargs=policy)
    run = ours(method, (16, 16), **more)
    copy_actor(run, model.actor.latent_pi, [model.actor.mu, model.actor.log_std])
    copy_critics(run.policy.extra["critic"], critics_of(model.critic))
    synchronise(run)
    data = transitions(3, 1)
    feed(model, data, monkeypatch)
    noise = [torch.randn(N, 1, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    # the peer draws for the present observations first, this library for the next ones
    queue = list(noise)
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda shape, dtype, device: queue.pop(0).view(shape))
    model.train(gradient_steps=2, batch_size=N)
    assert not queue
    rounds(run, data, [[noise[1], noise[0]], [noise[3], noise[2]]])
    same_critics(run.policy.extra["critic"], critics_of(model.critic))
    same(own_actor(run.policy.policy), actor_tensors(model.actor.latent_pi, [model.actor.mu, model.actor.log_std]))
    same_critics(run.policy.slow["critic"], critics_of(model.critic_target))
    same([run.policy.scalar("temperature")], [model.log_ent_coef.squeeze()])
    assert float(run.policy.scalar("temperature").detach().abs()) > 1e-4


@pytest.mark.identity("sac", "two rounds equal Stable-Baselines3's to 1e-5")
def test_sac(monkeypatch: pytest.MonkeyPatch) -> None:
    soft(sb3.SAC, "sac", monkeypatch, lambda c: [list(q) for q in c.q_networks], {}, {})


@pytest.mark.identity("tqc", "two rounds equal sb3-contrib's to 1e-5")
def test_tqc(monkeypatch: pytest.MonkeyPatch) -> None:
    contrib = pytest.importorskip("sb3_contrib", reason="comes with the extra 'peers'")
    more = {"critic__members": 2, "critic__hidden": (16, 16), "critic__over": "mean"}
    soft(contrib.TQC, "tqc", monkeypatch, lambda c: [list(q) for q in c.q_networks], more, {"n_critics": 2, "n_quantiles": 25})


def test_the_data_hold_ends_and_actions_within_bounds() -> None:
    data = transitions(3, 1)
    assert 0 < data["done"].mean() < 1
    assert np.abs(data["action"].numpy()).max() <= 1
