"""AEPO's advantage: one for answers that steer the entropy, the group's baseline for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import register_part
from polopt.parts.advantage.group import GroupBaseline


@register_part("advantage", "group-control")
@dataclass(frozen=True)
class GroupWithControl(GroupBaseline):
    """A group's baseline, but A = 1 on rows with row["control"] = 1 (AEPO, arXiv 2510.08141).

    Those rows are right answers drawn at another temperature, so that 1 is REINFORCE with the indicator of being right as its
    reward, one-sided: they can only be pushed up.
    """

    conditions: ClassVar[tuple[str, ...]] = ("control-rows",)  # of random batches: without such rows it does nothing
    equation: ClassVar[str] = "A_{i,t} = 1 if control_i, else (R_i - centre(R)) / (scale(R) + eps)"

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantages of the batch, which must hold whole groups but for control rows."""
        advantage = super().__call__(batch)
        control = batch.row.get("control")
        if control is None:
            return advantage
        return torch.where((control[:, None] > 0) & batch.mask, torch.ones_like(advantage), advantage)
