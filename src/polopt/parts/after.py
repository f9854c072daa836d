"""What follows a step of an update: how slow copies of networks move."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor

from polopt.part import Part, Range, register_part

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("after", "polyak")
@dataclass(frozen=True)
class Polyak(Part):
    """Slow copies move a little towards their nets after each step: x' <- (1 - tau) x' + tau x."""

    of: Annotated[tuple[str, ...], "nets whose slow copies move; empty: all that parts read"] = ()
    tau: Annotated[float, Range(gt=0, le=1), "share of the way; 1 copies"] = 0.005
    equation: ClassVar[str] = "θ' <- (1 - τ) θ' + τ θ"

    def validate(self, method: Method, update: Update) -> str | None:
        """Only nets of which some part reads a slow copy have one; "all" is refused where another update moves some of them."""
        copies = method.copies()
        if not copies:
            return "moves slow copies, and no part reads any"
        if lacking := [n for n in self.of if n not in copies]:
            return f"moves the slow copy of '{lacking[0]}', which no part reads"
        others = {n: u.name for u in method.updates if u.name != update.name for n in u.moves(copies)}
        if self.of or not others:
            return None
        name, other = next(iter(others.items()))
        return (
            f"moves all slow copies, and update '{other}' moves that of '{name}' as well: "
            f"say in updates.{update.name}.after.{self.name}.of which it moves, or set updates.{other}.after none"
        )

    def moves(self, copies: Collection[str]) -> tuple[str, ...]:
        """Those of the slow copies `copies` that move."""
        return self.of or tuple(sorted(copies))

    def due(self, step: int) -> bool:
        """Whether the copies move after the update's `step`-th step (from 1)."""
        return True

    def move(self, slow: Tensor, now: Tensor) -> Tensor:
        """The slow tensor after a step."""
        return slow.lerp(now, self.tau)

    @torch.no_grad()
    def step(self, slow: list[Tensor], now: list[Tensor]) -> None:
        """Move all tensors of a net in place."""
        torch._foreach_lerp_(slow, now, self.tau)


@register_part("after", "copy")
@dataclass(frozen=True)
class HardCopy(Polyak):
    """Slow copies become their nets after every n-th step."""

    tau: Annotated[float, Range(gt=0, le=1), "share of the way; 1 copies"] = 1.0
    every: Annotated[int, Range(ge=1), "steps of the update between two copies"] = 1000
    equation: ClassVar[str] = "θ' <- θ every n steps"

    def due(self, step: int) -> bool:
        """Every n-th step."""
        return step % self.every == 0
