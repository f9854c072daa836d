"""Surrogates of policies without a likelihood: the ratio is made from flow-matching losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.part import Can, Part, Range, register_part
from polopt.parts.shapes import MAX_LOG_RATIO, assert_decisions
from polopt.parts.surrogate.clip import clipped, outside
from polopt.pooling import not_half


@register_part("surrogate", "flow-clip")
@dataclass(frozen=True)
class FlowClip(Part):
    """FPO's clipped surrogate (arXiv 2507.21053): PPO's, with the drop of the flow-matching loss in place of the log-ratio.

    d_i = clip(l_old,i - l_i, -bound, bound) for each stored pair i of noise and time; average "losses": r = exp(mean_i d_i),
    l_t = -min(r A, clip(r, 1-low, 1+high) A); "surrogates": r_i = exp(d_i), and the mean of these losses over i. Both are in the
    released code: its locomotion part bounds d_i only with "surrogates", its grid world also before the mean. `inf` for
    `bound` means +-20. The policy records `samples` pairs with each decision, with `times` and losses of this `form` (see `Pairs`).
    """

    low: Annotated[float, Range(ge=0), "ratios below 1 - low are clipped"] = 0.05
    high: Annotated[float, Range(ge=0), "ratios above 1 + high are clipped"] = 0.05
    average: Annotated[Literal["losses", "surrogates"], "over pairs: losses before exp, or one surrogate for each"] = "losses"
    bound: Annotated[float, Range(gt=0), "largest difference of a pair's losses"] = 3.0
    samples: Annotated[int, Range(ge=1), "pairs of noise and time for each decision"] = 8
    times: Annotated[Literal["grid", "uniform"], "those of the sampler, or uniform on [0, 1)"] = "grid"
    form: Annotated[Literal["noise", "velocity"], "whose error a loss is; noise weighs velocity by (1 - t)^2"] = "noise"
    equation: ClassVar[str] = "r_t = exp(mean_i (l_old,i - l_i));  l_t = -min(r_t A_t, clip(r_t, 1-low, 1+high) A_t)"

    @property
    def needs(self) -> frozenset[str]:
        """Flow-matching losses now and at the start of the update."""
        return frozenset({"cfm@now", "cfm@old"})

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that has such losses."""
        return frozenset({Can.FLOW})

    @property
    def records(self) -> Mapping[str, Mapping[str, Any]]:
        """Pairs, stored with every decision."""
        return {"cfm": {"samples": self.samples, "times": self.times, "form": self.form}}

    def __call__(
        self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the mean flow-matching loss."""
        assert_decisions(batch, advantage=advantage)
        gain = clipped(self.ratio(batch, now), advantage[..., None], self.low, self.high).mean(-1)
        return -gain, {"cfm": now["cfm"].detach().float().mean()}

    def ratio(self, batch: Batch, now: Mapping[str, Tensor]) -> Float[Tensor, "B T N"]:
        """r of each decision [B,T,1], or of each of its pairs; 1 outside the mask. Losses [B,T] count as those of one pair."""
        old, new = not_half(batch.stat("cfm@old")), not_half(now["cfm"])
        if old.shape != new.shape or old.shape[:2] != batch.mask.shape:
            raise CallError(f"'cfm@now' has shape {tuple(new.shape)}, 'cfm@old' {tuple(old.shape)}, expected (B, T, pairs)")
        drop = (old - new).reshape(*batch.mask.shape, -1).masked_fill(~batch.mask[..., None], 0)
        drop = drop.clamp(-min(self.bound, MAX_LOG_RATIO), min(self.bound, MAX_LOG_RATIO))
        return (drop.mean(-1, keepdim=True) if self.average == "losses" else drop).exp()

    def cut(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Decisions whose gradient the clip removes altogether."""
        return outside(self.ratio(batch, now), advantage[..., None], self.low, self.high).all(-1)


__all__ = ["FlowClip"]
