"""What a critic of actions regresses to, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.interfaces import Nets
from polopt.part import Can, Net, Part, Range, register_part
from polopt.parts.transitions import seen, taken

if TYPE_CHECKING:
    from polopt.method import Method, Update


@register_part("critic", "q")
@dataclass(frozen=True)
class QRegression(Part):
    """scale * sum_e (Q_e(s, a) - y)^2 over the members of the net "critic"; y comes from the update's target."""

    members: Annotated[int, Range(ge=1), "critics of the same form"] = 2
    scale: Annotated[float, Range(gt=0), "factor of the squared error"] = 1.0
    hidden: Annotated[tuple[int, ...] | None, "widths of hidden layers; none: those of the policy"] = None
    equation: ClassVar[str] = "l = c sum_e (Q_e(s, a) - y)^2"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics."""
        return frozenset({Can.NETS})

    @property
    def networks(self) -> tuple[Net, ...]:
        """The critics of this form."""
        return (Net("critic", "obs-action", 1, self.members, self.hidden),)

    def validate(self, method: Method, update: Update) -> str | None:
        """A critic of actions needs a target."""
        return None if method.slots(update).target is not None else "needs a target to regress to (target='soft', say)"

    def __call__(self, batch: Batch, nets: Nets, target: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the mean value and the mean absolute TD error."""
        values = nets.values("critic", seen(batch), taken(batch)).squeeze(-1)  # [E,N]
        error = values - target.flatten()
        told = {"q": values.detach().mean(), "td_error": error.detach().abs().mean()}
        return self.scale * error.square().sum(0).view(batch.shape), told
