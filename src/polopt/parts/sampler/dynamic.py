"""DAPO's dynamic sampling: prompts whose answers are all right or all wrong are replaced by fresh ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from polopt.batch import Batch
from polopt.interfaces import Plan, Request, Sampling
from polopt.part import Can, Part, Range, register_part

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("sampler", "dynamic")
@dataclass(frozen=True)
class DynamicSampling(Part):
    """Keep groups whose outcomes differ, refill until `want` of them are kept (DAPO, arXiv 2503.14476, eq. 11).

    Outcomes are the task's rewards before any shaping. After `max_rounds` the groups kept so far are used; if there are none,
    the last round as it is (its advantages are 0, so nothing is learned from it).
    """

    group_size: Annotated[int, Range(ge=1), "samples per prompt"] = 8
    max_rounds: Annotated[int, Range(ge=1), "rounds of sampling per iteration"] = 10
    channel: Annotated[int | None, Range(ge=0), "reward channel that is compared; none: the sum of all"] = None
    equation: ClassVar[str] = "keep q with min_i R_i < max_i R_i, sample until the batch is full"
    host: ClassVar[bool] = True

    @property
    def requires(self) -> frozenset[Can]:
        """Several samples from one starting point, and answers to further requests."""
        return frozenset({Can.GROUPS, Can.REFILL})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse groups in which outcomes can never differ."""
        if self.group_size < 2:
            return f"needs at least 2 samples per prompt, but sampler.group_size = {self.group_size}: no group could ever be kept"
        return None

    def __call__(self, plan: Plan) -> Sampling:
        """Request, keep, request what is missing."""
        kept: list[Batch] = []
        missing = plan.want
        for _ in range(self.max_rounds):
            batch = yield [Request(item=i, count=n) for i, n in plan.allot(missing, self.group_size)]
            found, rows = self._keep(batch)
            if found:
                kept.append(batch.rows(rows))
            missing -= found
            if missing <= 0:
                break
        if not kept:
            return {"policy": batch}
        whole = Batch.cat(kept)
        assert whole.group is not None
        return {"policy": whole.with_key("group", whole.group)}  # renumber: the dropped groups leave no gaps

    def _keep(self, batch: Batch) -> tuple[int, Tensor]:
        """How many groups are kept, and the indices of their rows."""
        differs = self._differs(batch)
        assert batch.group is not None
        return int(torch.unique(batch.group[differs]).numel()), differs.nonzero().squeeze(1)

    def _differs(self, batch: Batch) -> Bool[Tensor, " B"]:
        outcome = batch.outcome()
        if self.channel is not None and batch.reward is not None:
            picked = batch.reward[..., self.channel]
            outcome = torch.where(batch.mask, picked, torch.zeros_like(picked)).sum(1)
        return batch.pool(outcome, "group", "max") > batch.pool(outcome, "group", "min")
