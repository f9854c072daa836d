"""Baselines that one odd reward cannot move: the median of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import MissingStatistic
from polopt.part import Range, register_part
from polopt.parts.advantage.grouped import Grouped
from polopt.pooling import not_half

#: Advantages that are not larger count as none.
NONE = 1e-6


def middle(batch: Batch, x: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """For each row the row that holds the median of its group's `x`, of an even number the lower one; ties by their place.

    Rows without a decision do not count; a group of them alone has any of its rows.
    """
    if batch.group is None:
        raise MissingStatistic("the batch has no groups: pass group= (ids of rows that belong together, [B])")
    ranked = torch.where(batch.mask.any(1), not_half(x), torch.inf)
    order = ranked.argsort(stable=True)
    order = order[batch.group[order].argsort(stable=True)]  # by group, within it by x, within that as they stand
    rows = torch.bincount(batch.group, minlength=batch.units["group"])
    members = batch.pool(ranked, "group", "count")
    place = (rows.cumsum(0) - rows)[batch.group] + ((members.long() - 1) // 2).clamp(min=0)
    return order[place]


def is_middle(batch: Batch) -> Bool[Tensor, " B"]:
    """The one row of each group whose outcome is the group's median."""
    rows = torch.arange(batch.shape[0], device=batch.mask.device)
    return (middle(batch, batch.outcome()) == rows) & batch.mask.any(1)


@register_part("advantage", "median")
@dataclass(frozen=True)
class MedianBaseline(Grouped):
    """The outcome of a row minus the median of its group, divided by the group's spread (MC-GRPO, arXiv 2601.22582).

    A_i = c (R_i - b)/s, b = median(R). scale "mad": s = median(|R - b|) + eps; "std": the group's sample deviation + 1e-4, as GRPO;
    "none": 1. c = n/m, n rows in the group of which m have an advantage, makes up for those that have none. A reward that is far
    off moves neither b nor s. With rewards of 0 and 1 most deviations are 0, so that s = eps and A is c/eps or -c/eps: clip the
    gradient's norm, or use another scale. Where all rewards are equal A = 0. Groups may be of any size; of an even number the lower
    of the two middle rewards is b.
    """

    centre: Annotated[Literal["median", "mean"], "what is subtracted, and what deviations are from"] = "median"
    scale: Annotated[Literal["mad", "std", "none"], "what divides"] = "mad"
    compensate: Annotated[bool, "multiply by the group's rows / those that have an advantage"] = True
    eps: Annotated[float, Range(gt=0), "added to the median absolute deviation"] = 1e-3
    equation: ClassVar[str] = "A_{i,t} = (n/m) (R_i - median(R)) / (median(|R - median(R)|) + eps),  m = #{j: A_j != 0}"

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantages of the batch, which must hold whole groups."""
        outcome = not_half(batch.outcome())
        deviation = outcome - self._of_group(batch, outcome)
        # a rounded mean of equal numbers may differ from them, which 1/s would blow up
        alike = batch.pool(outcome, "group", "max") <= batch.pool(outcome, "group", "min")
        deviation = torch.where(alike, torch.zeros_like(deviation), deviation)
        gain = deviation / self._spread(batch, outcome, deviation)
        if self.compensate:
            some = batch.pool((gain.abs() > NONE).to(gain), "group", "sum")
            gain = gain * batch.pool(gain, "group", "count") / some.clamp(min=1)
        return torch.where(batch.mask, gain[:, None], torch.zeros_like(gain[:, None]))

    def _of_group(self, batch: Batch, x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return x[middle(batch, x)] if self.centre == "median" else batch.pool(x, "group", "mean")

    def _spread(self, batch: Batch, outcome: Float[Tensor, " B"], deviation: Float[Tensor, " B"]) -> Tensor:
        if self.scale == "mad":
            apart = deviation.abs()
            return apart[middle(batch, apart)] + self.eps
        if self.scale == "std":
            return batch.pool(outcome, "group", "std", ddof=1) + 1e-4
        return torch.ones_like(outcome)


__all__ = ["MedianBaseline", "is_middle", "middle"]
