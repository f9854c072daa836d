"""GDPO: every reward is standardised within its group before the rewards are added up, the sum over the batch afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.part import Range, register_part
from polopt.parts.advantage.channels import outcomes, pooled
from polopt.parts.advantage.grouped import Grouped
from polopt.pooling import not_half


@register_part("advantage", "decoupled")
@dataclass(frozen=True)
class Decoupled(Grouped):
    """GDPO's advantage for several rewards (arXiv 2601.05242, eq. 4 to 6), the same for all decisions of a row.

    A_n = (r_n - mean(r_n))/(std(r_n) + eps) within the group for each reward n, S = sum_n w_n A_n, and A = (S - mean(S))/(std(S) +
    eps) over the batch. Sums of rewards of different composition stay apart, weights mean relative importance whatever the rewards'
    scales, and the size of A does not grow with their number. A reward that is constant in a group counts 0 there. With a single
    reward there is nothing to decouple: the batch is left out, which is GRPO.
    """

    weights: Annotated[tuple[float, ...], "importance of each reward; empty: 1 for all"] = ()
    over: Annotated[Literal["rows", "decisions", "none"], "what the second normalisation runs over"] = "rows"
    dead: Annotated[Literal["centre", "zero"], "groups in which no reward differs: minus the batch mean, or exactly 0"] = "centre"
    eps: Annotated[float, Range(ge=0), "added to deviations"] = 1e-4
    equation: ClassVar[str] = (
        "S_i = sum_n w_n (r_{n,i} - mean_G(r_n))/(std_G(r_n) + eps),  A_{i,t} = (S_i - mean_B(S))/(std_B(S) + eps)"
    )

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantages of the batch, which must hold whole groups. Raises `CallError` for another number of weights than rewards."""
        r = not_half(outcomes(batch))
        if len(self.weights) not in (0, r.shape[1]):
            raise CallError(f"advantage.weights has {len(self.weights)} entries, but there are {r.shape[1]} rewards")
        weights = r.new_tensor(self.weights or (1.0,))
        alike = pooled(batch, r, "max") <= pooled(batch, r, "min")
        each = (r - pooled(batch, r, "mean")) / (pooled(batch, r, "std", ddof=1) + self.eps)
        s = (weights * torch.where(alike, torch.zeros_like(each), each)).sum(1)
        found = torch.where(batch.mask, s[:, None], torch.zeros_like(s[:, None]))
        if r.shape[1] == 1 or self.over == "none":
            return found
        x = s if self.over == "rows" else found
        whole = (x - batch.pool(x, "batch", "mean")) / (batch.pool(x, "batch", "std", ddof=1) + self.eps)
        # decided on the numbers themselves: a rounded mean of equal ones may differ from them
        whole = torch.where(batch.pool(x, "batch", "max") <= batch.pool(x, "batch", "min"), torch.zeros_like(whole), whole)
        whole = whole[:, None] if self.over == "rows" else whole
        keep = batch.mask & ~alike.all(1)[:, None] if self.dead == "zero" else batch.mask
        return torch.where(keep, whole, torch.zeros_like(whole))
