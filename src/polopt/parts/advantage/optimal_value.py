"""The optimal value of a KL-regularised problem, from samples of the reference, and advantages against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Can, Moment, Part, Range, register_part


def soft_value(
    reward: Float[Tensor, " N"], item: Int[Tensor, " N"], beta: float, value: Float[Tensor, " P"], count: Float[Tensor, " P"]
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """beta log mean exp(r/beta) over all samples of each item so far: of `count` earlier ones it is `value`; N more are `reward`.

    beta = inf is the mean, 0 the maximum. Items without any sample keep their value. Exact however samples are divided into calls.
    """
    reward = reward.to(value.dtype)
    more = torch.zeros_like(count).index_add(0, item, torch.ones_like(reward))
    total = count + more
    if math.isinf(beta):
        found = (torch.zeros_like(value).index_add(0, item, reward) + count * value) / total
    else:
        lowest = torch.full_like(value, -math.inf)
        before = torch.where(count > 0, value, lowest)
        best = before.scatter_reduce(0, item, reward, "amax")
        found = best
        if beta > 0:  # relative to the best sample, so that nothing overflows
            mass = count * ((before - best) / beta).exp()
            mass = mass.index_add(0, item, ((reward - best[item]) / beta).exp())
            found = best + beta * (mass / total).log()
    return torch.where(more > 0, found, value), total  # what was found for an item without samples is not a number


@register_part("advantage", "optimal-advantage")
@dataclass(frozen=True)
class OptimalAdvantage(Part):
    """The outcome of a row less the optimal value of its item, A = R - V*(x), which is known beforehand (arXiv 2505.20686 eq. 5).

    V* is a table of all items, handed over by a stage that runs `soft-value`. An item that was not estimated counts as the mean of
    those that were (0 if none was).
    """

    equation: ClassVar[str] = "A = R(x,y) - V*(x)"
    rows: ClassVar[bool] = True

    @property
    def table(self) -> Mapping[str, float]:
        """The value of each item, and from how many samples."""
        return {"value": 0.0, "count": 0.0}

    @property
    def reads(self) -> frozenset[str]:
        """Which item a row answers."""
        return frozenset({"item"})

    @property
    def requires(self) -> frozenset[Can]:
        """Whole episodes."""
        return frozenset({Can.EPISODES})

    def __call__(self, batch: Batch, memory: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        """Advantages, the same for all decisions of a row."""
        value, known = memory["value"], memory["count"] > 0
        mean = (value * known).sum() / known.sum().clamp(min=1)
        table = torch.where(known, value, mean).to(batch.mask.device)
        outcome = batch.outcome()
        advantage = outcome - table[batch.keys["item"]].to(outcome.dtype)
        return torch.where(batch.mask, advantage[:, None], torch.zeros_like(advantage[:, None]))


@register_part("advantage", "soft-value")
@dataclass(frozen=True)
class SoftValue(OptimalAdvantage):
    """Estimates V*(x) of each item from all scored samples of the present policy, which must be the reference.

    arXiv 2505.20686 eq. 4. Large beta: few samples suffice, but the value tends to their mean; small beta: it tends to their
    maximum. (In the paper's code 0 means the mean, and a negative number V* = 0.) Where all rewards of an item are equal, the
    value is that reward, exactly.
    """

    beta: Annotated[float, Range(ge=0), "temperature; inf: the mean reward, 0: the best"] = 0.5
    equation: ClassVar[str] = "V*(x) = beta log (1/N) sum_i exp(r_i / beta),  y_i ~ pi_ref(.|x)"
    moments: ClassVar[frozenset[str]] = frozenset({"scored"})

    def observe(self, moment: Moment, *, batch: Batch, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the samples of `batch` into the table."""
        rows = batch.mask.any(1)
        item, outcome = (x[rows].to(memory["value"].device) for x in (batch.keys["item"], batch.outcome()))
        value, count = soft_value(outcome, item, self.beta, memory["value"], memory["count"])
        return {"value": value, "count": count}


__all__ = ["OptimalAdvantage", "SoftValue", "soft_value"]
