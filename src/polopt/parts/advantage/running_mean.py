"""A running mean of outcomes as baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Can, Moment, Part, Range, register_part


@register_part("advantage", "running-mean")
@dataclass(frozen=True)
class RunningMean(Part):
    """Outcome minus the running mean of outcomes of past batches (reinforcement baseline of Williams 1992; arXiv 2402.14740).

    A_i = R_i - b, then b <- decay b + (1 - decay) mean R. The baseline that a batch meets does not depend on that batch; the first
    batch meets b = 0, and after it b is its mean.
    """

    decay: Annotated[float, Range(ge=0, lt=1), "of the running mean, per batch"] = 0.9
    equation: ClassVar[str] = "A_{i,t} = R_i - b,  then b <- d b + (1-d) mean_i R_i"
    rows: ClassVar[bool] = True
    moments: ClassVar[frozenset[str]] = frozenset({"scored"})

    @property
    def requires(self) -> frozenset[Can]:
        """Whole episodes."""
        return frozenset({Can.EPISODES})

    def initial(self) -> dict[str, Tensor]:
        """The baseline, and how many batches it has seen."""
        return {"baseline": torch.zeros(()), "batches": torch.zeros((), dtype=torch.long)}

    def __call__(self, batch: Batch, memory: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        """Advantages of the batch."""
        outcome = batch.outcome()
        gain = outcome - memory["baseline"].to(outcome)
        return torch.where(batch.mask, gain[:, None], torch.zeros_like(gain[:, None]))

    def observe(self, moment: Moment, *, batch: Any, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move the running mean towards the mean outcome of `batch` once it was used; an empty batch changes nothing."""
        if moment != "scored":
            return {}
        outcome, some = batch.outcome(), batch.mask.any(1)
        old, seen = memory["baseline"].to(outcome), memory["batches"]
        mean = torch.where(some, outcome, torch.zeros_like(outcome)).sum() / some.sum().clamp(min=1)
        new = torch.where(seen > 0, self.decay * old + (1 - self.decay) * mean, mean)
        return {"baseline": torch.where(some.any(), new, old), "batches": seen + some.any()}
