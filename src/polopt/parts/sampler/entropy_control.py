"""AEPO's sampler: a few right answers drawn hotter or colder than the policy replace as many of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from polopt.batch import OWN, Batch
from polopt.interfaces import Plan, Request, Sampling
from polopt.part import Can, Moment, Part, Range, register_part
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.shapes import keep


@register_part("sampler", "entropy-control")
@dataclass(frozen=True)
class EntropyControl(Part):
    """Steer the entropy H of decisions towards `target` with answers from another temperature (AEPO, arXiv 2510.08141).

    After the usual answers, those to the first quarter of the prompts are sampled again, at `hot` if H <= target and at `cold`
    otherwise. Of them the ones with a group-relative advantage above `threshold` are kept: right answers in groups that also
    hold wrong ones. The first s of these replace the first s usual ones, s = min(samples, kept), half of that when cooling.

    Rows that came in have row["control"] = 1. A usual row that goes out has row["replaced"] = 1 as long as its group is still
    needed for the advantages of the rest (`select` "drop-replaced" takes it out of the loss); groups replaced as a whole are gone.
    row["temperature"] of all is that of the usual ones, so that log-probabilities before and in the update are those of the policy
    itself; what the sampler drew from stays in `logp@behaviour`, and the provenance `HEATED`. H is the mean over the decisions of
    the last update, as its steps see it, and remembered; before the first it is 0. Nothing right: the usual answers alone.
    `samples` = 0 never asks for any.
    """

    group_size: Annotated[int, Range(ge=1), "samples per prompt"] = 8
    target: Annotated[float, Range(ge=0), "wanted mean entropy of decisions, in nats"] = 0.5
    hot: Annotated[float, Range(gt=0), "temperature that raises the entropy"] = 1.2
    cold: Annotated[float, Range(gt=0), "temperature that lowers it"] = 0.8
    samples: Annotated[int, Range(ge=0), "most answers that are replaced"] = 60
    share: Annotated[float, Range(gt=0, le=1), "of the prompts that are asked again"] = 0.25
    threshold: Annotated[float, Range(ge=0), "answers with a larger advantage count as right"] = 0.05
    equation: ClassVar[str] = "B[:s] <- s right answers o ~ pi_old^T,  T = T_hot if H <= H_0 else T_cold,  pi^T ~ pi^(1/T)"
    host: ClassVar[bool] = True
    moments: ClassVar[frozenset[str]] = frozenset({"minibatch", "stepped"})

    @property
    def needs(self) -> frozenset[str]:
        """The entropy in the update."""
        return frozenset({"entropy@now"})

    @property
    def requires(self) -> frozenset[Can]:
        """Several samples from one starting point, and answers to further requests."""
        return frozenset({Can.GROUPS, Can.REFILL})

    def validate(self, method: Any, update: Any) -> str | None:
        """Refuse groups in which no answer can be better than another, and temperatures on the wrong sides."""
        if self.samples and self.group_size < 2:
            return f"needs at least 2 samples per prompt to tell right from wrong, but sampler.group_size = {self.group_size}"
        return f"hot = {self.hot:g} is below cold = {self.cold:g}" if self.hot < self.cold else None

    def initial(self) -> dict[str, Tensor]:
        """The entropy of the last update, and what adds up in the present one."""
        return {name: torch.zeros((), dtype=torch.float64) for name in ("entropy", "sum", "count")}

    def __call__(self, plan: Plan, memory: Mapping[str, Tensor]) -> Sampling:
        """Request the usual answers, then those at the other temperature; put them together."""
        pairs = plan.allot(plan.want, self.group_size)
        batch = yield [Request(item=i, count=n) for i, n in pairs]
        if self.samples == 0:
            return {"policy": batch}
        low = float(memory["entropy"]) <= self.target
        some = pairs[: max(1, int(self.share * len(pairs)))]
        control = yield [Request(item=i, count=n, temperature=self.hot if low else self.cold) for i, n in some]
        right = (_advantage(control) > self.threshold).nonzero().squeeze(1)
        s = min(self.samples, len(right), batch.shape[0])
        s = s if low else s // 2
        return {"policy": mixed(batch, control.rows(right[:s])) if s else batch}

    def observe(self, moment: Moment, *, batch: Any, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add up entropies as steps see them; after the update their mean is what the next decision is taken on."""
        if moment == "minibatch":
            valid = batch.mask & ~is_replaced(batch)
            total = keep(valid, batch.stat("entropy@now")).double().sum().cpu()
            return {"sum": memory["sum"] + total, "count": memory["count"] + valid.sum().double().cpu()}
        if moment == "stepped":
            seen = memory["count"] > 0
            mean = torch.where(seen, memory["sum"] / memory["count"], memory["entropy"])
            zero = torch.zeros_like(mean)
            return {"entropy": mean, "sum": zero, "count": zero}
        return {}


def _advantage(batch: Batch) -> Tensor:
    """The group-relative advantage of each row [B]."""
    return GroupBaseline()(batch).amax(1)  # 0 outside the mask: only its sign above the threshold matters


def is_replaced(batch: Batch) -> Tensor:
    """Rows that left the loss [B,1]; none in a batch of another sampler."""
    column = batch.row.get("replaced")
    if column is None:
        return torch.zeros(batch.shape[0], 1, dtype=torch.bool, device=batch.mask.device)
    return column[:, None] > 0


def mixed(batch: Batch, control: Batch) -> Batch:
    """`control` in the place of as many first rows of `batch`; of these only groups that other rows are compared with stay."""
    s = control.shape[0]
    out = torch.arange(batch.shape[0], device=batch.mask.device) < s
    whole = batch.pool(out.float(), "group", "min") == 1
    rest = batch.rows(~whole)
    flags = out[~whole].float()
    usual = {k: v[:1].expand(s) for k, v in batch.row.items() if k == "temperature"}
    columns = {k: v for k, v in control.row.items() if k != "temperature"}
    one, none = flags.new_ones(s), flags.new_zeros(s)
    control = replace(control, row={**columns, **usual, "control": one, "replaced": none})
    rest = replace(rest, row={**rest.row, "control": torch.zeros_like(flags), "replaced": flags})
    if rest.source is None:  # a batch without the column is the policy's own
        rest = replace(rest, source=torch.full_like(rest.mask, OWN, dtype=torch.long))
    joined = Batch.cat([control, rest])
    assert joined.group is not None
    return joined.with_key("group", joined.group)  # renumber: groups that are gone leave no gaps
