"""Whether a past update helped, shared out among the answers it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import MissingStatistic
from polopt.part import Range, register_part
from polopt.parts.advantage.grouped import Grouped

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("advantage", "improvement")
@dataclass(frozen=True)
class Improvement(Grouped):
    """Policy-improvement reward of a kept batch (PIPO, arXiv 2604.00860): attribution times the rectified verdict.

    rhat_i = a_i phi(xi), a_i = G A_i / sum_j |A_j| over the G answers of a group, A_i = R_i - mean R (any positive scale of the
    group cancels), so that a group's |a_i| add up to G; phi(x) = x for x >= 0, lam x for x < 0. Groups of equal outcomes get 0.
    xi is the row column `improvement` of source `previous`. `bound` cuts |rhat| (the released code: 10).
    """

    lam: Annotated[float, Range(ge=0), "slope of the rectifier for a policy that got worse"] = 0.1
    bound: Annotated[float | None, Range(gt=0), "largest |rhat|; none: unbounded"] = None
    equation: ClassVar[str] = "rhat_i = G A_i / sum_j |A_j| * phi(xi),  phi(x) = x if x >= 0 else lam x"

    @property
    def reads(self) -> frozenset[str]:
        """Groups, and the verdict."""
        return frozenset({"group", "improvement"})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse a batch that was just sampled: nothing is known yet about what it led to."""
        if update.on == "policy":
            return "judges a batch by what it led to: the update must be on='previous', and source=previous must keep it"
        return None

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantages of a kept batch, which must hold whole groups; raises `MissingStatistic` without a verdict."""
        if "improvement" not in batch.row:
            raise MissingStatistic("the batch has no column 'improvement': source 'previous' adds it to the batch it kept")
        xi = batch.row["improvement"]
        reward = self.attribution(batch) * torch.where(xi >= 0, xi, self.lam * xi)
        if self.bound is not None:
            reward = reward.clamp(-self.bound, self.bound)
        return torch.where(batch.mask, reward[:, None], torch.zeros_like(reward[:, None]))

    def attribution(self, batch: Batch) -> Float[Tensor, " B"]:
        """a_i: each answer's share in its group's signal."""
        outcome = batch.outcome()
        centred = outcome - batch.pool(outcome, "group", "mean")
        alike = batch.pool(outcome, "group", "max") <= batch.pool(outcome, "group", "min")
        size = batch.pool(centred.abs(), "group", "mean")  # sum_j |A_j| / G
        return torch.where(alike, torch.zeros_like(centred), centred / size)


__all__ = ["Improvement"]
