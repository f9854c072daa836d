"""Regression surrogates: log-ratios of whole rows are fitted to rewards, instead of being weighed with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch
from polopt.columns import last_valid
from polopt.part import Can, Part, Range, register_part
from polopt.parts.shapes import assert_decisions, keep
from polopt.parts.surrogate.on_ratio import OnRatio
from polopt.pooling import not_half

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


def row_log_ratio(batch: Batch, now: Mapping[str, Tensor], view: str) -> Float[Tensor, " B"]:
    """log pi_now(row) - log pi_view(row), summed over its decisions, not clamped: a regression never takes its exponential."""
    other = batch.stat(f"logp@{view}")
    assert_decisions(batch, **{"logp@now": now["logp"], f"logp@{view}": other})
    return keep(batch.mask, not_half(now["logp"]) - not_half(other)).sum(1)


def row_advantage(batch: Batch, advantage: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """The advantage of a row: the mean over its decisions that count, which all have the same."""
    return batch.pool(advantage, "row", "mean", valid=valid)[:, 0]


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
        return at_end((self.beta * row_log_ratio(batch, now, "ref") - row_advantage(batch, advantage, valid)) ** 2, valid)


@register_part("surrogate", "relative-regression")
@dataclass(frozen=True)
class RelativeRegression(OnRatio):
    """Fits differences of log-ratios to differences of rewards, between answers to the same prompt (REBEL, arXiv 2404.16767 eq. 5).

    For a pair: l = ((d - d')/eta - (A - A'))^2, d = log pi(y|x)/pi_old(y|x) summed over the answer's decisions. Its minimum over
    all pairs is pi_old exp(eta A), one step of mirror descent; what is equal within a group (baselines) has no effect. In groups of
    more than two: the mean over all pairs, or the best and the worst answer alone, as in the released large-batch version. An
    answer without a partner, two equal answers with equal rewards: 0. form "code": eta^2 times as much, (d - d' - eta (A - A'))^2.
    """

    eta: Annotated[float, Range(gt=0), "step size: how far a difference of rewards of 1 moves the log-ratios"] = 1.0
    pairs: Annotated[Literal["all", "best-worst"], "which answers of a group are compared"] = "all"
    form: Annotated[Literal["paper", "code"], "whether the residual is in units of rewards or of log-ratios"] = "paper"
    equation: ClassVar[str] = "l = ((d - d')/eta - (A - A'))^2,  d = log pi(y|x)/pi_old(y|x)   [form code: times eta^2]"
    rows: ClassVar[bool] = True
    groups: ClassVar[bool] = True
    surveys: ClassVar[tuple[str, ...]] = ("centre@minibatch", "share@minibatch")

    @property
    def reads(self) -> frozenset[str]:
        """The group key: whose answers are compared."""
        return frozenset({"group"})

    @property
    def requires(self) -> frozenset[Can]:
        """Several samples from one starting point."""
        return frozenset({Can.SCORE, Can.GROUPS})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse groups of one, in which there is nothing to compare."""
        size = getattr(method.sampler, "group_size", None)
        if size is None or size >= 2:
            return None
        return f"compares pairs of answers, but sampler.group_size = {size}; it takes 2 or more"

    def survey(
        self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]
    ) -> dict[str, Tensor]:
        """The mean residual of the answers that each row is compared with, itself included, and how much the row counts.

        With n answers and residuals e_i the mean over all pairs of (e_i - e_j)^2 is that over answers of 2n/(n-1) (e_i - mean e)^2.
        """
        score, taken = row_advantage(batch, advantage, valid), valid.any(1)
        size = batch.pool(score, "group", "count", valid=valid)
        if self.pairs == "best-worst":
            taken = _extremes(batch, score, valid)
        count = batch.pool(taken.to(score), "group", "sum", valid=valid)
        error = torch.where(taken, self._residual(batch, now, advantage, valid), 0.0)
        centre = batch.pool(error, "group", "sum", valid=valid) / count.clamp(min=1)
        share = torch.where(taken & (count > 1), 2 * size / (count - 1).clamp(min=1), 0.0)
        return {"centre@minibatch": centre[:, None].expand(valid.shape), "share@minibatch": share[:, None].expand(valid.shape)}

    def _residual(
        self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, " B"]:
        ratio, score = row_log_ratio(batch, now, "old"), row_advantage(batch, advantage, valid)
        return ratio / self.eta - score if self.form == "paper" else ratio - self.eta * score

    def __call__(
        self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """The loss of each row, at its last decision; their mean is that over pairs.

        The centre is without gradient: that of the sum of squares around a mean does not depend on it.
        """
        assert_decisions(batch, advantage=advantage)
        error = self._residual(batch, now, advantage, valid) - batch.stat("centre@minibatch")[:, 0]
        return at_end(batch.stat("share@minibatch")[:, 0] * error**2, valid)


def _extremes(batch: Batch, score: Float[Tensor, " B"], valid: Bool[Tensor, "B T"]) -> Bool[Tensor, " B"]:
    """The first row with the highest and the last one with the lowest score of each group: two rows, unless it has only one."""
    place, rows = torch.arange(len(score), device=score.device, dtype=torch.float64), valid.any(1)
    nowhere = torch.full_like(place, -torch.inf)

    def first(x: Tensor, order: Tensor) -> Tensor:
        top = rows & (x >= batch.pool(x, "group", "max", valid=valid))
        return top & (order >= batch.pool(torch.where(top, order, nowhere), "group", "max", valid=valid))

    return first(score, -place) | first(-score, place)


__all__ = ["AdvantageRegression", "RelativeRegression", "at_end", "row_advantage", "row_log_ratio"]
