"""Outcomes of rows by reward channel, and their statistics within groups."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch, How
from polopt.errors import MissingStatistic


def outcomes(batch: Batch) -> Float[Tensor, "B K"]:
    """Sum of each reward channel over the valid decisions of each row."""
    if batch.reward is None:
        raise MissingStatistic("the batch has no reward: pass reward= with shape [B], [B,T] or [B,T,K]")
    return torch.where(batch.mask[..., None], batch.reward, torch.zeros_like(batch.reward)).sum(1)


def pooled(batch: Batch, x: Float[Tensor, "B K"], how: How, by: str = "group", ddof: int = 0) -> Float[Tensor, "B K"]:
    """Statistic of each column over the rows of each group, spread back on them."""
    return torch.stack([batch.pool(column, by, how, ddof=ddof) for column in x.unbind(1)], 1)


__all__ = ["outcomes", "pooled"]
