"""Nothing is sampled: a dataset is all there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from polopt.interfaces import Plan, Request, Sampling
from polopt.part import Part, register_part


@register_part("sampler", "nothing")
@dataclass(frozen=True)
class Nothing(Part):
    """Asks for nothing: offline methods learn from what a source holds."""

    equation: ClassVar[str] = "no samples"
    host: ClassVar[bool] = True

    def __call__(self, plan: Plan) -> Sampling:
        """End at once."""
        none: Sequence[Request] = ()
        if none:
            yield none
        return {}
