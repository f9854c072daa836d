"""PPO's second variant: a penalty on the divergence from the old policy whose weight adapts to a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Can, Moment, Part, Range, register_part
from polopt.parts.shapes import keep, log_ratio


@register_part("penalty", "kl-old-adaptive")
@dataclass(frozen=True)
class AdaptiveKL(Part):
    """beta KL(pi_old || pi), with beta halved or doubled towards a target (PPO, arXiv 1707.06347, sec. 4).

    The divergence is estimated at the decisions that pi_old took: (r - 1) - log r >= 0, with r = pi/pi_old, which is unbiased.
    After the steps of an update, d being its mean: beta / 2 if d < target / 1.5, 2 beta if d > 1.5 target. Use it with the plain
    `ratio` surrogate.
    """

    target: Annotated[float, Range(gt=0), "wanted mean divergence per update"] = 0.01
    beta0: Annotated[float, Range(gt=0), "weight at the start of training"] = 1.0
    equation: ClassVar[str] = "l_t = beta ((r_t - 1) - log r_t);  beta <- beta/2 if d < d_targ/1.5,  2 beta if d > 1.5 d_targ"
    moments: ClassVar[frozenset[str]] = frozenset({"stepped"})

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities now, at the start of the update, and after its steps."""
        return frozenset({"logp@now", "logp@old", "logp@stepped"})

    @property
    def requires(self) -> frozenset[Can]:
        """Log-probabilities of given decisions."""
        return frozenset({Can.SCORE})

    def initial(self) -> dict[str, Tensor]:
        """The weight."""
        return {"beta": torch.tensor(self.beta0)}

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        """The penalty of each decision."""
        d = log_ratio(batch, now)
        return memory["beta"].to(d) * (d.exp() - 1 - d)

    def observe(self, moment: Moment, *, batch: Any, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adapt the weight to the divergence that the update made; an empty batch changes nothing."""
        if moment != "stepped":
            return {}
        d = log_ratio(batch, {"logp": batch.stat("logp@stepped")})
        count = batch.mask.sum()
        kl = keep(batch.mask, d.exp() - 1 - d).sum() / count.clamp(min=1)
        low, high = (count > 0) & (kl < self.target / 1.5), kl > 1.5 * self.target
        return {"beta": memory["beta"] * torch.where(low, 0.5, torch.where(high, 2.0, 1.0))}
