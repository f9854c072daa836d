"""Discounted sums along the decision axis in log2(T) steps, and standardisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch


def discounted_sum(x: Float[Tensor, "B T"], carry: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """y_t = x_t + carry_t y_{t+1}, with y_T = 0; by doubling: after step k, x_t covers the next 2^k terms."""
    if x.shape != carry.shape:
        raise ValueError(f"x {tuple(x.shape)} and carry {tuple(carry.shape)} differ in shape")
    span, length = 1, x.shape[1]
    while span < length:
        x = torch.cat([x[:, :-span] + carry[:, :-span] * x[:, span:], x[:, -span:]], 1)
        carry = torch.cat([carry[:, :-span] * carry[:, span:], carry[:, -span:]], 1)
        span *= 2
    return x


def standardised(x: Float[Tensor, "B T"], batch: Batch, eps: float = 1e-8) -> Float[Tensor, "B T"]:
    """(x - mean) / (std + eps) over the batch's valid decisions; all equal gives 0, a single decision stays as it is."""
    mean, std = batch.pool(x, "batch", "mean"), batch.pool(x, "batch", "std", ddof=1)
    spread = batch.pool(x, "batch", "max") > batch.pool(x, "batch", "min")  # exact, where a rounded std is not
    scaled = torch.where(batch.mask & spread, (x - mean) / (std + eps), torch.zeros_like(x))
    return torch.where(batch.mask.sum() > 1, scaled, x)
