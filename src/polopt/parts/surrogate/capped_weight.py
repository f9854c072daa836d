"""CISPO: the importance weight is capped, the gradient of no decision is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Range, register_part
from polopt.parts.shapes import assert_decisions, log_ratio
from polopt.parts.surrogate.on_ratio import OnRatio


@register_part("surrogate", "capped-weight")
@dataclass(frozen=True)
class CappedWeight(OnRatio):
    """CISPO's surrogate (MiniMax-M1, arXiv 2506.13585 eq. 4): l_t = -sg(min(r_t, cap)) A_t log pi(a_t|s_t).

    sg stops the gradient, so every decision keeps one, in proportion to its capped weight. The paper clips from above only and does
    not publish its bound; 5 is what TRL uses.
    """

    cap: Annotated[float, Range(gt=0), "largest importance weight"] = 5.0
    unit_slope: ClassVar[bool] = True
    equation: ClassVar[str] = "l_t = -sg(min(r_t, cap)) A_t log pi(a_t|s_t)"

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        assert_decisions(batch, advantage=advantage)
        weight = log_ratio(batch, now).detach().exp().clamp(max=self.cap)
        return -weight * advantage * now["logp"]
