"""TRPO's rule: natural gradient by conjugate gradients, and a line search that enforces the trust region."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.interfaces import Problem, State
from polopt.part import Can, Part, Range, register_part

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update

DAMPING_RETRIES = 5  # each raises the damping tenfold


@register_part("rule", "natural-gradient")
@dataclass(frozen=True)
class NaturalGradient(Part):
    """Trust region policy optimisation's step (Schulman et al. 2015, arXiv 1502.05477, appendix C).

    x ~ F^-1 g by conjugate gradients on Fisher-vector products F v = grad(grad KL . v) + damping v; full step
    sqrt(2 delta / x.Fx) x; then the first of theta + backtrack^j * full whose surrogate improves and whose mean KL(old || new) is
    at most delta. Without one, or with a gradient of 0 or not finite, the parameters stay.
    Where x.Fx <= 0 (rounding) the damping is raised.
    The constraint covers what this rule does alone: no other update may train the same layers (`policy.shared`).
    """

    delta: Annotated[float, Range(gt=0), "largest mean KL divergence of a step"] = 0.01
    damping: Annotated[float, Range(ge=0), "added to the diagonal of the Fisher matrix"] = 0.1
    cg_iters: Annotated[int, Range(ge=1), "conjugate-gradient iterations"] = 10
    residual_tol: Annotated[float, Range(ge=0), "share of the gradient's squared norm that may remain as residual"] = 1e-10
    backtrack: Annotated[float, Range(gt=0, lt=1), "factor between tried steps"] = 0.8
    max_backtracks: Annotated[int, Range(ge=1), "tried steps"] = 10
    accept_ratio: Annotated[float, Range(ge=0, lt=1), "least share of the expected improvement"] = 0.0
    equation: ClassVar[str] = "theta <- theta + b^j sqrt(2 delta / x.Fx) x,  F x = g,  smallest j with KL <= delta and improvement"
    host: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # parameters may belong to no other update

    @property
    def needs(self) -> frozenset[str]:
        """The closed-form divergence to the policy at the start of the update."""
        return frozenset({"kl@now"})

    @property
    def requires(self) -> frozenset[Can]:
        """A closed-form divergence between two policies."""
        return frozenset({Can.KL})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse settings under which the constraint would not be about the whole batch."""
        if update.epochs > 1 or update.minibatch is not None or (update.minibatches or 1) > 1:
            return (
                f"takes one step per batch, whose KL constraint covers all of it, but epochs = {update.epochs}, "
                f"minibatch = {update.minibatch}, minibatches = {update.minibatches}; set epochs=1 and minibatch=none"
            )
        return None

    def bind(self, parameters: Sequence[Tensor]) -> NaturalGradientStepper:
        """The rule for these parameters; it keeps no state between steps."""
        return NaturalGradientStepper(self, parameters)


class NaturalGradientStepper:
    """`NaturalGradient` bound to parameters."""

    def __init__(self, rule: NaturalGradient, parameters: Sequence[Tensor]) -> None:
        self.rule = rule
        self.parameters = [p for p in parameters if p.requires_grad]

    def step(self, problem: Problem) -> dict[str, Tensor]:
        """One step; reports the expected and actual improvement of the surrogate, the KL and the accepted share of the step."""
        report = problem.backward()
        descent = -_flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])
        full, expected = self._direction(problem, descent)
        if full is None:
            return report | self._report(descent, 0.0, 0.0, 0.0, 0.0)
        return report | self._line_search(problem, descent, full, expected)

    def _direction(self, problem: Problem, g: Tensor) -> tuple[Tensor | None, float]:
        """The full step and the improvement it promises; (None, 0) when there is none."""
        if not bool(g.isfinite().all()) or float(g.norm()) == 0.0:
            return None, 0.0
        fisher = fisher_product(problem.kl(), self.parameters)
        damping = self.rule.damping
        for _ in range(DAMPING_RETRIES):
            product = _damped(fisher, damping)
            x = conjugate_gradient(product, g, self.rule.cg_iters, self.rule.residual_tol)
            curvature = float(x @ product(x))
            if math.isfinite(curvature) and curvature > 0 and bool(x.isfinite().all()):
                full = math.sqrt(2 * self.rule.delta / curvature) * x
                return full, float(g @ full)
            damping = max(10 * damping, 1e-4)
        return None, 0.0

    @torch.no_grad()
    def _line_search(self, problem: Problem, g: Tensor, full: Tensor, expected: float) -> dict[str, Tensor]:
        start = [p.detach().clone() for p in self.parameters]
        before = float(problem.value())
        share = 1.0
        for _ in range(self.rule.max_backtracks):
            self._move(start, share * full)
            gain, kl = before - float(problem.value()), float(problem.kl().detach())
            # comparisons with NaN are false, so a step that is not finite is never accepted
            if gain > 0 and gain >= self.rule.accept_ratio * share * expected and kl <= self.rule.delta:
                return self._report(g, expected, gain, kl, share)
            share *= self.rule.backtrack
        self._move(start, torch.zeros_like(full))
        return self._report(g, expected, 0.0, 0.0, 0.0)

    def _move(self, start: list[Tensor], step: Tensor) -> None:
        at = 0
        for p, s in zip(self.parameters, start, strict=True):
            p.copy_(s + step[at : at + p.numel()].view_as(p))
            at += p.numel()

    def _report(self, g: Tensor, expected: float, gain: float, kl: float, share: float) -> dict[str, Tensor]:
        found = {"expected_improvement": expected, "improvement": gain, "kl": kl, "accepted_step": share}
        return {"grad_norm": g.norm(), **{k: torch.tensor(v, device=g.device) for k, v in found.items()}}

    def state(self) -> State:
        """Nothing lasts between steps."""
        return {}

    def load(self, state: State) -> None:
        """Nothing to restore."""


def fisher_product(kl: Float[Tensor, ""], parameters: Sequence[Tensor]) -> Callable[[Float[Tensor, " D"]], Float[Tensor, " D"]]:
    """v -> H v with H the Hessian of `kl` (with graph) in the parameters: at the old policy, the Fisher matrix."""
    first = torch.autograd.grad(kl, parameters, create_graph=True, allow_unused=True)
    slope = _flatten([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, first, strict=True)])

    def product(v: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(v)
        second = torch.autograd.grad(slope @ v, parameters, retain_graph=True, allow_unused=True)
        return _flatten([torch.zeros_like(p) if h is None else h for p, h in zip(parameters, second, strict=True)]).detach()

    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Float[Tensor, " D"], iterations: int, tolerance: float
) -> Float[Tensor, " D"]:
    """x with product(x) ~ b for a symmetric positive definite product, from x = 0, until |b - product(x)|^2 <= tolerance |b|^2."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), b @ b
    enough = tolerance * float(rr)
    for _ in range(iterations):
        if float(rr) <= enough:
            break
        q = product(p)
        step = rr / (p @ q)
        x = x + step * p
        r = r - step * q
        new = r @ r
        p = r + (new / rr) * p
        rr = new
    return x


def _damped(fisher: Callable[[Tensor], Tensor], damping: float) -> Callable[[Tensor], Tensor]:
    return lambda v: fisher(v) + damping * v


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
