"""A source that trains on the last few batches at once: stale data, reused."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from polopt.batch import OWN, REPLAYED, Batch
from polopt.part import Can, Part, Range, register_part
from polopt.parts.source import critics_without_replay

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("source", "window")
@dataclass(frozen=True)
class Window(Part):
    """What was just sampled together with the batches of the `size` - 1 iterations before it.

    Every answer is thus trained on in `size` iterations, by policies that have moved on since. The ratio of a decision divides by
    the policy that wrote it: the sampler's own log-probabilities become `logp@old`, for fresh decisions too, or those that the loop
    evaluates before the batch is kept where the sampler drew from another distribution (truncated, decoded, hotter). Old decisions
    have the provenance `REPLAYED`. Groups stay apart, so that answers are compared with those that the same policy gave.
    """

    size: Annotated[int, Range(ge=1), "batches that are trained on at once, the fresh one included"] = 2

    @property
    def needs(self) -> frozenset[str]:
        """The sampler's log-probabilities."""
        return frozenset({"logp@behaviour"})

    @property
    def requires(self) -> frozenset[Can]:
        """Whole episodes, which can be joined."""
        return frozenset({Can.SCORE, Can.EPISODES})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse a method that learns from kept transitions."""
        return critics_without_replay(method)

    def __call__(self, batches: dict[str, Batch], store: MutableMapping[str, Batch]) -> dict[str, Batch]:
        """The joined batches; keeps the fresh ones."""
        out = {}
        for name, batch in batches.items():
            fresh = _written(batch, OWN)
            kept = [store[k] for i in range(1, self.size) if (k := f"{name}/{i}") in store]
            out[name] = Batch.cat([fresh, *kept])
            for i, old in enumerate([_written(fresh, REPLAYED), *kept][: self.size - 1], 1):
                store[f"{name}/{i}"] = old
        return out


def _written(batch: Batch, provenance: int) -> Batch:
    """The batch with the log-probabilities of the policy that wrote it, and the provenance of the policy's own decisions."""
    mine: Tensor = torch.full_like(batch.mask, provenance, dtype=torch.long)
    source = mine if batch.source is None else torch.where(batch.mask, mine, batch.source)
    old = batch.stats.get("logp@old")  # known where the sampler's numbers are not the policy's
    return replace(batch.adding({"logp@old": batch.stat("logp@behaviour") if old is None else old}), source=source)


__all__ = ["Window"]
