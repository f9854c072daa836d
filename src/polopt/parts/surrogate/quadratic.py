"""SPO: a quadratic in the ratio whose maximum lies on the edge of the trust region."""

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

#: The square of a ratio beyond e^10 would swamp every other decision; decisions that far away have no gradient.
FAR = 10.0


@register_part("surrogate", "quadratic")
@dataclass(frozen=True)
class Quadratic(OnRatio):
    """SPO's surrogate (arXiv 2401.16025): l_t = -(r_t A_t - |A_t| (r_t - 1)^2 / (2 eps)).

    Its slope, |A| (sign(A) - (r - 1)/eps), is A at r = 1 and 0 at r = 1 + eps sign(A); beyond, it turns round and pulls the
    decision back, where a clip has no gradient. `inf` leaves the plain ratio. Log-ratios are clamped to +-10.
    """

    eps: Annotated[float, Range(gt=0), "the wanted distance of ratios from 1"] = 0.2
    unit_slope: ClassVar[bool] = True
    equation: ClassVar[str] = "l_t = -(r_t A_t - |A_t| (r_t - 1)^2 / (2 eps))"

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        assert_decisions(batch, advantage=advantage)
        ratio = log_ratio(batch, now).clamp(-FAR, FAR).exp()
        return advantage.abs() * (ratio - 1).square() / (2 * self.eps) - ratio * advantage
