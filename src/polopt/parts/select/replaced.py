"""Rows in whose place others are trained on leave the loss, not their group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Part, register_part
from polopt.parts.sampler.entropy_control import is_replaced


@register_part("select", "drop-replaced")
@dataclass(frozen=True)
class DropReplaced(Part):
    """Rows with row["replaced"] leave numerator and denominator (AEPO, arXiv 2510.08141); batches without the column stay whole.

    They still count in the statistics of their group, so that the others' advantages are those of the group that was sampled.
    """

    conditions: ClassVar[tuple[str, ...]] = ("control-rows",)  # of random batches: without such rows it does nothing
    equation: ClassVar[str] = "sum over rows i with replaced_i = 0"

    def __call__(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Decisions that stay."""
        return batch.mask & ~is_replaced(batch)
