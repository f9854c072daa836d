"""What all surrogates of the probability ratio now / old have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from polopt.part import Can, Part


@dataclass(frozen=True)
class OnRatio(Part):
    """A surrogate that reads the ratio pi(a_t|s_t)/pi_old(a_t|s_t).

    unit_slope: at the old policy its gradient is minus the advantage times that of the log-probability, whatever its settings; what
    says so is held against the exact policy gradient by `polopt certify`.
    """

    unit_slope: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities now and at the start of the update."""
        return frozenset({"logp@now", "logp@old"})

    @property
    def requires(self) -> frozenset[Can]:
        """Log-probabilities of given decisions."""
        return frozenset({Can.SCORE})
