"""Regression surrogates: log-ratios of whole rows are fitted to rewards, instead of being weighed with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch
from polopt.columns import last_valid
from polopt.part import Can, Part, Range, register_part
from polopt.parts.shapes import assert_decisions, keep
from polopt.pooling import not_half

if TYPE_CHECKING:
    pass


def row_log_ratio(batch: Batch, now: Mapping[str, Tensor], view: str) -> Float[Tensor, " B"]:
    """log pi_now(row) - log pi_view(row), summed over its decisions, not clamped: a regression never takes its exponential."""
    other = batch.stat(f"logp@{view}")
    assert_decisions(batch, **{"logp@now": now["logp"], f"logp@{view}": other})
    return keep(batch.mask, not_half(now["logp"]) - not_half(other)).sum(1)


def row_advantage(batch: Batch, advantage: Float[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """The advantage of a row, which all its decisions have (their mean)."""
    return not_half(batch.pool(not_half(advantage), "row", "mean")[:, 0])


def at_end(loss: Float[Tensor, " B"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Losses of rows, each at the last decision that counts, so that sums over decisions are those of rows."""
    return torch.where(last_valid(valid), loss[:, None], torch.zeros_like(loss[:, None]))


@register_part("surrogate", "advantage-regression")
@dataclass(frozen=True)
class AdvantageRegression(Part):
    """Fits the implicit reward of the policy to the optimal advantage (A*-PO, arXiv 2505.20686 eq. 6).

    l = (beta log(pi(y|x)/pi_ref(y|x)) - A)^2 with A = R - V*(x). Its minimum over all y is pi_ref exp(A/beta), the optimum of the
    KL-regularised problem where V* is its value, and does not depend on who drew y: no ratio, no clip. Summed over decisions, never
    divided by the length.
    """

    beta: Annotated[float, Range(gt=0), "strength of the KL regularisation; small: the policy may move far"] = 1e-3
    equation: ClassVar[str] = "l = (beta log(pi(y|x)/pi_ref(y|x)) - A)^2,  A = R(x,y) - V*(x)"
    rows: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities now and of the reference."""
        return frozenset({"logp@now", "logp@ref"})

    @property
    def requires(self) -> frozenset[Can]:
        """A frozen reference."""
        return frozenset({Can.SCORE, Can.REFERENCE})

    def __call__(
        self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """The loss of each row, at its last decision."""
        assert_decisions(batch, advantage=advantage)
        return at_end((self.beta * row_log_ratio(batch, now, "ref") - row_advantage(batch, advantage)) ** 2, valid)


__all__ = ["AdvantageRegression", "at_end", "row_advantage", "row_log_ratio"]
