"""How the losses of decisions add up to one number: sums divided by totals of the whole update batch.

Each part returns a sum over its micro-batch divided by denominators (`Totals`) of the whole update batch, so that the
losses of micro-batches, and their gradients, add up exactly to those of the whole. `loss` [B,T] is 0 outside `valid`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch, Totals
from polopt.errors import CallError
from polopt.part import Part, Range, register_part
from polopt.parts.shapes import assert_decisions


@register_part("aggregate", "token-mean")
@dataclass(frozen=True)
class TokenMean(Part):
    """Mean over all valid decisions: each decision counts the same, so long rows weigh more (DAPO eq. 8, arXiv 2503.14476).

    L = sum_{i,t} l_{i,t} / N, with N the valid decisions of the update batch. Nothing valid: 0.
    """

    equation: ClassVar[str] = "L = (1/sum_i |o_i|) sum_i sum_t l_{i,t}"

    def __call__(self, loss: Float[Tensor, "B T"], batch: Batch, valid: Bool[Tensor, "B T"], totals: Totals) -> Float[Tensor, ""]:
        """The aggregated loss."""
        assert_decisions(batch, loss=loss, valid=valid)
        return loss.sum() / totals.decisions.clamp(min=1)


@register_part("aggregate", "seq-mean-token-mean")
@dataclass(frozen=True)
class SeqMeanTokenMean(Part):
    """Mean over rows of each row's mean: each row counts the same whatever its length (GRPO, arXiv 2402.03300 eq. 3).

    L = (1/M) sum_i (1/|o_i|) sum_t l_{i,t}, with M the rows that have a valid decision. Nothing valid: 0.
    """

    equation: ClassVar[str] = "L = (1/G) sum_i (1/|o_i|) sum_t l_{i,t}"
    rows: ClassVar[bool] = True

    def __call__(self, loss: Float[Tensor, "B T"], batch: Batch, valid: Bool[Tensor, "B T"], totals: Totals) -> Float[Tensor, ""]:
        """The aggregated loss."""
        assert_decisions(batch, loss=loss, valid=valid)
        return (loss.sum(1) / valid.sum(1).clamp(min=1)).sum() / totals.rows.clamp(min=1)


@register_part("aggregate", "seq-mean-token-sum")
@dataclass(frozen=True)
class SeqMeanTokenSum(Part):
    """Mean over rows of each row's sum: with the score surrogate, the policy gradient of the expected return of a row.

    L = (1/M) sum_i sum_t l_{i,t} (Williams 1992; RLOO, arXiv 2402.14740). Nothing valid: 0.
    """

    equation: ClassVar[str] = "L = (1/G) sum_i sum_t l_{i,t}"
    rows: ClassVar[bool] = True

    def __call__(self, loss: Float[Tensor, "B T"], batch: Batch, valid: Bool[Tensor, "B T"], totals: Totals) -> Float[Tensor, ""]:
        """The aggregated loss."""
        assert_decisions(batch, loss=loss, valid=valid)
        return loss.sum() / totals.rows.clamp(min=1)


@register_part("aggregate", "seq-mean-token-sum-norm")
@dataclass(frozen=True)
class SeqMeanTokenSumNorm(Part):
    """Mean over rows of each row's sum divided by one constant length, so that length does not bias it (Dr. GRPO).

    L = (1/(M L_max)) sum_i sum_t l_{i,t} (arXiv 2503.20783, sec. 3.1 and its code). `length` None uses the generation limit:
    the horizon of the whole update batch, which does not depend on padding where a collector, or the caller of `Batch.of`, set it.
    """

    length: Annotated[int | None, Range(ge=1), "constant divisor of every row's sum; none: the generation limit"] = None
    equation: ClassVar[str] = "L = (1/(G L_max)) sum_i sum_t l_{i,t}"
    rows: ClassVar[bool] = True

    def __call__(self, loss: Float[Tensor, "B T"], batch: Batch, valid: Bool[Tensor, "B T"], totals: Totals) -> Float[Tensor, ""]:
        """The aggregated loss; raises `CallError` when neither `length` nor the batch's horizon is known."""
        assert_decisions(batch, loss=loss, valid=valid)
        length = self.length or totals.horizon or batch.horizon
        if length < 1:
            raise CallError(
                f"aggregate.length = {self.length!r} and batch.horizon = {batch.horizon}: one of them must be at least 1"
            )
        return loss.sum() / (totals.rows * length).clamp(min=1)
