"""The row that gave its group the baseline leaves the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxtyping import Bool
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import MissingStatistic
from polopt.part import Part, register_part


@register_part("select", "drop-middle")
@dataclass(frozen=True)
class DropMiddle(Part):
    """Rows with row["middle"], which sampler "spare" marks, leave numerator and denominator (MC-GRPO, arXiv 2601.22582).

    They still count in the statistics of their group.
    """

    keep: Annotated[bool, "train on them all the same"] = False
    equation: ClassVar[str] = "sum over rows i with middle_i = 0"

    @property
    def reads(self) -> frozenset[str]:
        """The row column "middle"."""
        return frozenset({"middle"})

    def __call__(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Decisions that stay. Raises `MissingStatistic` where no sampler marked rows."""
        if "middle" not in batch.row:
            raise MissingStatistic(
                "the batch lacks the row column 'middle': use sampler 'spare', or pass row={'middle': ...} to Batch.of, 1 for the "
                "row of each group that is left out"
            )
        return batch.mask & ((batch.row["middle"] <= 0)[:, None] | self.keep)
