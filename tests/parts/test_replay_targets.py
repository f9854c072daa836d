"""Targets, critics, actors and multipliers of actor-critics, on networks given by formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_nets import FakeNets, transitions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.batch import Clock
from polopt.draws import Draws
from polopt.errors import CallError
from polopt.parts.actor.pathwise import DeterministicGradient, SoftActions, SoftGradient
from polopt.parts.critic_q import ExpectileQ, QRegression, QuantileRegression, asymmetric
from polopt.parts.explore import GaussianNoise, OrnsteinUhlenbeck
from polopt.parts.multiplier import DiscreteTemperature, Temperature
from polopt.parts.target.deterministic import ClippedDouble, DeterministicTarget
from polopt.parts.target.soft import SoftEnumerated, SoftState, SoftTarget, SoftTruncated, StateValueTarget
from polopt.registry import get_method

F64 = torch.float64


def linear(slope: float, bias: float = 0.0) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda obs, action: obs[:, 0] + bias + slope * action[:, 0]


def noise(*values: float) -> Draws:
    return Draws.given([torch.tensor(values, dtype=F64)[:, None]])


# -------------------------------------------------------------------- targets of deterministic policies
@pytest.mark.identity("ddpg", "y = r + gamma Q'(s', mu'(s')) in numbers, and y = r at terminal transitions")
def test_deterministic_target_by_hand() -> None:
    batch = transitions(6)
    nets = FakeNets(
        nets={"critic": [linear(99.0)]}, slow={"critic": [linear(2.0, 0.5)]},
        policy=lambda o: torch.full((len(o), 1), 9.0, dtype=F64), slow_policy=lambda o: 0.1 * o[:, :1],
    )  # fmt: skip
    y = DeterministicTarget(gamma=0.9)(batch, nets).numpy()[:, 0]
    r, s = batch.reward.numpy()[:, 0, 0], batch.next_obs.numpy()[:, 0, 0]
    going = ~batch.terminated.numpy()[:, 0]
    np.testing.assert_allclose(y, r + 0.9 * going * (s + 0.5 + 0.2 * s), rtol=1e-12)
    assert (y[~going] == r[~going]).all()
    assert (~going).any()


@pytest.mark.identity("ddpg", "truncation bootstraps: a cut transition keeps its next value")
def test_truncation_bootstraps() -> None:
    batch = transitions(4, terminated=torch.zeros(4, 1, dtype=torch.bool))
    nets = FakeNets(slow={"critic": [linear(1.0)]})
    whole = DeterministicTarget()(batch, nets)
    cut = DeterministicTarget()(replace(batch, truncated=torch.ones(4, 1, dtype=torch.bool)), nets)
    assert torch.equal(whole, cut)


def test_folded_transitions_are_discounted_by_their_length() -> None:
    batch = transitions(3, terminated=torch.zeros(3, 1, dtype=torch.bool), row={"steps": torch.tensor([1.0, 2.0, 5.0], dtype=F64)})
    nets = FakeNets(slow={"critic": [lambda o, a: torch.ones(len(o), dtype=F64)]})
    y = DeterministicTarget(gamma=0.9)(batch, nets) - batch.reward[..., 0]
    torch.testing.assert_close(y[:, 0], torch.tensor([0.9, 0.81, 0.9**5], dtype=F64))


@pytest.mark.identity("td3", "the target is at most that of any single critic, and actions stay within bounds")
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 3), st.floats(0, 1))
def test_clipped_double_is_below_either_critic(seed: int, deviation: float, bound: float) -> None:
    batch = transitions(8, seed=seed)
    seen: list[Tensor] = []

    def member(slope: float) -> Callable[[Tensor, Tensor | None], Tensor]:
        def q(obs: Tensor, action: Tensor | None) -> Tensor:
            assert action is not None
            seen.append(action)
            return obs[:, 0] + slope * action[:, 0]

        return q

    def target(critics: list[float]) -> Tensor:
        nets = FakeNets(slow={"critic": [member(c) for c in critics]}, policy=lambda o: o[:, :1].clamp(-1, 1))
        rng = Draws(torch.Generator().manual_seed(seed))
        return ClippedDouble(noise=deviation, clip=bound)(batch, nets, rng)

    both, one, two = target([1.5, -0.5]), target([1.5]), target([-0.5])
    assert (both <= torch.minimum(one, two) + 1e-12).all()
    assert all((a.abs() <= 1).all() for a in seen)
    assert torch.equal(seen[0], seen[1])  # one draw serves both members


@pytest.mark.identity("td3", "equal critics, no smoothing and no delay: DDPG's target")
def test_td3_without_its_devices_is_ddpg() -> None:
    batch = transitions(9)
    nets = FakeNets(slow={"critic": [linear(2.0), linear(2.0)]}, policy=lambda o: (0.3 * o[:, :1]).tanh())
    plain = DeterministicTarget(gamma=0.97)(batch, nets)
    assert torch.equal(ClippedDouble(gamma=0.97, noise=0.0)(batch, nets, Draws()), plain)


@pytest.mark.identity("td3", "smoothing leaves a linear critic unbiased and shifts a quadratic one by curvature * variance / 2")
def test_smoothing_is_a_convolution() -> None:
    n = 200_000
    batch = transitions(n, terminated=torch.zeros(n, 1, dtype=torch.bool), reward=torch.zeros(n, 1, 1, dtype=F64))
    part = ClippedDouble(gamma=1.0, noise=0.2, clip=10.0)
    flat = FakeNets(slow={"critic": [lambda o, a: 3 * a[:, 0]]})
    bent = FakeNets(slow={"critic": [lambda o, a: 5 * a[:, 0] ** 2]})
    rng = Draws(torch.Generator().manual_seed(0))
    assert abs(float(part(batch, flat, rng).mean())) < 0.01
    assert float(part(batch, bent, rng).mean()) == pytest.approx(10 * 0.04 / 2, rel=0.02)


@pytest.mark.identity("td3", "the smaller of two unbiased estimates with deviation s is low by s / sqrt(pi)")
def test_minimum_of_two_noisy_critics_is_low() -> None:
    n = 200_000
    g = torch.Generator().manual_seed(0)
    batch = transitions(n, terminated=torch.zeros(n, 1, dtype=torch.bool), reward=torch.zeros(n, 1, 1, dtype=F64))
    noisy = [lambda o, a: 2.0 * torch.randn(len(o), generator=g, dtype=F64)] * 2
    y = ClippedDouble(gamma=1.0, noise=0.0)(batch, FakeNets(slow={"critic": noisy}), Draws())
    assert float(y.mean()) == pytest.approx(-2 / math.sqrt(math.pi), abs=0.02)


def test_targets_refuse_a_batch_without_next_observations() -> None:
    with pytest.raises(CallError, match="next observations"):
        DeterministicTarget()(transitions(2, next_obs=None), FakeNets(slow={"critic": [linear(1.0)]}))


# -------------------------------------------------------------------- actors
@pytest.mark.identity("ddpg", "the actor's gradient is grad_a Q grad_theta mu, by finite differences")
@pytest.mark.identity("td3", "the actor climbs the first critic alone")
def test_deterministic_gradient_is_the_chain_rule() -> None:
    batch = transitions(5)
    theta = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)

    def policy(obs: Tensor, w: Tensor) -> Tensor:
        return (obs @ w).tanh()[:, None]

    def q(o: Tensor, a: Tensor | None) -> Tensor:
        assert a is not None
        return o[:, 1] * a[:, 0] - 2 * a[:, 0] ** 2

    def value(w: Tensor) -> Tensor:
        nets = FakeNets(nets={"critic": [q, lambda o, a: 100 * a[:, 0]]}, policy=lambda o: policy(o, w))
        return DeterministicGradient()(batch, nets).mean()

    (gradient,) = torch.autograd.grad(value(theta), theta)
    for k in range(2):
        step = torch.zeros(2, dtype=F64)
        step[k] = 1e-6
        with torch.no_grad():
            slope = (value(theta + step) - value(theta - step)) / 2e-6
        assert float(gradient[k]) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.identity("ddpg", "at the optimum of a linear-quadratic problem the actor's gradient is zero")
def test_actor_stands_still_at_a_riccati_gain() -> None:
    a, b, gamma = 0.9, 0.5, 0.95
    p = 1.0
    for _ in range(2000):  # cost x^2 + u^2, scalar state
        p = 1 + gamma * a * a * p - (gamma * a * b * p) ** 2 / (1 + gamma * b * b * p)
    gain = gamma * a * b * p / (1 + gamma * b * b * p)

    def q(o: Tensor, u: Tensor | None) -> Tensor:
        assert u is not None
        x = o[:, 0]
        return -(x**2 + u[:, 0] ** 2 + gamma * p * (a * x + b * u[:, 0]) ** 2)

    for k, still in ((gain, True), (gain + 0.1, False)):
        w = torch.tensor(k, dtype=F64, requires_grad=True)
        nets = FakeNets(nets={"critic": [q]}, policy=lambda o, w=w: -w * o[:, :1])
        (g,) = torch.autograd.grad(DeterministicGradient()(transitions(50), nets).mean(), w)
        assert (abs(float(g)) < 1e-10) == still


def tilted(theta: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A normal with mean theta[0] and log-deviation theta[1]."""

    def draw(obs: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        action = theta[0] + theta[1].exp() * eps
        return action, (-0.5 * eps**2 - theta[1] - 0.5 * math.log(2 * math.pi)).sum(-1)

    return draw


@pytest.mark.identity("sac", "the actor's loss is least at pi proportional to exp(Q / alpha)")
def test_soft_gradient_vanishes_at_the_boltzmann_policy() -> None:
    n, alpha = 400_000, 0.5
    batch = transitions(n)
    q = lambda o, a: -((a[:, 0] - 0.7) ** 2)  # noqa: E731 - exp(Q/alpha) is a normal around 0.7 of variance alpha/2
    best = torch.tensor([0.7, 0.5 * math.log(alpha / 2)], dtype=F64)
    for shift in (0.0, 0.3):
        theta = (best + shift).requires_grad_()
        nets = FakeNets(nets={"critic": [q, q]}, sample=tilted(theta))
        loss, told = SoftGradient(alpha=alpha)(batch, nets, Draws(torch.Generator().manual_seed(1)))
        (g,) = torch.autograd.grad(loss.mean(), theta)
        assert (float(g.abs().max()) < 5e-3) == (shift == 0.0)
        assert told["logp@drawn"].shape == batch.shape
        assert not told["logp@drawn"].requires_grad


# -------------------------------------------------------------------- soft targets
@pytest.mark.identity("sac", "y = r + gamma (1 - d) [min Q' - alpha log pi] in numbers")
def test_soft_target_by_hand() -> None:
    batch = transitions(3, terminated=torch.tensor([[False], [True], [False]]))
    theta = torch.tensor([0.2, -1.0], dtype=F64)
    eps = (0.5, -1.0, 2.0)
    nets = FakeNets(
        slow={"critic": [linear(1.0), linear(-2.0, 0.3)]},
        sample=tilted(theta),
        numbers={"temperature": torch.tensor(math.log(0.4))},
    )
    y = SoftTarget(gamma=0.9)(batch, nets, noise(*eps)).numpy()[:, 0]
    for i, e in enumerate(eps):
        s, r = float(batch.next_obs[i, 0, 0]), float(batch.reward[i, 0, 0])
        a = 0.2 + math.exp(-1) * e
        logp = -0.5 * e * e + 1 - 0.5 * math.log(2 * math.pi)
        q = min(s + a, s + 0.3 - 2 * a)
        assert y[i] == pytest.approx(r + (0 if i == 1 else 0.9 * (q - 0.4 * logp)), rel=1e-6)


@pytest.mark.identity("sac", "scaling rewards, values and alpha by c scales the target by c")
def test_soft_target_is_homogeneous() -> None:
    batch, theta = transitions(6), torch.tensor([0.2, -1.0], dtype=F64)
    for c in (0.1, 7.0):

        def value(scale: float, b: object = batch) -> Tensor:
            q = lambda o, a: scale * (o[:, 0] - a[:, 0] ** 2)  # noqa: E731
            nets = FakeNets(slow={"critic": [q, q]}, sample=tilted(theta))
            rewarded = replace(batch, reward=scale * batch.reward)
            return SoftTarget(alpha=0.3 * scale)(rewarded, nets, Draws(torch.Generator().manual_seed(3)))

        torch.testing.assert_close(value(c), c * value(1.0))


@pytest.mark.identity("sac-v1", "the value net's target is E[min Q - log pi], and Q's target scales the reward once")
def test_first_version_targets_by_hand() -> None:
    batch = transitions(2, terminated=torch.tensor([[False], [True]]))
    theta = torch.tensor([0.1, 0.0], dtype=F64)
    nets = FakeNets(
        nets={"critic": [linear(1.0), linear(2.0)]}, slow={"value": [lambda o, a: 10 * o[:, 1]]}, sample=tilted(theta),
    )  # fmt: skip
    v = SoftState(alpha=1.0)(batch, nets, noise(1.0, -0.5)).numpy()[:, 0]
    for i, e in enumerate((1.0, -0.5)):
        s, a = float(batch.obs[i, 0, 0]), 0.1 + e
        logp = -0.5 * e * e - 0.5 * math.log(2 * math.pi)
        assert v[i] == pytest.approx(min(s + a, s + 2 * a) - logp, rel=1e-9)
    y = StateValueTarget(gamma=0.9, reward_scale=5.0)(batch, nets).numpy()[:, 0]
    r, s1 = batch.reward.numpy()[:, 0, 0], batch.next_obs.numpy()[:, 0, 1]
    np.testing.assert_allclose(y, [5 * r[0] + 0.9 * 10 * s1[0], 5 * r[1]])


@pytest.mark.identity("sac-v1", "reward scale c at temperature 1 and alpha = 1/c give targets that differ by the factor c")
def test_reward_scale_is_an_inverse_temperature() -> None:
    batch, c = transitions(6), 5.0
    theta = torch.tensor([0.2, -1.0], dtype=F64)
    q = lambda o, a: o[:, 0] - a[:, 0] ** 2  # noqa: E731
    scaled = FakeNets(nets={"critic": [lambda o, a: c * q(o, a)]}, sample=tilted(theta))
    plain = FakeNets(nets={"critic": [q]}, sample=tilted(theta))
    one = SoftState(alpha=1.0)(batch, scaled, Draws(torch.Generator().manual_seed(0)))
    two = SoftState(alpha=1 / c)(batch, plain, Draws(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(one, c * two)


# -------------------------------------------------------------------- temperature
@pytest.mark.identity("sac", "alpha's gradient is zero where the entropy equals its target; below it alpha rises")
@pytest.mark.parametrize(("entropy", "sign"), [(-1.0, 0), (-1.5, -1), (0.5, 1)])
def test_temperature_moves_towards_the_target_entropy(entropy: float, sign: int) -> None:
    batch = transitions(4).adding({"logp@drawn": torch.full((4, 1), -entropy, dtype=F64)})
    log_alpha = torch.tensor(0.3, dtype=F64, requires_grad=True)
    loss, told = Temperature()(batch, FakeNets(numbers={"temperature": log_alpha}), Draws())
    (g,) = torch.autograd.grad(loss.mean(), log_alpha)
    assert np.sign(round(float(g), 12)) == sign
    assert float(told["temperature"]) == pytest.approx(math.exp(0.3))
    assert float(told["entropy"]) == pytest.approx(entropy)


def test_temperature_is_used_within_bounds() -> None:
    theta = torch.tensor([0.0, 0.0], dtype=F64)
    for log_alpha, alpha in ((50.0, math.exp(5)), (-60.0, math.exp(-20))):
        q = lambda o, a: torch.zeros(len(o), dtype=F64)  # noqa: E731
        nets = FakeNets(nets={"critic": [q]}, sample=tilted(theta), numbers={"temperature": torch.tensor(log_alpha, dtype=F64)})
        loss, told = SoftGradient()(transitions(2), nets, noise(0.0, 0.0))
        torch.testing.assert_close(loss, alpha * told["logp@drawn"])


def test_a_temperature_that_nobody_trains_is_refused() -> None:
    with pytest.raises(CallError, match="temperature"):
        get_method("sac-v1").but("broken", actor=SoftGradient())


# -------------------------------------------------------------------- discrete actions
@pytest.mark.identity("sac-discrete", "with Q fixed, softmax(Q / alpha) is stationary and V there is alpha logsumexp(Q / alpha)")
def test_discrete_boltzmann_policy_is_stationary() -> None:
    alpha, q = 0.7, torch.tensor([[1.0, -0.5, 2.0, 0.1]], dtype=F64)
    batch = transitions(1, terminated=torch.zeros(1, 1, dtype=torch.bool))
    for shift in (0.0, 0.5):
        logits = (q / alpha + shift * torch.tensor([1.0, 0, 0, 0], dtype=F64)).requires_grad_()
        nets = FakeNets(
            nets={"critic": [lambda o, a: q, lambda o, a: q + 1]}, slow={"critic": [lambda o, a: q]},
            table=lambda o, logits=logits: logits.log_softmax(-1), actions=4,
        )  # fmt: skip
        loss, _ = SoftActions(alpha=alpha)(batch, nets, Draws())
        (g,) = torch.autograd.grad(loss.mean(), logits)
        assert (float(g.abs().max()) < 1e-12) == (shift == 0.0)
        if shift == 0.0:
            y = SoftEnumerated(gamma=1.0, alpha=alpha)(batch, nets, Draws()) - batch.reward[..., 0]
            assert float(y) == pytest.approx(float(alpha * (q / alpha).logsumexp(-1)))


@pytest.mark.identity("sac-discrete", "one action: log pi = 0 and nothing to learn")
def test_one_action_is_trivial() -> None:
    logits = torch.zeros(3, 1, dtype=F64, requires_grad=True)
    nets = FakeNets(nets={"critic": [lambda o, a: o[:, :1]]}, table=lambda o: logits.log_softmax(-1), actions=1)
    loss, told = SoftActions(alpha=0.3)(transitions(3), nets, Draws())
    (g,) = torch.autograd.grad(loss.mean(), logits)
    assert float(g.abs().max()) == 0
    assert float(told["logp@drawn"].abs().max()) == 0


@pytest.mark.identity("sac-discrete", "alpha to 0: the clipped double Q-learning target of the greedy action")
def test_cold_policy_is_greedy() -> None:
    q1, q2 = torch.tensor([[1.0, 3.0]], dtype=F64), torch.tensor([[2.0, 2.5]], dtype=F64)
    batch = transitions(1, terminated=torch.zeros(1, 1, dtype=torch.bool))
    low = torch.minimum(q1, q2)
    nets = FakeNets(slow={"critic": [lambda o, a: q1, lambda o, a: q2]}, table=lambda o: (low / 1e-3).log_softmax(-1), actions=2)
    y = SoftEnumerated(gamma=1.0, alpha=1e-3)(batch, nets, Draws()) - batch.reward[..., 0]
    assert float(y) == pytest.approx(2.5, abs=1e-2)


def test_impossible_actions_add_nothing() -> None:
    log_probs = torch.tensor([[0.0, -math.inf]], dtype=F64)
    nets = FakeNets(
        nets={"critic": [lambda o, a: torch.tensor([[1.0, 5.0]], dtype=F64)]}, slow={"critic": [lambda o, a: torch.ones(1, 2,
        dtype=F64)]}, table=lambda o: log_probs, actions=2,
    )  # fmt: skip
    loss, _ = SoftActions(alpha=0.5)(transitions(1), nets, Draws())
    assert float(loss) == -1.0
    assert math.isfinite(float(SoftEnumerated(alpha=0.5)(transitions(1), nets, Draws())))


@pytest.mark.identity("sac-discrete", "alpha's gradient is zero iff the entropy equals its target, a share of log|A|")
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_discrete_temperature_targets_a_share_of_the_largest_entropy(shift: float) -> None:
    part = DiscreteTemperature(share=0.6)
    log_alpha = torch.tensor(0.0, dtype=F64, requires_grad=True)
    batch = transitions(2).adding({"logp@drawn": torch.full((2, 1), -0.6 * math.log(5) + shift, dtype=F64)})
    loss, _ = part(batch, FakeNets(numbers={"temperature": log_alpha}, actions=5), Draws())
    (g,) = torch.autograd.grad(loss.mean(), log_alpha)
    assert float(g) == pytest.approx(-shift, abs=1e-12)


@pytest.mark.identity("sac-discrete", "the exact expectation is the mean of sampled soft values")
def test_expectation_over_actions_is_the_mean_over_draws() -> None:
    q = torch.tensor([[1.0, -0.5, 2.0]], dtype=F64)
    log_probs = torch.tensor([[0.2, -0.4, 0.9]], dtype=F64).log_softmax(-1)
    batch = transitions(1, terminated=torch.zeros(1, 1, dtype=torch.bool))
    nets = FakeNets(slow={"critic": [lambda o, a: q]}, table=lambda o: log_probs, actions=3)
    exact = float(SoftEnumerated(gamma=1.0, alpha=0.4)(batch, nets, Draws()) - batch.reward[..., 0])
    draws = torch.multinomial(log_probs.exp()[0], 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    sampled = (q - 0.4 * log_probs)[0][draws].mean()
    assert exact == pytest.approx(float(sampled), abs=0.01)


# -------------------------------------------------------------------- quantiles
def atoms(table: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda o, a: table.expand(len(o), -1)


def truncated(tables: list[Tensor], drop: int, *, alpha: float = 0.0) -> Tensor:
    batch = transitions(1, terminated=torch.zeros(1, 1, dtype=torch.bool), reward=torch.zeros(1, 1, 1, dtype=F64))
    nets = FakeNets(slow={"critic": [atoms(t) for t in tables]}, sample=tilted(torch.tensor([0.0, 0.0], dtype=F64)))
    return SoftTruncated(gamma=1.0, alpha=alpha, drop=drop)(batch, nets, noise(0.0))[0, 0]


@pytest.mark.identity("tqc", "d = 0 keeps all atoms: the target's mean is the mean of the critics' means")
@pytest.mark.identity("tqc", "the target's mean does not rise with d, and critics may be permuted")
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 6))
def test_truncation_lowers_the_mixture(seed: int, members: int, each: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tables = [torch.randn(each, generator=g, dtype=F64) for _ in range(members)]
    means = [float(truncated(tables, d).mean()) for d in range(each)]
    assert means[0] == pytest.approx(float(torch.stack(tables).mean()), abs=1e-12)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(means))
    assert len(truncated(tables, each - 1)) == members
    assert torch.equal(truncated(tables, 1), truncated(tables[::-1], 1))


@pytest.mark.identity("tqc", "one critic with one atom: SAC's target, and half of Huber's loss")
def test_one_atom_is_sac() -> None:
    batch, theta = transitions(5), torch.tensor([0.2, -1.0], dtype=F64)
    q = lambda o, a: (o[:, 0] - a[:, 0])[:, None]  # noqa: E731
    nets = FakeNets(nets={"critic": [q]}, slow={"critic": [q]}, sample=tilted(theta))
    one = SoftTruncated(alpha=0.3, drop=0)(batch, nets, Draws(torch.Generator().manual_seed(0)))
    two = SoftTarget(alpha=0.3)(batch, nets, Draws(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(one[..., 0], two)
    loss, _ = QuantileRegression(members=1, atoms=1)(batch, nets, one)
    huber = torch.nn.functional.huber_loss(q(batch.obs[:, 0], batch.action[:, 0])[:, 0], two[:, 0], reduction="none")
    torch.testing.assert_close(loss[:, 0], 0.5 * huber)


@pytest.mark.identity("tqc", "the loss is 1/(KM) sum_m sum_i |tau_m - 1[u < 0]| H(u), added up over critics")
def test_quantile_huber_loss_by_hand() -> None:
    batch = transitions(1)
    tables, goal = (
        [torch.tensor([0.0, 3.0], dtype=F64), torch.tensor([-1.0, 0.5], dtype=F64)],
        torch.tensor([0.4, -2.0, 5.0], dtype=F64),
    )
    nets = FakeNets(nets={"critic": [atoms(t) for t in tables]})
    expected = 0.0
    for t in tables:
        for m, theta in enumerate(t.tolist()):
            for y in goal.tolist():
                u = y - theta
                h = 0.5 * u * u if abs(u) <= 1 else abs(u) - 0.5
                expected += abs((2 * m + 1) / 4 - (u < 0)) * h / (3 * 2)
    loss, _ = QuantileRegression(members=2, atoms=2)(batch, nets, goal[None, None])
    assert float(loss) == pytest.approx(expected)
    mean, _ = QuantileRegression(members=2, atoms=2, over="mean")(batch, nets, goal[None, None])
    assert float(mean) == pytest.approx(expected / 2)


@pytest.mark.identity("tqc", "terminal transitions: every atom is the reward")
def test_terminal_atoms_are_the_reward() -> None:
    batch = transitions(1, terminated=torch.ones(1, 1, dtype=torch.bool))
    nets = FakeNets(slow={"critic": [atoms(torch.randn(4, dtype=F64))]}, sample=tilted(torch.zeros(2, dtype=F64)))
    y = SoftTruncated(alpha=0.5, drop=1)(batch, nets, noise(1.0))
    assert torch.equal(y, batch.reward[..., :1].expand(1, 1, 3))


@pytest.mark.identity("tqc", "the actor's gradient does not depend on d: it reads all atoms")
def test_actor_reads_all_atoms() -> None:
    theta = torch.tensor([0.1, -0.5], dtype=F64, requires_grad=True)
    q = lambda o, a: torch.stack([a[:, 0], -(a[:, 0] ** 2), 100 * a[:, 0]], -1)  # noqa: E731
    nets = FakeNets(nets={"critic": [q, q]}, sample=tilted(theta))
    loss, _told = SoftGradient(alpha=0.0, pool="mean")(transitions(1), nets, noise(0.7))
    a = 0.1 + math.exp(-0.5) * 0.7
    assert float(loss.detach()) == pytest.approx(-(a - a * a + 100 * a) / 3)
    assert get_method("tqc").actor == get_method("tqc").but("other", target=SoftTruncated(drop=9)).actor


@pytest.mark.identity("tqc", "dropping as many atoms as a critic has is refused")
def test_dropping_everything_is_refused() -> None:
    with pytest.raises(CallError, match="leaves none"):
        get_method("tqc").but("broken", target=SoftTruncated(drop=25))
    with pytest.raises(CallError, match="quantiles"):
        get_method("sac").but("broken", target=SoftTruncated(drop=1))


@pytest.mark.identity("tqc", "the truncated mean of a known law falls below its mean, monotonically in d")
def test_truncation_bias_of_a_known_law() -> None:
    levels = (torch.arange(25, dtype=F64) + 0.5) / 25
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64)).icdf(levels)
    means = [float(truncated([normal] * 5, d).mean()) for d in (0, 1, 2, 5, 10)]
    assert abs(means[0]) < 1e-12
    assert all(a > b for a, b in itertools.pairwise(means))


# -------------------------------------------------------------------- expectiles
@pytest.mark.identity(("aq-td3"), "tau = 1/2 is half the squared error: the parent's loss at half the gradient")
@pytest.mark.identity(("aq-sac"), "tau = 1/2 is half the squared error: the parent's loss at half the gradient")
def test_expectile_of_a_half_is_half_the_squared_error() -> None:
    batch = transitions(6)
    nets = FakeNets(nets={"critic": [linear(1.0), linear(-0.5)]})
    target = torch.randn(6, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    half, _ = ExpectileQ(start=0.5)(batch, nets, target)
    whole, _ = QRegression()(batch, nets, target)
    torch.testing.assert_close(half, 0.5 * whole)


@pytest.mark.identity(
    "aq-td3", "the fixed point of the loss over samples is their expectile: mean at 1/2, towards the maximum at 1, monotone"
)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=12))
def test_fixed_point_is_the_expectile(samples: list[float]) -> None:
    y = torch.tensor(samples, dtype=F64)

    def fixed(tau: float) -> float:
        low, high = float(y.min()), float(y.max())
        for _ in range(80):
            middle = torch.tensor((low + high) / 2, dtype=F64, requires_grad=True)
            (g,) = torch.autograd.grad(asymmetric(y - middle, tau).mean(), middle)
            low, high = (float(middle), high) if float(g) < 0 else (low, float(middle))
        return (low + high) / 2

    found = [fixed(t) for t in (0.5, 0.7, 0.9, 0.999999)]
    assert found[0] == pytest.approx(float(y.mean()), abs=1e-6)
    assert found[-1] == pytest.approx(float(y.max()), abs=1e-3)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(found))


@pytest.mark.identity("aq-sac", "the residual is target minus prediction: tau > 1/2 weighs underestimation more")
def test_residual_sign() -> None:
    assert float(asymmetric(torch.tensor(1.0), 0.9)) == pytest.approx(0.9)
    assert float(asymmetric(torch.tensor(-1.0), 0.9)) == pytest.approx(0.1)


@pytest.mark.identity("aq-td3", "the expectile falls linearly and is exactly 1/2 at the end")
def test_schedule_of_the_expectile() -> None:
    part = ExpectileQ(start=0.9)
    assert [part.expectile(f) for f in (0.0, 0.5, 1.0)] == [0.9, 0.7, 0.5]
    assert ExpectileQ(start=0.9, share=0.5).expectile(0.75) == 0.5
    assert float(part.expectile(torch.tensor(1.0))) == pytest.approx(0.5)
    batch = transitions(3, clock=Clock(0, 1.0))
    nets = FakeNets(nets={"critic": [linear(1.0)]})
    target = torch.randn(3, 1, dtype=F64)
    torch.testing.assert_close(part(batch, nets, target)[0], ExpectileQ(start=0.5)(batch, nets, target)[0])


@pytest.mark.identity("aq-td3", "the expectile operator contracts; its fixed point lies between Q^pi and Q*")
def test_expectile_operator_on_a_table() -> None:
    rng = np.random.default_rng(0)
    states, actions, gamma = 5, 4, 0.9
    step = rng.integers(0, states, (states, actions))
    reward = rng.normal(size=(states, actions))

    def backup(q: np.ndarray, tau: float) -> np.ndarray:
        values = np.empty(states)
        for s in range(states):  # the expectile over a uniform next action
            v = q[s].mean()
            for _ in range(200):
                w = np.where(q[s] > v, tau, 1 - tau)
                v = (w * q[s]).sum() / w.sum()
            values[s] = v
        return reward + gamma * values[step]

    def solve(tau: float) -> np.ndarray:
        q = np.zeros((states, actions))
        for _ in range(400):
            q = backup(q, tau)
        return q

    low, middle, high = solve(0.5), solve(0.8), solve(1 - 1e-9)
    assert (low <= middle + 1e-9).all()
    assert (middle <= high + 1e-6).all()
    a, b = rng.normal(size=(2, states, actions))
    assert np.abs(backup(a, 0.8) - backup(b, 0.8)).max() <= gamma * np.abs(a - b).max() + 1e-9


# -------------------------------------------------------------------- exploration
@pytest.mark.identity("ddpg", "no noise: the policy's own actions")
def test_exploration_without_noise_is_the_policy() -> None:
    action = np.array([[0.3], [-0.9]], dtype=np.float32)
    out, _ = GaussianNoise(std=0.0)(action, np.zeros((2, 1), np.float32), np.zeros(2, bool), np.random.default_rng(0))
    np.testing.assert_array_equal(out, action)


@pytest.mark.identity("ddpg", "Ornstein-Uhlenbeck noise has variance sigma^2 / (1 - (1 - theta)^2) and starts each episode at 0")
def test_ornstein_uhlenbeck_noise() -> None:
    part, rng = OrnsteinUhlenbeck(std=0.1, theta=0.15), np.random.default_rng(0)
    n = 4000
    state, fresh = np.zeros((n, 1), np.float32), np.ones(n, bool)
    zero = np.zeros((n, 1), np.float32)
    for _ in range(100):
        _, state = part(zero, state, fresh, rng)
        fresh = np.zeros(n, bool)
    assert state.var() == pytest.approx(0.01 / (1 - 0.85**2), rel=0.08)
    _, restarted = part(zero, state, np.ones(n, bool), rng)
    assert restarted.std() == pytest.approx(0.1, rel=0.06)


def test_exploration_stays_within_bounds() -> None:
    out, _ = GaussianNoise(std=5.0)(
        np.zeros((100, 2), np.float32), np.zeros((100, 2), np.float32), np.zeros(100, bool), np.random.default_rng(0)
    )
    assert np.abs(out).max() == 1.0
