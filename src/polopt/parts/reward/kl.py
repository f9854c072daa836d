"""A KL penalty to the reference as part of the reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.columns import last_valid
from polopt.errors import MissingStatistic
from polopt.part import Can, Part, Range, register_part
from polopt.parts.shapes import assert_decisions, keep


@register_part("reward", "kl-in-reward")
@dataclass(frozen=True)
class KLInReward(Part):
    """Subtract beta (log pi_old - log pi_ref) of the taken decisions from the first reward channel, without gradient.

    form "token": at each decision (InstructGPT, arXiv 2203.02155; Ziegler et al., 1909.08593); "sequence": the sum of the
    row at its last decision (RLOO, 2402.14740).
    The log-probabilities are those of the policy that drew the decisions, at the start of the update.
    """

    beta: Annotated[float, Range(ge=0), "weight of the penalty"] = 0.05
    form: Annotated[Literal["token", "sequence"], "where it lands"] = "token"
    equation: ClassVar[str] = "r_t -= beta (log pi_old(a_t|s_t) - log pi_ref(a_t|s_t))   [sequence: the sum over t, at the last t]"

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities at the start of the update and of the reference."""
        return frozenset({"logp@old", "logp@ref"})

    @property
    def requires(self) -> frozenset[Can]:
        """A frozen reference."""
        return frozenset({Can.SCORE, Can.REFERENCE})

    def __call__(self, batch: Batch) -> Float[Tensor, "B T K"]:
        """The rewards with the penalty."""
        if batch.reward is None:
            raise MissingStatistic("the batch has no reward: pass reward= with shape [B], [B,T] or [B,T,K]")
        old, ref = batch.stat("logp@old").detach(), batch.stat("logp@ref").detach()
        assert_decisions(batch, **{"logp@old": old, "logp@ref": ref})
        gap = keep(batch.mask, old - ref)
        if self.form == "sequence":
            total = gap.sum(1, keepdim=True)
            gap = torch.where(last_valid(batch.mask), total, torch.zeros_like(total))
        return torch.cat([batch.reward[..., :1] - self.beta * gap[..., None], batch.reward[..., 1:]], -1)
