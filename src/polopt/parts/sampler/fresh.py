"""Fresh samples of the present policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from polopt.interfaces import Plan, Request, Sampling
from polopt.part import Can, Part, Range, register_part


@register_part("sampler", "fresh")
@dataclass(frozen=True)
class Fresh(Part):
    """One round: the next `want` items of the stream, `group_size` samples of each (an allocator may choose others)."""

    group_size: Annotated[int, Range(ge=1), "samples per starting point (prompt, start seed)"] = 1
    equation: ClassVar[str] = "o_1..o_G ~ pi_old(.|q),  q ~ D"
    host: ClassVar[bool] = True

    @property
    def requires(self) -> frozenset[Can]:
        """Several samples from one starting point, if the group is larger than one."""
        return frozenset({Can.GROUPS} if self.group_size > 1 else ())

    def __call__(self, plan: Plan) -> Sampling:
        """Request once, return the batch."""
        batch = yield [Request(item=i, count=n) for i, n in plan.allot(plan.want, self.group_size)]
        return {"policy": batch}
