"""Surrogates without a trust region: the score function and the plain importance ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Can, Part, register_part
from polopt.parts.shapes import assert_decisions, log_ratio
from polopt.parts.surrogate.on_ratio import OnRatio


@register_part("surrogate", "score")
@dataclass(frozen=True)
class ScoreFunction(Part):
    """The score-function estimator (REINFORCE, Williams 1992): l_t = -A_t log pi(a_t|s_t).

    Its gradient is the policy gradient at the parameters that drew the decisions; further epochs are not corrected for.
    """

    unit_slope: ClassVar[bool] = True
    equation: ClassVar[str] = "l_t = -A_t log pi(a_t|s_t)"

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities now."""
        return frozenset({"logp@now"})

    @property
    def requires(self) -> frozenset[Can]:
        """Log-probabilities of given decisions."""
        return frozenset({Can.SCORE})

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        assert_decisions(batch, advantage=advantage, **{"logp@now": now["logp"]})
        return -advantage * now["logp"]


@register_part("surrogate", "ratio")
@dataclass(frozen=True)
class Ratio(OnRatio):
    """The importance-weighted surrogate without a clip (TRPO eq. 14, arXiv 1502.05477): l_t = -r_t A_t, r = pi/pi_old.

    Its value bounds nothing by itself; a rule (natural gradient) or a penalty keeps the policy close.
    """

    unit_slope: ClassVar[bool] = True
    equation: ClassVar[str] = "l_t = -r_t A_t,  r_t = pi(a_t|s_t)/pi_old(a_t|s_t)"

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        assert_decisions(batch, advantage=advantage)
        return -log_ratio(batch, now).exp() * advantage
