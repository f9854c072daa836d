"""Checks and small tensor helpers shared by parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.pooling import not_half

#: Log-ratios are clamped to this magnitude before `exp`: e^20 is far outside every trust region and finite in float32.
MAX_LOG_RATIO = 20.0


def assert_decisions(batch: Batch, **tensors: Tensor) -> None:
    """Raise `CallError` naming the tensor whose shape is not that of the batch's decisions [B,T]."""
    for name, x in tensors.items():
        if x.shape != batch.mask.shape:
            raise CallError(f"'{name}' has shape {tuple(x.shape)}, expected {tuple(batch.mask.shape)} (rows x decisions)")


def keep(valid: Bool[Tensor, "B T"], x: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`x` where `valid`, else 0; unlike a product this also removes NaN and infinity, and their gradients."""
    return torch.where(valid, x, torch.zeros_like(x))


def log_ratio(batch: Batch, now: Mapping[str, Tensor], view: str = "old") -> Float[Tensor, "B T"]:
    """log pi_now - log pi_view of the taken decisions, clamped to +-20, 0 outside the mask; half precision becomes float32."""
    logp, other = now["logp"], batch.stat(f"logp@{view}")
    assert_decisions(batch, **{"logp@now": logp, f"logp@{view}": other})
    return keep(batch.mask, not_half(logp) - not_half(other)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
