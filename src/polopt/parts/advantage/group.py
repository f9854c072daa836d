"""Baselines from other samples of the same starting point: GRPO, Dr. GRPO, RLOO and relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Can, Part, Range, register_part, register_preset
from polopt.parts.advantage.grouped import groups_of_one

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("advantage", "group")
@dataclass(frozen=True)
class GroupBaseline(Part):
    """The outcome of a row compared with those of its group, the same for all its decisions.

    A_i = (R_i - centre_i) / (scale_i + eps), R_i the sum of the row's rewards. GRPO (arXiv 2402.03300): centre and scale are mean
    and standard deviation of the group; Dr. GRPO (2503.20783): no scale; RLOO (2402.14740): centre is the mean of the other rows
    of the group, no scale. Groups may be of unequal size; rows without a decision do not count. Where the rows that are compared do
    not differ (a group of one, all rewards equal) the advantage is exactly 0.
    """

    centre: Annotated[Literal["group", "batch", "none", "leave-one-out"], "mean that is subtracted"] = "group"
    scale: Annotated[Literal["group", "batch", "none"], "standard deviation that divides"] = "group"
    ddof: Annotated[int, Range(ge=0, le=1), "1: sample deviation, 0: population deviation"] = 1
    eps: Annotated[float, Range(ge=0), "added to the deviation"] = 1e-4
    equation: ClassVar[str] = "A_{i,t} = (R_i - centre(R)) / (scale(R) + eps)"
    rows: ClassVar[bool] = True

    @property
    def grouped(self) -> bool:
        """Whether rows are compared within their group."""
        return self.centre in ("group", "leave-one-out") or self.scale == "group"

    @property
    def reads(self) -> frozenset[str]:
        """The group key, if rows are compared within their group."""
        return frozenset({"group"} if self.grouped else ())

    @property
    def requires(self) -> frozenset[Can]:
        """Whole episodes, several from one starting point if rows are compared within their group."""
        return frozenset({Can.EPISODES} | ({Can.GROUPS} if self.grouped else set()))

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse comparisons within groups of one, where every advantage would be 0."""
        problem = groups_of_one(method) if self.grouped else None
        who = "rloo" if self.centre == "leave-one-out" else "a baseline within groups"
        return f"{who} {problem}" if problem else None

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantages of the batch, which must hold whole groups."""
        outcome = batch.outcome()
        alike = torch.zeros_like(outcome, dtype=torch.bool)
        advantage = outcome
        if self.centre != "none":
            by = "batch" if self.centre == "batch" else "group"
            advantage = outcome - batch.pool(outcome, by, "mean", leave_one_out=self.centre == "leave-one-out")
            alike |= _alike(batch, outcome, by)
        if self.scale != "none":
            advantage = advantage / (batch.pool(outcome, self.scale, "std", ddof=self.ddof) + self.eps)
            alike |= _alike(batch, outcome, self.scale)
        # decided on the outcomes themselves: a rounded mean of equal numbers may differ from them
        advantage = torch.where(alike, torch.zeros_like(advantage), advantage)
        return torch.where(batch.mask, advantage[:, None], torch.zeros_like(advantage[:, None]))


def _alike(batch: Batch, outcome: Float[Tensor, " B"], by: str) -> Tensor:
    return batch.pool(outcome, by, "max") <= batch.pool(outcome, by, "min")


register_preset("advantage", "group-mean", GroupBaseline(scale="none"))
register_preset("advantage", "leave-one-out", GroupBaseline(centre="leave-one-out", scale="none"))
