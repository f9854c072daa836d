"""Identities of the control methods that no other test shows: worked numbers, exact tables and whole runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.batch import Batch
from polopt.loops.improve import Improve
from polopt.overrides import resolve
from polopt.parts.advantage.gae import GAE
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.surrogate.clip import Clip
from polopt.parts.surrogate.score import Ratio
from polopt.registry import get_method

torch.set_num_threads(1)


def fragments(seed: int, b: int = 3, t: int = 6) -> Batch:
    """Fragments with ends and cuts, values of two unrelated nets, in float64; log-probabilities away from the old ones."""
    g = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(b, t, generator=g, dtype=torch.float64)

    old = draw() - 2
    return Batch.of(
        logp=(old + 0.5 * draw()).requires_grad_(), value=draw().requires_grad_(), entropy=draw().requires_grad_(), logp_old=old,
        reward=draw(), terminated=torch.rand(b, t, generator=g) < 0.2, truncated=torch.rand(b, t, generator=g) < 0.1,
        stats={"value@old": draw(), "value_next@old": draw()},
    )  # fmt: skip


def gradient(loss: Tensor, batch: Batch, name: str = "logp@now") -> Tensor:
    return torch.autograd.grad(loss, batch.stats[name], retain_graph=True)[0]


# -------------------------------------------------------------------- PPO
@pytest.mark.identity("ppo", "trpo", "at ratio 1 the surrogate's value is mean(A), and 0 once A is standardised")
@pytest.mark.parametrize("name", ["ppo", "trpo"])
def test_at_ratio_one_the_value_is_the_mean_advantage(name: str) -> None:
    batch = fragments(0)
    batch = batch.adding({"logp@old": batch.stats["logp@now"].detach()})
    advantage = torch.randn(batch.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, info = get_method(name).loss(batch, advantage=advantage)
    assert math.isclose(float(info["loss/surrogate"]), -float(advantage.mean()), rel_tol=1e-12)
    assert abs(float(get_method(name).loss(batch)[1]["loss/surrogate"])) < 1e-12


@pytest.mark.identity(
    "ppo", "trpo", "with clip bounds at infinity PPO's loss and gradient are those of TRPO's ratio, off the old policy too"
)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_an_infinite_clip_is_the_plain_ratio(seed: int) -> None:
    batch = fragments(seed)
    ppo = get_method("ppo").but("x", critic=None)
    free, plain = (ppo.but("x", surrogate=s).loss(batch)[0] for s in (Clip(math.inf, math.inf), Ratio()))
    assert math.isclose(free.item(), plain.item(), rel_tol=1e-12)
    torch.testing.assert_close(gradient(free, batch), gradient(plain, batch), atol=1e-14, rtol=1e-12)
    assert not torch.allclose(gradient(ppo.loss(batch)[0], batch), gradient(plain, batch))  # the finite clip acts here


@pytest.mark.identity("ppo", "trpo", "ppo-lm", "lam = 0 is the TD error, lam = 1 on whole episodes the Monte Carlo return minus V")
@pytest.mark.parametrize("name", ["ppo", "trpo", "ppo-lm"])
def test_both_ends_of_lambda(name: str) -> None:
    batch = fragments(3)
    gae = get_method(name).advantage
    assert isinstance(gae, GAE)
    gae = gae.but(standardise=False)
    alive = (~batch.terminated).double()  # type: ignore[operator]
    delta = batch.scalar_reward() + gae.gamma * alive * batch.stats["value_next@old"] - batch.stats["value@old"]
    torch.testing.assert_close(gae.but(lam=0.0)(batch), delta, atol=1e-12, rtol=0)
    value = batch.stats["value@old"]
    whole = Batch.of(reward=batch.scalar_reward(), value=value)  # ends by termination, V of the next decision in between
    wanted = MonteCarlo(gamma=gae.gamma)(whole) - value
    torch.testing.assert_close(gae.but(lam=1.0)(whole), wanted, atol=1e-12, rtol=0)


CARTPOLE: dict[str, Any] = {
    "collect.envs": 2, "collect.steps": 16, "policy.hidden": (8,), "budget": "4-updates", "optim.compile": "never", "threads": 1,
}  # fmt: skip


@pytest.mark.identity("ppo", "clip fraction and KL are 0 on the first minibatch of an iteration and on no later one, in a run")
def test_the_first_minibatch_is_at_ratio_one() -> None:
    resolved = resolve("ppo", "gym:CartPole-v1", {**CARTPOLE, "minibatch": 8, "epochs": 3, "lr": 0.02})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    executor, seen = run.executors["policy"], []
    inner = executor._step

    def spying(*args: Any) -> Any:
        info, ratios = inner(*args)
        seen.append((float(info["kl_old"]), float(info["clip_pos"] + info["clip_neg"])))
        return info, ratios

    executor._step = spying  # type: ignore[method-assign]
    run.step()
    run.collector.close()
    assert len(seen) == 12
    assert seen[0][1] == 0.0
    assert abs(seen[0][0]) < 1e-6  # float32
    assert all(kl > 1e-6 for kl, _ in seen[1:])
    assert any(cut > 0 for _, cut in seen[1:])


# -------------------------------------------------------------------- A3C, A2C
@pytest.mark.identity("a3c", "one worker without lag is the ordinary online n-step actor-critic, written out")
@pytest.mark.identity("a2c", "the gradient of one environment is that of the n-step actor-critic, written out")
@pytest.mark.parametrize(("name", "beta"), [("a3c", 0.01), ("a2c", 0.0)])
def test_one_worker_is_the_n_step_actor_critic(name: str, beta: float) -> None:
    """Mnih et al., algorithm S3, backwards over a fragment of 5; the library averages where the paper sums."""
    batch = fragments(4, b=1, t=5)
    method = get_method(name)
    loss, _ = method.loss(batch)
    reward, value, after = (x[0] for x in (batch.scalar_reward(), batch.stats["value@old"], batch.stats["value_next@old"]))
    logp, now, entropy = (batch.stats[f"{n}@now"] for n in ("logp", "value", "entropy"))
    wanted = torch.zeros((), dtype=torch.float64)
    later = after[-1]
    for i in reversed(range(5)):
        ended, cut = bool(batch.terminated[0, i]), bool(batch.truncated[0, i])  # type: ignore[index]
        later = reward[i] + 0.99 * (torch.zeros_like(later) if ended else after[i] if cut else later)
        wanted = wanted - logp[0, i] * (later - value[i]) - beta * entropy[0, i] + 0.5 * (now[0, i] - later) ** 2
    assert math.isclose(loss.item(), wanted.item() / 5, rel_tol=1e-12)
    for stat in ("logp@now", "value@now"):
        torch.testing.assert_close(gradient(loss, batch, stat), gradient(wanted, batch, stat) / 5, atol=1e-14, rtol=1e-12)


@pytest.mark.identity("a2c", "a3c", "A2C is A3C without the entropy bonus: losses and gradients are equal, bit for bit")
def test_a2c_is_a3c_without_entropy_bonus() -> None:
    batch = fragments(5)
    a3c = get_method("a3c").set("penalty.entropy.coef", 0.0)
    mine, other = get_method("a2c").loss(batch)[0], a3c.loss(batch)[0]
    assert torch.equal(mine, other)
    for stat in ("logp@now", "value@now"):
        assert torch.equal(gradient(mine, batch, stat), gradient(other, batch, stat))
    assert not torch.equal(mine, get_method("a3c").loss(batch)[0])


# -------------------------------------------------------------------- REINFORCE
@pytest.mark.identity("reinforce", "the gradient at a decision is minus its return over the number of episodes, worked by hand")
def test_reinforce_worked_by_hand() -> None:
    logp = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -0.7, 0.0]], dtype=torch.float64, requires_grad=True)
    batch = Batch.of(logp=logp, reward=torch.tensor([[1.0, 0.0, 2.0], [3.0, -1.0, 9.0]]), mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    loss, _ = get_method("reinforce").loss(batch)
    loss.backward()
    assert logp.grad is not None
    assert (-2 * logp.grad).tolist() == [[3.0, 2.0, 2.0], [2.0, -1.0, 0.0]]
    assert math.isclose(loss.item(), (3 * 1 + 2 * 2 + 2 * 0.5 + 2 * 0.3 - 0.7) / 2, rel_tol=1e-12)


@pytest.mark.identity(
    "reinforce-baseline", "a baseline V = 0 leaves REINFORCE's gradient as it is, and V is regressed on the return"
)
def test_a_baseline_of_zero_is_reinforce() -> None:
    batch = fragments(6)
    batch = batch.adding({"value@old": torch.zeros(batch.shape, dtype=torch.float64)})
    mine, other = get_method("reinforce-baseline").loss(batch)[0], get_method("reinforce").loss(batch)[0]
    torch.testing.assert_close(gradient(mine, batch), gradient(other, batch), atol=1e-14, rtol=1e-12)
    target = MonteCarlo()(batch)
    critic = 0.5 * (batch.stats["value@now"] - target).square().sum() / batch.shape[0]
    torch.testing.assert_close(gradient(mine, batch, "value@now"), gradient(critic, batch, "value@now"), atol=1e-14, rtol=1e-12)


@pytest.mark.identity(
    "reinforce-baseline", "the true value as baseline lowers the variance of the gradient and keeps its mean, by enumeration"
)
def test_the_value_as_baseline_lowers_the_variance() -> None:
    theta = torch.tensor([0.3, -0.2, 0.8], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([4.0, 5.0, 7.0], dtype=torch.float64)
    p = theta.detach().softmax(0)
    moments = []
    for name in ("reinforce", "reinforce-baseline"):
        method, found = get_method(name).but("x", critic=None), []
        for a in range(3):
            batch = Batch.of(
                logp=theta.log_softmax(0)[a].view(1, 1), reward=reward[a : a + 1], stats={"value@old": (p @ reward).view(1, 1)}
            )
            found.append(torch.autograd.grad(method.loss(batch)[0], theta)[0])
        g = torch.stack(found)
        mean = p @ g
        moments.append((mean, float((p @ (g - mean).square()).sum())))
    torch.testing.assert_close(moments[0][0], moments[1][0], atol=1e-14, rtol=1e-12)
    assert moments[1][1] < 0.2 * moments[0][1]


# -------------------------------------------------------------------- TRPO on tables
@pytest.mark.identity(
    "trpo", "eta(new) >= L(new) - 4 eps gamma / (1 - gamma)^2 max KL(old || new), for random tables and pairs of policies"
)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.3, 0.7, 0.9]), far=st.sampled_from([0.01, 0.1, 1.0]))
def test_the_bound_behind_the_trust_region(seed: int, gamma: float, far: float) -> None:
    """L - eta(old) is minus TRPO's own loss on the table's states and actions, weighted by how often they are visited."""
    rng = np.random.default_rng(seed)
    s, a = 4, 3
    move, reward = rng.dirichlet(np.ones(s) * 0.5, size=(s, a)), rng.normal(size=(s, a))
    start, logits = rng.dirichlet(np.ones(s)), rng.normal(size=(s, a))
    shifted = logits + far * rng.normal(size=(s, a))
    old, new = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits, shifted))

    def solve(policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step = np.einsum("sa,sat->st", policy, move)
        value = np.linalg.solve(np.eye(s) - gamma * step, (policy * reward).sum(1))
        return value, np.linalg.solve(np.eye(s) - gamma * step.T, start)

    value, visits = solve(old)
    advantage = reward + gamma * move @ value - value[:, None]
    logq = torch.tensor(np.log(new)).requires_grad_()
    batch = Batch.of(logp=logq, logp_old=torch.tensor(np.log(old)), value=torch.zeros(s, a))
    loss, _ = get_method("trpo").loss(batch, advantage=torch.tensor(visits[:, None] * old * advantage * s * a))
    gain = -loss.item()
    assert math.isclose(gain, float((visits[:, None] * new * advantage).sum()), rel_tol=1e-9, abs_tol=1e-12)
    kl = float((old * np.log(old / new)).sum(1).max())
    bound = gain - 4 * np.abs(advantage).max() * gamma / (1 - gamma) ** 2 * kl
    assert start @ solve(new)[0] - start @ value >= bound - 1e-10
