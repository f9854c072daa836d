"""One sample more of each prompt than is trained on, so that the one in the middle can be the baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from polopt.interfaces import Plan, Request, Sampling
from polopt.part import Can, Part, Range, register_part
from polopt.parts.advantage.median import is_middle

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("sampler", "spare")
@dataclass(frozen=True)
class Spare(Part):
    """`group_size` + 1 samples of each prompt; row["middle"] = 1 marks the one whose outcome is the median (arXiv 2601.22582).

    An even `group_size` makes the number odd, so that there is a middle one. `select`
    "drop-middle" takes the marked row out of the loss, which then is of `group_size` rows per prompt.
    """

    group_size: Annotated[int, Range(ge=2), "samples per prompt that are trained on; one more is drawn"] = 8
    equation: ClassVar[str] = "o_1..o_{G+1} ~ pi_old(.|q),  middle = argmedian_i R_i"
    host: ClassVar[bool] = True

    @property
    def requires(self) -> frozenset[Can]:
        """Several samples from one starting point, each a whole episode."""
        return frozenset({Can.GROUPS, Can.EPISODES})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse rewards that are changed after the samples were scored: another row may then be in the middle."""
        return f"marks the middle of rewards as scored, which reward '{method.reward[0].name}' changes" if method.reward else None

    def __call__(self, plan: Plan) -> Sampling:
        """Request once, mark, return the batch."""
        batch = yield [Request(item=i, count=n) for i, n in plan.allot(plan.want, self.group_size + 1)]
        return {"policy": replace(batch, row={**batch.row, "middle": is_middle(batch).float()})}


__all__ = ["Spare"]
