"""Correction for a sampler whose probabilities differ from the learner's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Part, Range, register_part
from polopt.parts.shapes import MAX_LOG_RATIO, assert_decisions, keep


@register_part("weight", "truncated-importance")
@dataclass(frozen=True)
class TruncatedImportance(Part):
    """Truncated importance sampling: w_t = min(pi_old(a_t|s_t) / pi_behaviour(a_t|s_t), cap) (Ionides 2008; Yao et al. 2025).

    pi_behaviour is the sampler's own number, pi_old the learner's at the start of the update; with an exact sampler w = 1. The
    weight multiplies the surrogate and stays out of the denominators.
    """

    cap: Annotated[float, Range(gt=0), "largest weight"] = 2.0
    equation: ClassVar[str] = "w_t = min(pi_old(a_t|s_t)/pi_behaviour(a_t|s_t), C)"

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities at the start of the update and of the sampler."""
        return frozenset({"logp@old", "logp@behaviour"})

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """The weight of each decision."""
        old, behaviour = batch.stat("logp@old").detach(), batch.stat("logp@behaviour").detach()
        assert_decisions(batch, **{"logp@old": old, "logp@behaviour": behaviour})
        return keep(batch.mask, old - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=self.cap)
