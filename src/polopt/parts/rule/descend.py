"""Gradient descent: clipping, optimiser and schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from polopt.errors import PoloptError
from polopt.interfaces import Problem, State
from polopt.part import Part, Range, register_part
from polopt.parts.rule import functional


@dataclass(frozen=True)
class FirstOrder(Part):
    """A first-order optimiser with clipping and schedule: what rules have in common that step along a gradient.

    A gradient that is not finite changes nothing (parameters and optimiser state stay) and is reported as `skipped` = 1. The rate
    follows the spent share of the budget: after a linear warm-up it stays, or falls to 0 linearly or along a cosine.
    """

    optimizer: Annotated[Literal["adam", "adamw", "rmsprop", "rmsprop-tf", "sgd"], "rmsprop-tf: TensorFlow's form, used by A2C"] = (
        "adam"
    )
    lr: Annotated[float, Range(ge=0), "learning rate"] = 3e-4
    betas: Annotated[tuple[float, float], "decay of the moments (adam, adamw)"] = (0.9, 0.999)
    alpha: Annotated[float, Range(ge=0, lt=1), "decay of the mean square (rmsprop)"] = 0.99
    eps: Annotated[float, Range(gt=0), "added to the root of the mean square"] = 1e-8
    momentum: Annotated[float, Range(ge=0, lt=1), "sgd and rmsprop"] = 0.0
    weight_decay: Annotated[float, Range(ge=0), "decoupled for adamw"] = 0.0
    max_grad_norm: Annotated[float | None, Range(gt=0), "gradients of larger norm are scaled down; none: never"] = 0.5
    schedule: Annotated[Literal["constant", "linear", "cosine"], "of the learning rate over the budget"] = "constant"
    warmup: Annotated[float, Range(ge=0, lt=1), "share of the budget in which the rate rises from a tenth"] = 0.0

    def rate(self, fraction: float | Tensor) -> float:
        """Learning rate when `fraction` (0 to 1) of the budget is spent."""
        if self.schedule == "constant" and not self.warmup:
            return self.lr
        f = min(max(float(fraction), 0.0), 1.0)
        if f < self.warmup:
            return self.lr * (0.1 + 0.9 * f / self.warmup)
        f = (f - self.warmup) / (1 - self.warmup)
        scale = {"constant": 1.0, "linear": 1.0 - f, "cosine": 0.5 * (1 + math.cos(math.pi * f))}[self.schedule]
        return self.lr * scale


@register_part("rule", "descend")
@dataclass(frozen=True)
class Descend(FirstOrder):
    """A step of a first-order optimiser along the gradient, whose global norm is clipped first.

    A gradient that is not finite changes nothing (parameters and optimiser state stay) and is reported as `skipped` = 1. The rate
    follows the spent share of the budget: after a linear warm-up it stays, or falls to 0 linearly or along a cosine.
    """

    equation: ClassVar[str] = "theta <- theta - lr * optimizer(g * min(1, c/||g||))"
    flat: ClassVar[bool] = True  # works on one tensor that holds all parameters

    def bind(self, parameters: Sequence[Tensor]) -> DescendStepper:
        """An optimiser for these parameters."""
        return DescendStepper(self, parameters)

    def pure(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], rate: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The step as a pure function of flat parameters, gradient and optimiser tensors, for compiled graphs."""
        return functional.step(self, p, g, state, rate)


class DescendStepper:
    """A first-order optimiser bound to parameters; holds its state, one dict of tensors per parameter."""

    def __init__(self, rule: FirstOrder, parameters: Sequence[Tensor]) -> None:
        self.rule = rule
        self.parameters = [p for p in parameters if p.requires_grad]
        self.states = [functional.initial(rule, p) for p in self.parameters]

    def step(self, problem: Problem) -> dict[str, Tensor]:
        """One step; returns the problem's diagnostics with `grad_norm` (before clipping), `lr` and `skipped`."""
        report = problem.backward()
        return {**report, **self.apply(problem.clock.fraction)}

    @torch.no_grad()
    def apply(self, fraction: float | Tensor = 0.0) -> dict[str, Tensor]:
        """Clip the gradients that are in `.grad` and step, without a device sync."""
        moved = [(p, p.grad, s) for p, s in zip(self.parameters, self.states, strict=True) if p.grad is not None]
        if not moved:
            raise PoloptError("no parameter received a gradient: the loss does not depend on what this update trains")
        grads = [g for _, g, _ in moved]
        norm = torch.linalg.vector_norm(grads[0]) if len(grads) == 1 else torch.nn.utils.get_total_norm(grads)
        if self.rule.max_grad_norm is not None:
            torch._foreach_mul_(grads, (self.rule.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        skipped = 1.0 - norm.isfinite().to(torch.float32)
        rate = self.rule.rate(fraction)
        functional.fused_step(self.rule, moved, rate, skipped)
        return {"grad_norm": norm, "skipped": skipped, "lr": torch.full_like(norm, rate)}

    def tensors(self) -> dict[str, Tensor]:
        """The state of the only parameter, shared with `step`: for rules bound to one flat parameter."""
        (only,) = self.states
        return only

    def state(self) -> State:
        """The optimiser's tensors by parameter number: {"0": {"exp_avg": ...}, ...}."""
        return {str(i): dict(s) for i, s in enumerate(self.states)}

    def load(self, state: State) -> None:
        """Restore from `state()`, in place; raises KeyError or RuntimeError where it does not fit."""
        for i, mine in enumerate(self.states):
            for k, v in mine.items():
                v.copy_(state[str(i)][k])
