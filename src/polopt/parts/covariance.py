"""The covariance of log-probability and advantage, which drives the entropy of softmax policies, decision by decision."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.parts.shapes import keep
from polopt.pooling import not_half


def centred_product(
    logp: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """C_t = (log pi_t - mean log pi)(A_t - mean A) over valid decisions, 0 elsewhere; its mean is their covariance.

    To first order a policy gradient step of size eta changes the entropy of a softmax policy by -eta times the covariance of log pi
    with pi A, a natural one by that with A (arXiv 2505.22617, theorem 1 and 2).
    """
    n = valid.sum().clamp(min=1)
    x, a = keep(valid, not_half(logp)), keep(valid, not_half(advantage))
    return keep(valid, (x - x.sum() / n) * (a - a.sum() / n))


def first(score: Float[Tensor, "B T"], among: Bool[Tensor, "B T"], count: Tensor) -> Bool[Tensor, "B T"]:
    """The `count` members of `among` with the lowest score, all of them if there are fewer; ties go to the earlier decision."""
    flat = torch.where(among, score, torch.full_like(score, torch.inf)).flatten()
    place = flat.argsort(stable=True).argsort()
    return among & (place < count).view(among.shape)


def floor_of(members: Bool[Tensor, "B T"], share: float) -> Tensor:
    """floor(share x members), a float64; what rounding takes from a whole number is not missing."""
    return (members.sum().double() * share + 1e-9).floor()


def share_of(valid: Bool[Tensor, "B T"], share: float) -> Tensor:
    """max(1, floor(share x valid decisions)), 0 for share = 0."""
    count = floor_of(valid, share)
    return count if share == 0 else count.clamp(min=1)


__all__ = ["centred_product", "first", "floor_of", "share_of"]
