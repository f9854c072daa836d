"""A staged sampler: prompts that no answer solves are asked again with more and more of the solution in front of the answer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.interfaces import Plan, Request, Sampling, Seen
from polopt.part import Can, Part, Range, register_part
from polopt.tasks.text_protocol import Prompt, with_text

#: What stands between the question and the piece of the solution.
CONNECTOR = "\nA correct solution begins as follows; continue from there:\n"


@register_part("sampler", "hints")
@dataclass(frozen=True)
class Hints(Part):
    """Fresh groups; those without a success are replaced by answers to the prompt with a piece of its solution (GHPO).

    q* = q + connector + h[: round(omega L)] of the reference solution h of L characters, omega = 1/4, 1/2, 3/4 in turn, until
    an answer succeeds (arXiv 2507.10628, sec. 3; its code). Prompt, answers and rewards of the group are replaced together, and
    the last attempt is kept even if it fails. The hint belongs to the prompt: log-probabilities of now, of the old and of the
    reference policy are all those under q*, and no loss falls on it. Prompts without a solution are not asked again; a hint that
    would not fit into the model's context is shortened from its end, the question is not. `row["hint"]` [B] is the share
    revealed; decisions of such rows have the provenance `HINTED`.
    """

    group_size: Annotated[int, Range(ge=1), "samples per prompt, and per attempt"] = 8
    stages: Annotated[tuple[float, ...], "shares of the solution that are revealed, attempt by attempt"] = (0.25, 0.5, 0.75)
    connector: Annotated[str, "text between the question and the piece of the solution"] = CONNECTOR
    channel: Annotated[int | None, Range(ge=0), "reward channel of success (format does not count); none: the sum of all"] = 0
    threshold: Annotated[float, Range(), "an answer succeeds above this reward"] = 0.0
    start: Annotated[int, Range(ge=0), "iterations without any hint at the start"] = 0
    fixed: Annotated[int, Range(ge=0), "first iterations in which every prompt has a hint, to teach the format"] = 0
    fixed_share: Annotated[float, Range(ge=0, le=1), "share of the solution in those"] = 0.5
    equation: ClassVar[str] = "q* = q if sum_i acc_i > 0 else q + h[: omega L],  omega = 1/4, 1/2, 3/4"
    host: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 <= x <= 1 for x in self.stages):
            raise CallError(f"sampler.stages = {self.stages!r}: shares of the solution must be between 0 and 1")

    @property
    def requires(self) -> frozenset[Can]:
        """Groups, answers to further requests, and reference solutions."""
        return frozenset({Can.GROUPS, Can.REFILL, Can.SOLUTIONS})

    def __call__(self, plan: Plan) -> Sampling:
        """Ask, and ask the failed ones again with a hint, as often as there are stages."""
        asked = plan.allot(plan.want, self.group_size)
        update = int(plan.clock.update)
        first = [self._hinted(plan, i, self.fixed_share if update < self.fixed else 0.0) for i, _ in asked]
        batch = yield [Request(item=i, count=n, context=c) for (i, n), c in zip(asked, first, strict=True)]
        batch = _marked(batch, [0.0 if c is None else self.fixed_share for c in first])
        if update < max(self.start, self.fixed):
            return {"policy": batch}
        for share in self.stages:
            assert batch.group is not None
            failed = torch.unique(batch.group[~self._solved(batch)]).tolist()
            found = {g: c for g in failed if (c := self._hinted(plan, asked[g][0], share)) is not None}
            if not found:
                continue
            again = [asked[g] for g in found]
            retry = yield [Request(item=i, count=n, context=c) for (i, n), c in zip(again, found.values(), strict=True)]
            batch = _replaced(batch, list(found), _marked(retry, [share] * len(again)))
            asked = [a for g, a in enumerate(asked) if g not in found] + again
        return {"policy": batch}

    def _solved(self, batch: Batch) -> Bool[Tensor, " B"]:
        """Rows of groups in which an answer succeeded."""
        assert batch.reward is not None
        reward = batch.scalar_reward() if self.channel is None else batch.reward[..., self.channel]
        outcome = torch.where(batch.mask, reward, torch.zeros_like(reward)).sum(1)
        return batch.pool((outcome > self.threshold).to(outcome.dtype), "group", "max") > 0

    def _hinted(self, plan: Plan, item: int | None, share: float) -> Prompt | None:
        """The prompt with a piece of its solution; None where there is none to reveal."""
        assert plan.look is not None  # tasks with solutions
        assert item is not None
        if share == 0:
            return None
        seen = plan.look(item)
        piece = (seen.solution or "")[: round(share * len(seen.solution or ""))]
        return self._fitting(seen, piece) if piece else None

    def _fitting(self, seen: Seen, piece: str) -> Prompt | None:
        """The prompt with as much of `piece` as the model's context has room for."""
        whole = with_text(seen.prompt, self.connector + piece)
        if seen.fits(whole):
            return whole
        low, high = 0, len(piece)  # `low` characters fit (or none at all), `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if seen.fits(with_text(seen.prompt, self.connector + piece[:middle])) else (low, middle)
        warnings.warn(f"a hint of {len(piece)} characters is cut to {low}: more do not fit into the model's context", stacklevel=2)
        return with_text(seen.prompt, self.connector + piece[:low]) if low else None


def _marked(batch: Batch, shares: list[float]) -> Batch:
    """The batch with the share of the solution that each group was shown."""
    assert batch.group is not None
    return replace(batch, row={**batch.row, "hint": torch.tensor(shares, device=batch.mask.device)[batch.group]})


def _replaced(batch: Batch, groups: list[int], by: Batch) -> Batch:
    """The batch without these groups, and with those of `by` behind the others."""
    assert batch.group is not None
    kept = ~torch.isin(batch.group, torch.tensor(groups, device=batch.group.device))
    rest = batch.rows(kept)
    assert rest.group is not None
    return Batch.cat([rest.with_key("group", rest.group), by]) if bool(kept.any()) else by


__all__ = ["CONNECTOR", "Hints"]
