"""Lets a method's allocator answer a sampler's question which items to sample and how often, and checks what it answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from polopt.errors import CallError
from polopt.interfaces import Plan
from polopt.part import Part, call


class Allotment:
    """`Plan.allocate` of one iteration: calls the allocator, refuses sums and items that are wrong, notes what was asked."""

    def __init__(self, part: Part, plan: Plan, memory: Mapping[str, Tensor], rng: np.random.Generator) -> None:
        self.part, self.plan, self.memory, self.rng = part, plan, memory, rng
        self.asked: list[int] = []

    def __call__(self, prompts: int, each: int) -> list[tuple[int | None, int]]:
        """Items and counts, those of count 0 left out; their sum is `prompts` x `each`."""
        before = torch.tensor(self.asked, dtype=torch.long)
        found = call(self.part, plan=self.plan, prompts=prompts, each=each, asked=before, memory=self.memory, rng=self.rng)
        items, counts = (torch.as_tensor(x).reshape(-1).tolist() for x in found)
        self._check(items, counts, prompts * each)
        pairs = [(i, n) for i, n in zip(items, counts, strict=True) if n]
        self.asked += [i for i, _ in pairs]
        return list(pairs)

    def _check(self, items: list[int], counts: list[int], budget: int) -> None:
        """Raise `CallError` when the counts do not spend the budget exactly, or when an item does not exist."""
        who = f"allocator '{self.part.name or type(self.part).__name__}'"
        if len(items) != len(counts):
            raise CallError(f"{who} returned {len(items)} items and {len(counts)} counts, expected as many of both")
        odd = next((x for x in (*items, *counts) if type(x) is not int), None)
        if odd is not None:
            raise CallError(f"{who} returned {odd!r}, expected integers: items and how often to sample each")
        if any(n < 0 for n in counts) or sum(counts) != budget:
            raise CallError(f"{who} distributed {sum(counts)} samples (counts {counts[:8]}), expected exactly {budget}")
        bad = next((i for i in items if not 0 <= i < self.plan.size), None)
        if bad is not None:
            raise CallError(f"{who} chose item {bad}, expected numbers from 0 to {self.plan.size - 1}")


__all__ = ["Allotment"]
