"""Rows that were cut by the generation limit leave the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import MissingStatistic
from polopt.part import Can, Part, register_part


@register_part("select", "drop-truncated")
@dataclass(frozen=True)
class DropTruncated(Part):
    """Overlong filtering (DAPO, arXiv 2503.14476, sec. 3.4): rows with row["truncated"] leave numerator and denominator.

    They still count in the statistics of their group: select acts on the loss, not on the advantage. Rows are answers of which the
    generation limit cut the end, or episodes that a time limit cut.
    """

    equation: ClassVar[str] = "sum over rows i with truncated_i = 0"

    @property
    def reads(self) -> frozenset[str]:
        """The row column "truncated"."""
        return frozenset({"truncated"})

    @property
    def requires(self) -> frozenset[Can]:
        """Whole rows: a fragment of an environment that keeps running is neither whole nor cut."""
        return frozenset({Can.EPISODES})

    def __call__(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Decisions that stay."""
        if "truncated" not in batch.row:
            raise MissingStatistic(
                "the batch lacks the row column 'truncated': pass row={'truncated': ...} to Batch.of, 1 for rows that were cut"
            )
        return ~batch.row["truncated"].bool()[:, None] & batch.mask
