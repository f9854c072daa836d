"""TRPO's rule on a small softmax policy where Fisher matrix, gradient and divergence are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.batch import Clock
from polopt.errors import CallError
from polopt.parts.rule.natural_gradient import NaturalGradient, conjugate_gradient, fisher_product
from polopt.registry import get_method

torch.set_num_threads(1)


@dataclass
class SoftmaxProblem:
    """Features [N,F] with linear logits [N,K] plus a bias; a surrogate -mean(pi/pi_old A) over sampled actions."""

    seed: int = 0
    scale: float = 1.0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.x = torch.randn(12, 3, generator=g, dtype=torch.float64)
        self.w = torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_()
        self.b = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        self.parameters = [self.w, self.b]
        self.old = self.logq().detach()
        self.action = torch.multinomial(self.old.exp(), 1, generator=g)
        self.advantage = self.scale * torch.randn(12, 1, generator=g, dtype=torch.float64)

    def logq(self) -> Tensor:
        return (self.x @ self.w + self.b).log_softmax(-1)

    def loss(self) -> Tensor:
        ratio = (self.logq() - self.old).gather(1, self.action).exp()
        return -(ratio * self.advantage).mean()

    def backward(self) -> dict[str, Tensor]:
        for p in self.parameters:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return {"loss": loss.detach()}

    def value(self) -> Tensor:
        return self.loss().detach()

    def kl(self) -> Tensor:
        return (self.old.exp() * (self.old - self.logq())).sum(-1).mean()

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])


def dense_fisher(problem: SoftmaxProblem) -> Tensor:
    """Hessian of the mean KL at the old policy: sum over states of J^T (diag p - p p^T) J / N, written out."""
    p = problem.old.exp()
    out = torch.zeros(16, 16, dtype=torch.float64)
    for n in range(12):
        jacobian = torch.zeros(4, 16, dtype=torch.float64)
        for k in range(4):
            for f in range(3):
                jacobian[k, f * 4 + k] = problem.x[n, f]
            jacobian[k, 12 + k] = 1.0
        out += jacobian.T @ (torch.diag(p[n]) - torch.outer(p[n], p[n])) @ jacobian / 12
    return out


@pytest.mark.identity("trpo", "Fisher-vector products are those of the dense Hessian of the KL")
def test_fisher_product_is_that_of_the_dense_matrix() -> None:
    problem = SoftmaxProblem()
    product, dense = fisher_product(problem.kl(), problem.parameters), dense_fisher(problem)
    for i in range(3):
        v = torch.randn(16, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        torch.testing.assert_close(product(v), dense @ v, atol=1e-12, rtol=1e-10)


@pytest.mark.identity("trpo", "conjugate gradients solve symmetric positive systems to 1e-8")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 8))
def test_conjugate_gradients_solve_symmetric_systems(seed: int, n: int) -> None:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=g, dtype=torch.float64)
    a, b = root @ root.T + torch.eye(n, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    x = conjugate_gradient(lambda v: a @ v, b, 3 * n, 1e-24)
    assert float((a @ x - b).norm()) < 1e-8 * max(1.0, float(b.norm()))
    small = conjugate_gradient(lambda v: a @ v, 1e-15 * b, 3 * n, 1e-24)  # the tolerance is relative
    torch.testing.assert_close(small, 1e-15 * x, rtol=1e-6, atol=1e-26)


@pytest.mark.identity("trpo", "an accepted step improves the surrogate and keeps KL <= delta")
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), delta=st.sampled_from([1e-4, 0.01, 0.3]), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_an_accepted_step_improves_within_the_trust_region(seed: int, delta: float, scale: float) -> None:
    problem = SoftmaxProblem(seed, scale)
    start, before = problem.flat(), float(problem.value())
    report = NaturalGradient(delta=delta, damping=1e-3).bind(problem.parameters).step(problem)
    kl, gain = float(problem.kl().detach()), before - float(problem.value())
    if float(report["accepted_step"]) > 0:
        assert kl <= delta
        assert gain > 0
        assert math.isclose(float(report["kl"]), kl, rel_tol=1e-4, abs_tol=1e-12)
        assert math.isclose(float(report["improvement"]), gain, rel_tol=1e-4, abs_tol=1e-12)
        assert float(report["expected_improvement"]) > 0
    else:
        assert torch.equal(problem.flat(), start)


@pytest.mark.identity("trpo", "the full step is the natural gradient with s F s / 2 = delta, the quadratic model of the KL")
def test_full_step_is_the_natural_gradient_on_the_boundary() -> None:
    """Before the line search, direction F^-1 g and half its quadratic form equal to delta."""
    problem = SoftmaxProblem(1)
    rule = NaturalGradient(delta=1e-5, damping=1e-6, cg_iters=60, residual_tol=1e-24)
    stepper = rule.bind(problem.parameters)
    problem.backward()
    g = -torch.cat([p.grad.reshape(-1) for p in problem.parameters])  # type: ignore[union-attr]
    full, expected = stepper._direction(problem, g)
    assert full is not None
    fisher = dense_fisher(problem) + 1e-6 * torch.eye(16, dtype=torch.float64)
    natural = torch.linalg.solve(fisher, g)
    assert float(torch.cosine_similarity(full, natural, dim=0)) > 1 - 1e-8
    assert math.isclose(float(0.5 * full @ fisher @ full), 1e-5, rel_tol=1e-6)
    assert math.isclose(expected, float(g @ full), rel_tol=1e-9)
    # the quadratic model holds for small steps: the KL after the full step is delta to first order
    report = stepper.step(problem)
    assert 0.5e-5 < float(problem.kl().detach()) <= 1e-5
    assert math.isclose(float(report["improvement"]), expected * float(report["accepted_step"]), rel_tol=0.05)


@pytest.mark.identity("trpo", "the step does not change with a common constant in the logits")
def test_the_step_does_not_depend_on_a_common_constant_in_the_logits() -> None:
    a, b = SoftmaxProblem(2), SoftmaxProblem(2)
    with torch.no_grad():
        b.b += 3.0
    for problem in (a, b):
        NaturalGradient().bind(problem.parameters).step(problem)
    torch.testing.assert_close(a.logq(), b.logq(), atol=1e-9, rtol=0)


def unchanged(problem: SoftmaxProblem, rule: NaturalGradient) -> dict[str, Tensor]:
    start = problem.flat()
    report = rule.bind(problem.parameters).step(problem)
    assert torch.equal(problem.flat(), start)
    assert float(report["accepted_step"]) == 0.0
    return report


def test_no_gradient_no_step() -> None:
    assert float(unchanged(SoftmaxProblem(0, 0.0), NaturalGradient())["grad_norm"]) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_rejected(bad: float) -> None:
    problem = SoftmaxProblem()
    problem.advantage[0] = bad
    unchanged(problem, NaturalGradient())


def test_a_divergence_that_is_not_finite_is_rejected() -> None:
    class Broken(SoftmaxProblem):
        def kl(self) -> Tensor:
            return super().kl() * math.nan

    unchanged(Broken(), NaturalGradient())


def test_a_value_that_never_improves_restores_the_parameters() -> None:
    class Flat(SoftmaxProblem):
        def value(self) -> Tensor:
            return torch.zeros(())

    unchanged(Flat(), NaturalGradient())


def test_negative_curvature_raises_the_damping() -> None:
    class Rounded(SoftmaxProblem):
        def kl(self) -> Tensor:
            # a Hessian of -0.05 I on top of zero divergence: positive only with damping above it
            return -0.025 * sum((p - p.detach()).square().sum() for p in self.parameters)  # type: ignore[return-value]

    problem = Rounded()
    problem.backward()
    g = -torch.cat([p.grad.reshape(-1) for p in problem.parameters])  # type: ignore[union-attr]
    full, expected = NaturalGradient(damping=0.01).bind(problem.parameters)._direction(problem, g)
    assert full is not None  # damping 0.1 makes it 0.05 I
    assert expected > 0
    assert float(torch.cosine_similarity(full, g, dim=0)) > 1 - 1e-9


def test_minibatches_and_epochs_are_refused() -> None:
    trpo = get_method("trpo")
    for change in ({"epochs": 2}, {"minibatch": 64}, {"minibatches": 2}):
        with pytest.raises(CallError, match="one step per batch"):
            trpo.but("mine", **change)
