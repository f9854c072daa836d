"""DAPO's soft punishment of answers that come close to the generation limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.columns import last_valid
from polopt.errors import CallError, MissingStatistic
from polopt.part import Can, Part, Range, register_part


@register_part("reward", "soft-overlong")
@dataclass(frozen=True)
class SoftOverlong(Part):
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), added to the first reward channel at the last decision of a row.

    With L the generation limit `batch.horizon` and c = cache L: 0 for |y| <= L - c; ((L - c) - |y|)/c up to L; -1 beyond.
    """

    cache: Annotated[float, Range(ge=0, le=1), "share of the limit in which the punishment rises (paper: 4096 of 20480)"] = 0.2
    equation: ClassVar[str] = "R += 0 if |y| <= L-c;  ((L-c) - |y|)/c if L-c < |y| <= L;  -1 if |y| > L"

    @property
    def requires(self) -> frozenset[Can]:
        """Whole answers, whose length is judged."""
        return frozenset({Can.EPISODES})

    def __call__(self, batch: Batch) -> Float[Tensor, "B T K"]:
        """The rewards with the punishment."""
        if batch.reward is None:
            raise MissingStatistic("the batch has no reward: pass reward= with shape [B], [B,T] or [B,T,K]")
        if batch.horizon < 1:
            raise CallError(f"batch.horizon = {batch.horizon}: soft-overlong needs the generation limit, at least 1")
        limit, length = float(batch.horizon), batch.lengths().to(batch.reward.dtype)
        cache = self.cache * limit
        over = (length - (limit - cache)).clamp(min=0)
        rising = -over / cache if cache > 0 else torch.zeros_like(over)
        punishment = torch.where(length > limit, torch.full_like(over, -1.0), rising)
        extra = torch.where(last_valid(batch.mask), punishment[:, None], torch.zeros_like(punishment[:, None]))
        return torch.cat([batch.reward[..., :1] + extra[..., None], batch.reward[..., 1:]], -1)
