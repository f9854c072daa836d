"""Prompts as left-padded tensors, and which rows share one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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


#: Buckets are made until less than this share of what is computed is padding, or a further one would save too little.
PADDING, LEAST = 0.06, 48


def buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups of similar length, so that padding each group to its longest row wastes little: row numbers, in order.

    The group with most padding is cut where that saves most, again and again. One group: all rows as they are.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    size = np.asarray(lengths)[order]
    real = int(size.sum())
    cuts = [(0, len(size))]
    while True:
        padded = [int(size[a]) * (b - a) for a, b in cuts]
        if sum(padded) - real <= PADDING * sum(padded):
            break
        best = max(range(len(cuts)), key=lambda i: padded[i] - int(size[slice(*cuts[i])].sum()))
        a, b = cuts[best]
        saved = (size[a] - size[a:b]) * np.arange(b - a, 0, -1)
        k = int(saved.argmax())
        if saved[k] < LEAST:
            break
        cuts[best : best + 1] = [(a, a + k), (a + k, b)]
    return [list(range(len(size)))] if len(cuts) == 1 else [order[a:b].tolist() for a, b in cuts]


def _first(inverse: Int[Tensor, " B"]) -> Int[Tensor, " U"]:
    """The first row of each unit."""
    rows = torch.arange(inverse.shape[0], device=inverse.device)
    out = torch.full((int(inverse.max()) + 1,), inverse.shape[0], device=inverse.device)
    return out.scatter_reduce(0, inverse, rows, "amin")
