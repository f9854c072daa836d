"""The entropy bonus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Part, Range, register_part
from polopt.parts.shapes import assert_decisions


@register_part("penalty", "entropy")
@dataclass(frozen=True)
class EntropyBonus(Part):
    """l_t = -coef H(pi(.|s_t)): rewards a spread-out policy (Williams and Peng 1991; A3C, arXiv 1602.01783)."""

    coef: Annotated[float, Range(ge=0), "weight of the bonus"] = 0.01
    equation: ClassVar[str] = "l_t = -c H(pi(.|s_t))"

    @property
    def needs(self) -> frozenset[str]:
        """The entropy now."""
        return frozenset({"entropy@now"})

    def __call__(self, batch: Batch, now: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        """The penalty of each decision."""
        assert_decisions(batch, **{"entropy@now": now["entropy"]})
        return -self.coef * now["entropy"]
