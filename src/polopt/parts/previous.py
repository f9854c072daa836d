"""A source that keeps the batch of the iteration before, and tells how the policy did since."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from polopt.batch import REPLAYED, Batch
from polopt.part import Moment, Part, Range, register_part
from polopt.parts.source import critics_without_replay

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update

#: Deviations below this are none: equal means that were rounded.
NONE = 1e-8


@register_part("source", "previous")
@dataclass(frozen=True)
class Previous(Part):
    """What was sampled, and as `previous` the batch before it with the verdict `row["improvement"]` [B] on what followed (PIPO).

    xi_t = (mu_t - mean(mu_{t-K} .. mu_{t-1})) / s, mu the mean outcome of a batch, before any shaping, and s the deviation of
    the window (arXiv 2604.00860). form: the sample deviation, xi = 0 where it is 0 ("paper"; the latter is a reading); the
    population's, 1 where it is 0, differences within +-5 ("code"). A window of one divides by 1. There is no `previous` before
    K means are known, nor where xi = 0: then nothing is learned from it. Its ratio's denominator is the policy that wrote it:
    the sampler's own log-probabilities become `logp@old`, or those that the loop evaluates before the batch is kept where the
    sampler drew from another distribution (truncated, decoded, hotter). Its decisions have the provenance `REPLAYED`.
    """

    window: Annotated[int, Range(ge=1), "K, iterations that the mean outcome is compared with"] = 8
    form: Annotated[Literal["paper", "code"], "which deviation, and what where it is 0"] = "paper"
    equation: ClassVar[str] = "xi_t = (mu_t - mean(mu_{t-K} .. mu_{t-1})) / std(mu_{t-K} .. mu_{t-1})"
    host: ClassVar[bool] = True
    moments: ClassVar[frozenset[Moment]] = frozenset({"drawn"})

    @property
    def needs(self) -> frozenset[str]:
        """The sampler's log-probabilities."""
        return frozenset({"logp@behaviour"})

    def initial(self) -> dict[str, Tensor]:
        """Mean outcomes of the last iterations, the newest last."""
        return {"means": torch.empty(0, dtype=torch.float64)}

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse a method that learns from kept transitions."""
        return critics_without_replay(method)

    def __call__(
        self, batches: dict[str, Batch], store: MutableMapping[str, Batch], memory: Mapping[str, Tensor]
    ) -> dict[str, Batch]:
        """The sampled batches and, where there is a verdict, the one that was kept; keeps the new one."""
        fresh = batches["policy"]
        some = fresh.mask.any(1)
        if not bool(some.any()):
            return batches
        mean = fresh.outcome()[some].double().mean().cpu()
        out = {**batches, "policy": replace(fresh, row={**fresh.row, "mean": mean.to(fresh.mask.device).expand(len(some))})}
        verdict = self.verdict(memory["means"], float(mean))
        if verdict and "previous" in store:
            kept = store["previous"]
            column = torch.full((kept.shape[0],), verdict, dtype=torch.float64, device=kept.mask.device)
            out["previous"] = replace(kept, row={**kept.row, "improvement": column})
        store["previous"] = _kept(fresh)
        return out

    def verdict(self, means: Tensor, mean: float) -> float | None:
        """xi of a mean outcome after these; None before the window is full."""
        if len(means) < self.window:
            return None
        gap = mean - float(means.mean())
        deviation = 1.0 if self.window == 1 else float(means.std(correction=self.form == "paper"))
        if self.form == "code":
            return max(-5.0, min(5.0, gap)) / (deviation if deviation >= NONE else 1.0)
        return gap / deviation if deviation > NONE * max(1.0, abs(mean)) else 0.0

    def observe(self, moment: Moment, *, batch: Any, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Note the mean outcome of what was sampled."""
        mean = batch.row.get("mean")
        if mean is None:  # the batch that was kept, or another of the sampler's
            return {}
        return {"means": torch.cat([memory["means"], mean[:1].cpu()])[-self.window :]}


def _kept(batch: Batch) -> Batch:
    """A batch for later, with the log-probabilities of the policy that wrote it, by which its ratio divides."""
    mine = torch.full_like(batch.mask, REPLAYED, dtype=torch.long)
    source = mine if batch.source is None else torch.where(batch.mask, mine, batch.source)
    old = batch.stats.get("logp@old")  # known where the sampler's numbers are not the policy's
    return replace(batch.adding({"logp@old": batch.stat("logp@behaviour") if old is None else old}), source=source)


__all__ = ["Previous"]
