"""Penalties that keep the policy close to a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Can, Part, Range, register_part
from polopt.parts.shapes import log_ratio


@register_part("penalty", "kl-ref")
@dataclass(frozen=True)
class KLToReference(Part):
    """coef times an estimate of KL(pi || pi_ref) at the taken decisions, with d = log pi_ref - log pi (Schulman 2020).

    k1 = -d (unbiased, high variance, gradient of mean zero on-policy);  k2 = d^2/2;  k3 = e^d - d - 1 (unbiased, >= 0; GRPO, arXiv
    2402.03300 eq. 4). |d| is clamped to 20.
    """

    coef: Annotated[float, Range(ge=0), "weight of the penalty"] = 0.04
    estimator: Annotated[Literal["k1", "k2", "k3"], "how the divergence is estimated from one sample"] = "k3"
    equation: ClassVar[str] = "l_t = beta (e^d - d - 1),  d = log pi_ref(a_t|s_t) - log pi(a_t|s_t)   [k3; k1: -d, k2: d^2/2]"

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities now and of the reference."""
        return frozenset({"logp@now", "logp@ref"})

    @property
    def requires(self) -> frozenset[Can]:
        """A frozen reference."""
        return frozenset({Can.SCORE, Can.REFERENCE})

    def __call__(self, batch: Batch, now: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        """The penalty of each decision."""
        d = -log_ratio(batch, now, "ref")
        if self.estimator == "k1":
            return -self.coef * d
        if self.estimator == "k2":
            return 0.5 * self.coef * d.square()
        return self.coef * (d.exp() - d - 1)
