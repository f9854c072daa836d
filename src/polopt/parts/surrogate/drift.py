"""Mirror learning: the plain ratio minus a drift that makes leaving the old policy cost something."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Range, register_part
from polopt.parts.shapes import assert_decisions, log_ratio
from polopt.parts.surrogate.on_ratio import OnRatio

Decisions = Float[Tensor, "B T"]


@dataclass(frozen=True)
class Drift(OnRatio):
    """A mirror-learning surrogate, l_t = -(r_t A_t - f(r_t, A_t)); subclasses say what their drift f is.

    A drift is valid if f >= 0, f(1, A) = 0 and df/dr(1, A) = 0 (Kuba et al. 2022, arXiv 2201.02373): the first step is then the
    policy gradient's, and no step gains by drifting alone.
    """

    unit_slope: ClassVar[bool] = True

    @abstractmethod
    def drift(self, log_r: Decisions, advantage: Decisions, memory: Mapping[str, Tensor]) -> Decisions:
        """f(r, A) at log-ratios `log_r`."""

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Decisions, memory: Mapping[str, Tensor]) -> Decisions:
        """The loss of each decision."""
        assert_decisions(batch, advantage=advantage)
        log_r = log_ratio(batch, now)
        return self.drift(log_r, advantage, memory) - log_r.exp() * advantage


def clip_drift(log_r: Decisions, advantage: Decisions, eps: float) -> Decisions:
    """relu((r - clip(r, 1-eps, 1+eps)) A): what the clip takes away from the plain ratio."""
    ratio = log_r.exp()
    return ((ratio - ratio.clamp(1 - eps, 1 + eps)) * advantage).relu()


@register_part("surrogate", "clip-drift")
@dataclass(frozen=True)
class ClipDrift(Drift):
    """PPO's clipped surrogate written as a drift: the same loss and gradient as `clip` (arXiv 2210.05639, sec. 3)."""

    eps: Annotated[float, Range(ge=0), "ratios further from 1 are clipped"] = 0.2
    equation: ClassVar[str] = "l_t = -(r_t A_t - f),  f = relu((r_t - clip(r_t, 1-eps, 1+eps)) A_t)"

    def drift(self, log_r: Decisions, advantage: Decisions, memory: Mapping[str, Tensor]) -> Decisions:
        """f(r, A)."""
        return clip_drift(log_r, advantage, self.eps)


@register_part("surrogate", "discovered-drift")
@dataclass(frozen=True)
class DiscoveredDrift(Drift):
    """The closed form that Lu et al. (arXiv 2210.05639) read off a learnt drift.

    f = relu(u - c tanh(u / c)), with u = (r - 1) A, c = alpha where A >= 0, and u = (log r) A, c = beta where A < 0. The gradient
    fades as u grows past c; where A < 0 it turns round for small r and pulls a decision back that became too unlikely. Advantages
    are to be standardised, as alpha and beta are measured in their units.
    """

    alpha: Annotated[float, Range(gt=0), "scale of (r - 1) A where the advantage is not negative"] = 2.0
    beta: Annotated[float, Range(gt=0), "scale of (log r) A where it is"] = 0.6
    equation: ClassVar[str] = (
        "l_t = -(r_t A_t - f),  f = relu(u - c tanh(u/c)),  u = (r_t-1) A_t, c = alpha if A_t >= 0 else u = (log r_t) A_t, c = beta"
    )

    def drift(self, log_r: Decisions, advantage: Decisions, memory: Mapping[str, Tensor]) -> Decisions:
        """f(r, A)."""
        for_it = advantage >= 0
        u = torch.where(for_it, log_r.expm1(), log_r) * advantage
        c = torch.where(for_it, torch.full_like(u, self.alpha), torch.full_like(u, self.beta))
        return (u - c * (u / c).tanh()).relu()
