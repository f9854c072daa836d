"""BNPO: centred success divided by a Beta density that follows how hard the prompts are for the present policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.part import Moment, Range, register_part
from polopt.parts.advantage.channels import outcomes, pooled
from polopt.parts.advantage.grouped import Grouped
from polopt.pooling import not_half

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update

LARGEST = 1e6  # of the weight 1/f, which is infinite where the density is 0


def moments_of(p: Float[Tensor, "B K"], per_prompt: Float[Tensor, " B"]) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Mean and unbiased variance of prompts' success rates; row i counts `per_prompt[i]`, 1 over the rows of its prompt.

    Fewer than two prompts: 0 and 1, for which the density of `normaliser` is flat.
    """
    w = per_prompt[:, None]
    n = w.sum()
    mean = (w * p).sum(0) / n
    var = (w * (p - mean).square()).sum(0) / (n - 1).clamp(min=1)
    several = n > 1.5
    return torch.where(several, mean, torch.zeros_like(mean)), torch.where(several, var, torch.ones_like(var))


def fitted(mean: Float[Tensor, " K"], var: Float[Tensor, " K"]) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Beta parameters (a, b) with this mean and variance: k m and k (1 - m), k = m (1 - m)/V - 1. Without variance: (0, 0)."""
    spread = var > 1e-12
    k = torch.where(spread, mean * (1 - mean) / var - 1, torch.zeros_like(mean))
    return k * mean, k * (1 - mean)


def normaliser(mean: Float[Tensor, " K"], var: Float[Tensor, " K"]) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Parameters (alpha, beta) of the density that divides: 1 + a/3 and 1 + b/3 of the fitted ones, at least 1."""
    a, b = fitted(mean, var)
    return (1 + a / 3).clamp(min=1), (1 + b / 3).clamp(min=1)


def density(p: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Beta density of p in [0, 1]."""
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (torch.xlogy(alpha - 1, p) + torch.xlogy(beta - 1, 1 - p) - log_norm).exp()


@register_part("advantage", "beta-normalised")
@dataclass(frozen=True)
class BetaNormalised(Grouped):
    """A_i = (R_i - p(q)) / f(p(q); alpha, beta), p(q) the mean reward of the prompt's rows (BNPO, arXiv 2506.02864, eq. 8 to 11).

    f is a Beta density whose parameters, 1 + a/3 and 1 + b/3 (at least 1), follow from the Beta(a, b) with the mean and variance of
    p over the prompts of the batch; of all Beta densities it gives the gradient of least variance. alpha = beta = 1 is REINFORCE
    with the group's mean, 3/2 for both GRPO times pi/8. Each reward channel is normalised by itself and the results are averaged.
    Rewards are mapped from [low, high] to [0, 1]. 1/f is at most 1e6; rows of equal reward get 0; if all prompts are equally hard,
    f is flat. form "code": a row that is alone with its prompt has p = 0, as in the released code, instead of no advantage.
    """

    low: Annotated[float, Range(), "smallest reward of a channel"] = 0.0
    high: Annotated[float, Range(), "largest reward of a channel"] = 1.0
    decompose: Annotated[bool, "each reward channel by itself; no: their sum"] = True
    decay: Annotated[float, Range(ge=0, lt=1), "of running moments over batches; 0: those of the batch alone"] = 0.0
    alpha: Annotated[float | None, Range(ge=1), "fixed parameter of the density; none: fitted"] = None
    beta: Annotated[float | None, Range(ge=1), "fixed parameter of the density; none: fitted"] = None
    form: Annotated[Literal["paper", "code"], "what a row without companions is compared with"] = "paper"
    equation: ClassVar[str] = (
        "A_{i,t} = (R_i - p)/f(p; alpha, beta),  alpha = max(1, 1 + a/3), beta = max(1, 1 + b/3),  p ~ Beta(a, b) over prompts"
    )
    conditions: ClassVar[tuple[str, ...]] = ("success-or-failure",)  # of random batches: it refuses rewards out of range
    moments: ClassVar[frozenset[str]] = frozenset({"scored"})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse an empty range of rewards, one fixed parameter without the other, and groups of one."""
        if self.low >= self.high:
            return f"low = {self.low:g} is not below high = {self.high:g}"
        if (self.alpha is None) != (self.beta is None):
            return f"alpha = {self.alpha} and beta = {self.beta}: fix both or none"
        return super().validate(method, update)

    def initial(self) -> dict[str, Tensor]:
        """Running moments of success rates, by channel, and how many batches they have seen."""
        return {"mean": torch.zeros(()), "var": torch.ones(()), "batches": torch.zeros((), dtype=torch.long)}

    def __call__(self, batch: Batch, memory: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        """Advantages of the batch, which must hold whole groups. Raises `CallError` for rewards outside [low, high]."""
        r = self._successes(batch)
        p, alone = self._rates(batch, r)
        if self.alpha is not None and self.beta is not None:
            alpha, beta = p.new_tensor(self.alpha), p.new_tensor(self.beta)
        else:
            alpha, beta = normaliser(*self._blended(batch, p, memory))
        gain = (r - p) * (1 / density(p, alpha, beta)).clamp(max=LARGEST)
        # a rounded mean of equal numbers may differ from them, which 1/f would blow up
        alike = (pooled(batch, r, "max") <= pooled(batch, r, "min")) & ~alone
        gain = torch.where(alike, torch.zeros_like(gain), gain).mean(1)
        return torch.where(batch.mask, gain[:, None], torch.zeros_like(gain[:, None]))

    def observe(self, moment: Moment, *, batch: Any, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move the running moments towards those of `batch` once it was used; an empty batch changes nothing."""
        if moment != "scored" or not self.decay or not bool(batch.mask.any()):
            return {}
        mean, var = self._blended(batch, self._rates(batch, self._successes(batch))[0], memory)
        return {"mean": mean, "var": var, "batches": memory["batches"] + 1}

    def _successes(self, batch: Batch) -> Float[Tensor, "B K"]:
        """Outcomes of all channels in [0, 1]."""
        found = not_half(outcomes(batch))
        found = found if self.decompose else found.sum(1, keepdim=True)
        r = (found - self.low) / (self.high - self.low)
        bad = ((r < -1e-6) | (r > 1 + 1e-6)) & batch.mask.any(1)[:, None]
        if bool(bad.any()):
            row, channel = (int(i) for i in bad.nonzero()[0])
            raise CallError(
                f"advantage '{self.name}' takes rewards in [low, high] = [{self.low:g}, {self.high:g}], but row {row} has "
                f"{float(found[row, channel]):g} in channel {channel}: set advantage.low and advantage.high"
            )
        return r.clamp(0, 1)

    def _rates(self, batch: Batch, r: Float[Tensor, "B K"]) -> tuple[Float[Tensor, "B K"], Tensor]:
        """Success rate of each row's prompt, and where a row is alone with it."""
        alone = pooled(batch, r, "count") <= 1
        p = pooled(batch, r, "mean")
        return (torch.where(alone, torch.zeros_like(p), p) if self.form == "code" else p), alone

    def _blended(
        self, batch: Batch, p: Float[Tensor, "B K"], memory: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        some = batch.mask.any(1)
        size = batch.pool(p[:, 0], "group", "count").clamp(min=1)
        new = moments_of(p, some.to(p) / size)
        if not self.decay:
            return new
        old = memory["mean"].to(p), memory["var"].to(p)
        seen = memory["batches"].to(p.device) > 0
        mean, var = (torch.where(seen, self.decay * a + (1 - self.decay) * b, b) for a, b in zip(old, new, strict=True))
        return mean, var
