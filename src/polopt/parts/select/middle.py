"""The row that gave its group the baseline leaves the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxtyping import Bool
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Part, register_part


@register_part("select", "drop-middle")
@dataclass(frozen=True)
class DropMiddle(Part):
    """Rows with row["middle"], which sampler "spare" marks, leave numerator and denominator (MC-GRPO, arXiv 2601.22582).

    They still count in the statistics of their group. Batches without the column stay whole.
    """

    keep: Annotated[bool, "train on them all the same"] = False
    equation: ClassVar[str] = "sum over rows i with middle_i = 0"

    @property
    def reads(self) -> frozenset[str]:
        """The row column "middle"."""
        return frozenset({"middle"})

    def __call__(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Decisions that stay."""
        column = batch.row.get("middle")
        return batch.mask if column is None or self.keep else batch.mask & (column <= 0)[:, None]
