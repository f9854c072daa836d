"""Where returns end, discounted sums along the decision axis in log2(T) steps, and standardisation."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch
from polopt.columns import own_flags


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


def ends(batch: Batch) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """(terminated, terminated or truncated) of valid decisions: where the return ends, and where its sum is cut.

    An end that follows a decision of the policy after others that were not its own (tool text) is an end of that decision.
    """
    none = torch.zeros_like(batch.mask)
    terminated = none if batch.terminated is None else own_flags(batch.terminated, batch.mask)
    truncated = none if batch.truncated is None else own_flags(batch.truncated, batch.mask)
    return terminated, terminated | truncated


def chain(batch: Batch, factor: float, end: Bool[Tensor, "B T"], like: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """What a decision keeps of the sum after it: `factor`, 0 at an end, all of it where the policy did not decide."""
    return torch.full_like(like, factor).masked_fill(end, 0.0).masked_fill(~batch.mask, 1.0)


def standardised(x: Float[Tensor, "B T"], batch: Batch, eps: float = 1e-8) -> Float[Tensor, "B T"]:
    """(x - mean) / (std + eps) over the batch's valid decisions; all equal gives 0, a single decision stays as it is."""
    mean, std = batch.pool(x, "batch", "mean"), batch.pool(x, "batch", "std", ddof=1)
    spread = batch.pool(x, "batch", "max") > batch.pool(x, "batch", "min")  # exact, where a rounded std is not
    scaled = torch.where(batch.mask & spread, (x - mean) / (std + eps), torch.zeros_like(x))
    return torch.where(batch.mask.sum() > 1, scaled, x)
