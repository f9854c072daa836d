"""SAPO: a smooth gate of the probability ratio in place of the clip."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Range, register_part
from polopt.parts.shapes import assert_decisions, log_ratio
from polopt.parts.surrogate.on_ratio import OnRatio
from polopt.pooling import not_half


@register_part("surrogate", "soft-gate")
@dataclass(frozen=True)
class SoftGate(OnRatio):
    """SAPO's gated surrogate (arXiv 2511.20347): l_t = -f(r_t) A_t, f(r) = (4/tau) sigmoid(tau (r - 1)), tau by the sign of A_t.

    f is strictly increasing, f'(r) = sech^2(tau (r - 1)/2): 1 on-policy, fading to both sides and never cut off. Negative
    advantages raise the logits of all symbols that were not drawn, so they are noisier and fade earlier: tau_neg > tau_pos.
    """

    tau_pos: Annotated[float, Range(gt=0), "sharpness of the gate where the advantage is positive"] = 1.0
    tau_neg: Annotated[float, Range(gt=0), "sharpness of the gate where it is not"] = 1.05
    unit_slope: ClassVar[bool] = True
    equation: ClassVar[str] = "l_t = -(4/tau) sigmoid(tau (r_t - 1)) A_t,  tau = tau_pos if A_t > 0 else tau_neg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau_neg < self.tau_pos:
            warnings.warn(
                f"surrogate.tau_neg = {self.tau_neg:g} < tau_pos = {self.tau_pos:g}: negative advantages, whose gradient is "
                "noisier, fade later than positive ones",
                stacklevel=3,
            )

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        assert_decisions(batch, advantage=advantage)
        tau = self._tau(advantage)
        return -(4 / tau) * torch.sigmoid(tau * (log_ratio(batch, now).exp() - 1)) * advantage

    def cut(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Decisions of whose gradient the gate takes more than half: sech^2 < 1/2."""
        s = torch.sigmoid(self._tau(advantage) * (log_ratio(batch, now).exp() - 1))
        return 4 * s * (1 - s) < 0.5

    def _tau(self, advantage: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        a = not_half(advantage)
        return torch.where(a > 0, torch.full_like(a, self.tau_pos), torch.full_like(a, self.tau_neg))
