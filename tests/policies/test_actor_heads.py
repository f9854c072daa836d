"""Distributions of actor-critics: densities that integrate to 1, stability at the bounds, draws against scores, bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.draws import Draws
from polopt.errors import CallError, Misfit
from polopt.policies.actor_heads import LOG_STD, BoundedNormal, Deterministic, Enumerated, SquashedNormal, make_actor_head
from polopt.policies.mlp_spaces import Action

F64 = torch.float64


def box(*bounds: tuple[float, float]) -> Action:
    low, high = zip(*bounds, strict=True)
    return Action("box", (len(bounds),), "<f4", low=tuple(low), high=tuple(high))


HEAD = SquashedNormal(box((-1, 1)))


def output(mean: float, log_std: float, n: int = 1) -> Tensor:
    return torch.tensor([[mean, log_std]], dtype=F64).expand(n, -1)


# -------------------------------------------------------------------- densities
@pytest.mark.identity("sac", "sac-v1", "the squashed log-density integrates to 1 over (-1, 1)")
@pytest.mark.parametrize("mean", [-2.0, 0.0, 0.7])
@pytest.mark.parametrize("log_std", [-1.5, 0.0, 1.0])
def test_squashed_density_integrates_to_one(mean: float, log_std: float) -> None:
    # over u, a = tanh(u): da = (1 - tanh(u)^2) du; the range of u stays inside what float64 can still invert
    u = torch.linspace(-13.5, 13.5, 400_001, dtype=F64)
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=F64), math.exp(log_std))
    noise = (u - mean) / math.exp(log_std)
    action, logp = HEAD.draw(output(mean, log_std, len(u)), None, Draws.given([noise[:, None]]))
    area = torch.trapezoid(logp.exp() * (1 - u.tanh() ** 2), u)
    assert float(area) == pytest.approx(float(normal.cdf(u[-1]) - normal.cdf(u[0])), abs=1e-6)
    assert (action[1:] >= action[:-1]).all()


@pytest.mark.identity("sac", "the density of given actions integrates to 1 over (-1, 1), too")
def test_density_of_given_actions_integrates_to_one() -> None:
    edges = torch.linspace(-1, 1, 200_001, dtype=F64)
    middle = (edges[1:] + edges[:-1]) / 2
    logp = HEAD.score(output(0.3, -0.5, len(middle)), None, middle[:, None])
    assert float(logp.exp().mean() * 2) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.identity(
    "sac", "sac-v1", "log(1 - tanh^2) in its stable form: exact where the direct form is, finite where that is not"
)
def test_slope_is_stable_at_saturation() -> None:
    for dtype, tolerance in ((F64, 1e-9), (torch.float32, 1e-4)):
        u = torch.tensor([0.0, 0.5, -2.0, 4.0], dtype=dtype)
        zero = torch.zeros(len(u), 1, dtype=dtype)
        _, logp = HEAD.draw(torch.stack([u, torch.zeros_like(u)], -1), None, Draws.given([zero]))
        direct = -0.5 * math.log(2 * math.pi) - torch.log1p(-(u.tanh() ** 2))
        torch.testing.assert_close(logp, direct, rtol=tolerance, atol=tolerance)
    for u in (50.0, -1e4):
        mean = torch.tensor([[u, 0.0]], requires_grad=True)
        action, logp = HEAD.draw(mean, None, Draws.given([torch.zeros(1, 1)]))
        (g,) = torch.autograd.grad(logp.sum() + action.sum(), mean)
        assert abs(float(action.detach())) == 1.0
        assert math.isfinite(float(logp.detach()))
        assert torch.isfinite(g).all()
        assert float(logp.detach()) == pytest.approx(2 * abs(u) - 2 * math.log(2) - 0.5 * math.log(2 * math.pi), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(-30, 30), st.floats(-40, 40), st.integers(0, 1000))
def test_draws_and_scores_are_finite_everywhere(mean: float, log_std: float, seed: int) -> None:
    out = torch.tensor([[mean, log_std]], requires_grad=True)
    action, logp = HEAD.draw(out, None, Draws(torch.Generator().manual_seed(seed)))
    assert float(action.detach().abs()) <= 1
    (g,) = torch.autograd.grad(logp.sum() + action.sum(), out)
    for a in (action.detach(), torch.ones(1, 1), -torch.ones(1, 1)):
        assert torch.isfinite(HEAD.score(out, None, a)).all()
    assert torch.isfinite(logp).all()
    assert torch.isfinite(g).all()


def test_deviations_are_clamped() -> None:
    noise = torch.tensor([[1.0]], dtype=F64)
    for given_, bound in ((-50.0, LOG_STD[0]), (9.0, LOG_STD[1])):
        action, _ = HEAD.draw(output(0.0, given_), None, Draws.given([noise]))
        assert float(action) == pytest.approx(math.tanh(math.exp(bound)), rel=1e-9)


def test_a_draw_has_the_score_of_its_action() -> None:
    g = torch.Generator().manual_seed(0)
    for head, out, log_std in (
        (SquashedNormal(box((-1, 1), (-2, 2))), torch.randn(50, 4, dtype=F64, generator=g) * 0.5, None),
        (BoundedNormal(box((-1, 1), (-2, 2))), torch.randn(50, 2, dtype=F64, generator=g) * 0.3, torch.full((2,), -3.0, dtype=F64)),
    ):
        action, logp = head.draw(out, log_std, Draws(torch.Generator().manual_seed(0)))
        torch.testing.assert_close(head.score(out, log_std, action), logp, rtol=1e-6, atol=1e-6)


def test_acting_in_numpy_is_drawing_in_torch() -> None:
    head, rng = SquashedNormal(box((-1, 1), (-2, 2))), np.random.default_rng(0)
    out, noise = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    action, _ = head.draw(torch.from_numpy(out), None, Draws.given([torch.from_numpy(noise)]))
    np.testing.assert_allclose(head.choose(out, None, noise), action.numpy(), atol=1e-6)
    np.testing.assert_allclose(head.choose(out, None, None), head.mode(torch.from_numpy(out)).numpy(), atol=1e-6)


@pytest.mark.identity("sac", "evaluation acts with tanh of the mean, whatever the deviation")
def test_mode_is_tanh_of_the_mean() -> None:
    for log_std in (-3.0, 1.0):
        assert float(HEAD.mode(output(0.4, log_std))) == pytest.approx(math.tanh(0.4))


# -------------------------------------------------------------------- spaces
@pytest.mark.identity("ddpg", "actions are scaled alike for environment and networks: outward, then inward, is the identity")
def test_actions_are_scaled_to_their_bounds_and_back() -> None:
    head = Deterministic(box((-2, 2), (0, 10), (-3, -1)))
    a = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    np.testing.assert_allclose(head.inward(head.outward(a)), a, atol=1e-6)
    np.testing.assert_allclose(head.outward(np.array([[-1, -1, -1], [1, 1, 1]])), [[-2, 0, -3], [2, 10, -1]])
    np.testing.assert_allclose(head.outward(np.array([[7.0, -9.0, 0.0]])), [[2, 0, -2]])  # outside: at the bound


@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (0.0, math.inf), (-math.inf, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("name", ["deterministic", "squashed-normal", "bounded-normal"])
def test_spaces_without_two_finite_bounds_are_refused(name: str, bounds: tuple[float, float]) -> None:
    with pytest.raises(CallError, match="actions of dimension 1 lie in"):
        make_actor_head(name, box((-1, 1), bounds), "the task")


@pytest.mark.parametrize(("name", "kind"), [("categorical", "box"), ("deterministic", "discrete"), ("squashed-normal", "discrete")])
def test_the_other_kind_of_actions_is_refused(name: str, kind: str) -> None:
    action = box((-1, 1)) if kind == "box" else Action("discrete", (), "<i8", (3,), (0,))
    with pytest.raises(Misfit, match=f"the task has {kind} actions"):
        make_actor_head(name, action, "the task")


def test_several_discrete_actions_are_refused_where_all_are_listed() -> None:
    with pytest.raises(CallError, match="Discrete action space"):
        Enumerated(Action("multidiscrete", (2,), "<i8", (3, 4), (0, 0)))
