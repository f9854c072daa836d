"""Prompts as left-padded tensors, and which rows share one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "U P"], Bool[Tensor, "U P"]]:
    """Ids filled up on the left, and where they are real."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], dtype=torch.long)
    lengths = torch.tensor([len(p) for p in prompts])
    return ids, torch.arange(width)[None] >= width - lengths[:, None]


def positions(mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Position of each token in its own text: models do not derive it from left padding themselves."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def shared(ids: Int[Tensor, "B P"], mask: Bool[Tensor, "B P"]) -> tuple[Int[Tensor, " U"], Int[Tensor, " B"]]:
    """One representative row per distinct prompt, and for each row the number of its prompt.

    Distinct prompts are found by a random 64-bit hash; should two prompts collide, rows are compared in full.
    """
    plain = torch.where(mask, ids + 1, 0)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (ids.shape[1],), generator=generator).to(ids.device)
    _, inverse = torch.unique((plain * weights).sum(1), return_inverse=True)
    first = _first(inverse)
    if not torch.equal(plain[first][inverse], plain):
        _, inverse = torch.unique(plain, dim=0, return_inverse=True)
        first = _first(inverse)
    return first, inverse


def _first(inverse: Int[Tensor, " B"]) -> Int[Tensor, " U"]:
    """The first row of each unit."""
    rows = torch.arange(inverse.shape[0], device=inverse.device)
    out = torch.full((int(inverse.max()) + 1,), inverse.shape[0], device=inverse.device)
    return out.scatter_reduce(0, inverse, rows, "amin")
