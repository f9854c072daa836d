"""BAPO: clip bounds that are searched for every minibatch, until positive advantages contribute their share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Range, register_part, register_preset
from polopt.parts.shapes import assert_decisions, keep, log_ratio
from polopt.parts.surrogate.on_ratio import OnRatio
from polopt.pooling import not_half

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


def stairs(start: float, stop: float, step: float) -> list[float]:
    """start, start + step, ... up to stop, which is the last one."""
    n = math.ceil((stop - start) / step - 1e-9)  # so that a last stair that is stop but for rounding comes once
    return [start + i * step for i in range(n)] + [stop]


@register_part("surrogate", "balanced-clip")
@dataclass(frozen=True)
class BalancedClip(OnRatio):
    """BAPO's clipped surrogate (arXiv 2510.18927, eq. 8 and algorithm 1): l_t = -min(r_t A_t, clip(r_t, c_low, c_high) A_t).

    For each minibatch the first bounds are taken, on a path from the start to the largest, at which positive advantages contribute
    enough; if none do, the last ones. With P the sum over A_t > 0, N that over A_t < 0:
    form "paper": first c_high rises, then c_low, until P/(P + N) >= target; each decision counts with the probability that it was
    sampled with. form "code" (the released recipe): first c_low rises, then c_high, until P/N >= target; all count alike.
    contribution "value" (paper and code): |A_t| min(r_t, c_high) and |A_t| max(r_t, c_low), by which a higher c_low makes N larger,
    so that it is only raised where nothing helps; "gradient": r_t |A_t| of decisions that are not clipped, by which either helps.
    Bounds are those of the ratio itself. dual: as in `clip`; the recipe has 3, the paper none.
    """

    low_start: Annotated[float, Range(ge=0, le=1), "lower bound of the ratio at the start of the search"] = 0.6
    low_max: Annotated[float, Range(ge=0, le=1), "and at most"] = 0.9
    low_step: Annotated[float, Range(gt=0), "by which it is raised"] = 0.02
    high_start: Annotated[float, Range(ge=1), "upper bound of the ratio at the start of the search"] = 1.2
    high_max: Annotated[float, Range(ge=1), "and at most"] = 3.0
    high_step: Annotated[float, Range(gt=0), "by which it is raised"] = 0.05
    target: Annotated[float, Range(ge=0), "share of P in P + N (paper), or P/N (code), that ends the search"] = 0.4
    form: Annotated[Literal["paper", "code"], "which bound is raised first, and what the target is a share of"] = "paper"
    contribution: Annotated[Literal["value", "gradient"], "what a decision counts: its term of the loss, or its gradient"] = "value"
    dual: Annotated[float | None, Range(gt=1), "for negative advantages, largest useful ratio; none: unbounded"] = None
    unit_slope: ClassVar[bool] = True
    equation: ClassVar[str] = (
        "l_t = -min(r_t A_t, clip(r_t, c_low, c_high) A_t), (c_low, c_high) the first on their path with P/(P + N) >= rho_0"
    )
    surveys: ClassVar[tuple[str, ...]] = ("clip_low@minibatch", "clip_high@minibatch")

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse searches that go backwards."""
        for name in ("low", "high"):
            start, most = getattr(self, f"{name}_start"), getattr(self, f"{name}_max")
            if start > most:
                return f"{name}_start = {start:g} exceeds {name}_max = {most:g}"
        return None

    def path(self) -> list[tuple[float, float]]:
        """The bounds that are tried, in order."""
        lows = stairs(self.low_start, self.low_max, self.low_step)
        highs = stairs(self.high_start, self.high_max, self.high_step)
        if self.form == "code":
            return [(low, highs[0]) for low in lows] + [(lows[-1], high) for high in highs[1:]]
        return [(lows[0], high) for high in highs] + [(low, highs[-1]) for low in lows[1:]]

    def contributions(
        self, ratio: Float[Tensor, "B T"], size: Float[Tensor, "B T"], positive: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """(P, N) along the path; size: weights |A_t|, 0 for what does not count."""
        up, down = keep(positive, size), keep(~positive, size)

        def gain(high: float) -> Tensor:
            return (up * (ratio.clamp(max=high) if self.contribution == "value" else ratio * (ratio < high))).sum()

        def loss(low: float) -> Tensor:
            return (down * (ratio.clamp(min=low) if self.contribution == "value" else ratio * (ratio > low))).sum()

        # each sum depends on one of the bounds alone: one pass for each value of either
        lows, highs = zip(*self.path(), strict=True)
        gains, losses = {h: gain(h) for h in dict.fromkeys(highs)}, {x: loss(x) for x in dict.fromkeys(lows)}
        return torch.stack([gains[h] for h in highs]), torch.stack([losses[x] for x in lows])

    def survey(
        self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]
    ) -> dict[str, Tensor]:
        """The bounds of this minibatch, the same for all decisions."""
        assert_decisions(batch, advantage=advantage)
        ratio, a = log_ratio(batch, now).exp(), not_half(advantage)
        size = keep(valid, a.abs())
        if self.form == "paper":
            size = size * keep(valid, not_half(batch.stat("logp@old"))).exp()
        p, n = self.contributions(ratio, size, a > 0)
        # nothing negative, or nothing at all: balanced
        balanced = (n <= 0) | ((p >= self.target * (n + 1e-8)) if self.form == "code" else (p >= self.target * (p + n)))
        index = torch.arange(len(balanced), device=p.device)
        found = torch.where(balanced, index, index[-1]).amin().view(1)
        bounds = torch.tensor(self.path(), dtype=ratio.dtype, device=ratio.device)
        low, high = (b.gather(0, found) for b in bounds.unbind(1))
        return {"clip_low@minibatch": low.expand(ratio.shape), "clip_high@minibatch": high.expand(ratio.shape)}

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        assert_decisions(batch, advantage=advantage)
        ratio = log_ratio(batch, now).exp()
        low, high = batch.stat("clip_low@minibatch"), batch.stat("clip_high@minibatch")
        gain = torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
        if self.dual is not None:
            gain = torch.where(advantage < 0, torch.maximum(gain, self.dual * advantage), gain)
        return -gain

    def cut(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Decisions whose gradient the clip removes."""
        ratio = log_ratio(batch, now).exp()
        out = (advantage > 0) & (ratio > batch.stat("clip_high@minibatch"))
        out = out | ((advantage < 0) & (ratio < batch.stat("clip_low@minibatch")))
        return out if self.dual is None else out | ((advantage < 0) & (ratio > self.dual))


register_preset(
    "surrogate",
    "balanced-clip-code",
    BalancedClip(0.8, 0.95, 0.05, 1.2, 2.0, 0.05, target=0.5, form="code", dual=3.0),
)
