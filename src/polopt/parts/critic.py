"""What the value function is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Can, Part, Range, register_part
from polopt.parts.shapes import assert_decisions

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("critic", "value")
@dataclass(frozen=True)
class ValueLoss(Part):
    """Squared error of the value against the return of the update's advantage part (no factor 1/2, as Stable-Baselines3).

    l_t = coef (V_now - R)^2; clipped, as in PPO's released code:
    l_t = coef max((V_now - R)^2, (V_old + clip(V_now - V_old, +-c) - R)^2). R is the batch's "return@old".
    """

    coef: Annotated[float, Range(ge=0), "weight of the value loss"] = 0.5
    clip: Annotated[float | None, Range(gt=0), "largest useful change of the value in one update; none: no clipping"] = None
    equation: ClassVar[str] = "l_t = c_v (V(s_t) - R_t)^2; with clip c: c_v max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)"

    @property
    def needs(self) -> frozenset[str]:
        """The value now, and at the start of the update if changes are clipped."""
        return frozenset({"value@now"} | ({"value@old"} if self.clip is not None else set()))

    @property
    def requires(self) -> frozenset[Can]:
        """A value function."""
        return frozenset({Can.VALUE})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse an advantage that estimates no return, which would leave nothing to regress to."""
        advantage = method.slots(update).advantage
        if hasattr(advantage, "returns"):
            return None
        name = advantage.name if advantage is not None else "none"
        return (
            f"regresses to a return, but advantage '{name}' estimates none; use an advantage that does (gae, n-step, "
            "returns-to-go) or critic=none"
        )

    def __call__(self, batch: Batch, now: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        value, target = now["value"], batch.stat("return@old")
        assert_decisions(batch, **{"value@now": value, "return@old": target})
        error = (value - target).square()
        if self.clip is not None:
            old = batch.stat("value@old")
            assert_decisions(batch, **{"value@old": old})
            near = old + (value - old).clamp(-self.clip, self.clip)
            error = torch.maximum(error, (near - target).square())
        return self.coef * error
