"""Clipped surrogates: per decision (PPO, DAPO, dual clip) and per sequence (GSPO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Range, register_part, register_preset
from polopt.parts.shapes import assert_decisions, log_ratio
from polopt.parts.surrogate.on_ratio import OnRatio


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1-low, 1+high) A): never more than the plain surrogate r A."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def outside(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Where `clipped` has no gradient: the ratio left the interval in the direction that the advantage rewards."""
    return ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))


@register_part("surrogate", "clip")
@dataclass(frozen=True)
class Clip(OnRatio):
    """PPO's clipped surrogate (arXiv 1707.06347 eq. 7) with separate bounds (DAPO, 2503.14476) and dual clip (1912.09729 eq. 5).

    l_t = -min(r_t A_t, clip(r_t, 1-low, 1+high) A_t); where A_t < 0, dual clip bounds it: l_t = -max(min(...), dual A_t).
    `inf` for a bound means none. Log-ratios are clamped to +-20 before exp.
    """

    low: Annotated[float, Range(ge=0), "ratios below 1 - low are clipped"] = 0.2
    high: Annotated[float, Range(ge=0), "ratios above 1 + high are clipped"] = 0.2
    dual: Annotated[float | None, Range(gt=1), "for negative advantages, largest useful ratio; none: unbounded"] = None
    unit_slope: ClassVar[bool] = True
    equation: ClassVar[str] = "l_t = -min(r_t A_t, clip(r_t, 1-low, 1+high) A_t);  dual: A_t < 0 -> -max(min(...), dual A_t)"

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        assert_decisions(batch, advantage=advantage)
        gain = clipped(log_ratio(batch, now).exp(), advantage, self.low, self.high)
        if self.dual is not None:
            gain = torch.where(advantage < 0, torch.maximum(gain, self.dual * advantage), gain)
        return -gain

    def cut(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Decisions whose gradient the clip removes."""
        ratio = log_ratio(batch, now).exp()
        out = outside(ratio, advantage, self.low, self.high)
        return out if self.dual is None else out | ((advantage < 0) & (ratio > self.dual))


register_preset("surrogate", "clip-higher", Clip(low=0.2, high=0.28))
register_preset("surrogate", "dual-clip", Clip(dual=3.0))


@register_part("surrogate", "sequence-clip")
@dataclass(frozen=True)
class SequenceClip(OnRatio):
    """GSPO's clipped surrogate of whole rows (arXiv 2507.18071 eq. 5 and 7).

    s_i = (pi(o_i|q)/pi_old(o_i|q))^(1/|o_i|) = exp(mean_t log r_{i,t});
    l_{i,t} = -min(s_i A_{i,t}, clip(s_i, 1-low, 1+high) A_{i,t}).
    Every decision of a row carries the row's loss, so that `seq-mean-token-mean` gives the paper's mean over rows.
    """

    low: Annotated[float, Range(ge=0), "sequence ratios below 1 - low are clipped"] = 3e-4
    high: Annotated[float, Range(ge=0), "sequence ratios above 1 + high are clipped"] = 4e-4
    unit_slope: ClassVar[bool] = True
    equation: ClassVar[str] = "s_i = exp((1/|o_i|) sum_t log r_{i,t});  l_{i,t} = -min(s_i A_i, clip(s_i, 1-low, 1+high) A_i)"
    rows: ClassVar[bool] = True

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        assert_decisions(batch, advantage=advantage)
        return -clipped(self._ratio(batch, now), advantage, self.low, self.high)

    def cut(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Decisions of rows whose gradient the clip removes."""
        return outside(self._ratio(batch, now), advantage, self.low, self.high)

    def _ratio(self, batch: Batch, now: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        return batch.pool(log_ratio(batch, now), "row", "mean").exp()
