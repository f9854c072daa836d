"""Rewards that are granted only where a harder one was earned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError, MissingStatistic
from polopt.part import Can, Part, Range, register_part
from polopt.parts.advantage.channels import outcomes


@register_part("reward", "conditioned")
@dataclass(frozen=True)
class Conditioned(Part):
    """Easy rewards count only in rows whose hard one reached a threshold (GDPO, arXiv 2601.05242, sec. 3.2).

    An easy reward (a format, a short answer) is learned first and then keeps the policy from the hard one; made conditional, it
    cannot be had alone, which no weight achieves.
    """

    hard: Annotated[int, Range(ge=0), "channel that must be earned; all others depend on it"] = 0
    threshold: Annotated[float, Range(), "sum of the hard reward over the row that grants the others"] = 1.0
    equation: ClassVar[str] = "r_easy <- r_easy 1{r_hard >= threshold}"

    @property
    def requires(self) -> frozenset[Can]:
        """Whole episodes."""
        return frozenset({Can.EPISODES})

    def __call__(self, batch: Batch) -> Float[Tensor, "B T K"]:
        """Rewards of the batch. Raises `CallError` when there is no such channel."""
        if batch.reward is None:
            raise MissingStatistic("the batch has no reward: pass reward= with shape [B,T,K]")
        k = batch.reward.shape[-1]
        if self.hard >= k:
            raise CallError(f"reward.hard = {self.hard}, but there are {k} reward channels, numbered from 0")
        granted = outcomes(batch)[:, self.hard] >= self.threshold
        free = torch.arange(k, device=granted.device) == self.hard
        return torch.where(granted[:, None, None] | free, batch.reward, torch.zeros_like(batch.reward))
