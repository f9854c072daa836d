"""Advantages from a value function: generalised advantage estimation and n-step returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.columns import last_valid
from polopt.part import Can, Part, Range, register_part
from polopt.parts.advantage.scan import chain, discounted_sum, ends, standardised
from polopt.parts.shapes import assert_decisions, keep

VALUES = frozenset({"value@old", "value_next@old"})


@register_part("advantage", "gae")
@dataclass(frozen=True)
class GAE(Part):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V(s_{t+1}) (1 - terminated_t) - V(s_t);  A_t = delta_t + gamma lam (1 - end_t) A_{t+1},
    where end is termination or truncation; a truncation bootstraps from the value of the true last observation. Decisions that
    the policy did not make (mask false) are passed over: no reward of theirs counts and they do not discount.
    `standardise`: subtract the mean over the batch's valid decisions and divide by their standard deviation (+ 1e-8).
    """

    gamma: Annotated[float, Range(ge=0, le=1), "discount per decision"] = 0.99
    lam: Annotated[float, Range(ge=0, le=1), "0: one-step (low variance), 1: Monte Carlo minus value (no bias)"] = 0.95
    standardise: Annotated[bool, "zero mean and unit deviation over the batch"] = False
    equation: ClassVar[str] = "A_t = sum_l (gamma lam)^l delta_{t+l},  delta_t = r_t + gamma V(s_{t+1})(1 - terminated_t) - V(s_t)"

    @property
    def needs(self) -> frozenset[str]:
        """Values at the start of the update, of this and of the next state."""
        return VALUES

    @property
    def requires(self) -> frozenset[Can]:
        """A value function."""
        return frozenset({Can.VALUE})

    def estimate(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantages before standardisation, 0 outside the mask."""
        value, after = batch.stat("value@old").detach(), batch.stat("value_next@old").detach()
        assert_decisions(batch, **{"value@old": value, "value_next@old": after})
        terminated, end = ends(batch)
        delta = batch.scalar_reward() + self.gamma * after.masked_fill(terminated, 0.0) - value
        delta = keep(batch.mask, delta)
        return keep(batch.mask, discounted_sum(delta, chain(batch, self.gamma * self.lam, end, delta)))

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantages of the batch."""
        advantage = self.estimate(batch)
        return standardised(advantage, batch) if self.standardise else advantage

    def returns(self, batch: Batch) -> Float[Tensor, "B T"]:
        """TD(lam) returns A_t + V(s_t), never standardised: what the critic regresses to."""
        return keep(batch.mask, self.estimate(batch) + batch.stat("value@old").detach())


@register_part("advantage", "n-step")
@dataclass(frozen=True)
class NStep(Part):
    """n-step returns minus the value (A3C, Mnih et al. 2016, arXiv 1602.01783, alg. S3).

    R_t = r_t + gamma R_{t+1}, started at the end of the row, or at a truncation, from the value of the state reached there, and
    from 0 at a termination; A_t = R_t - V(s_t). The first decision of a row of n gets an n-step return, the last a one-step return.
    """

    gamma: Annotated[float, Range(ge=0, le=1), "discount per decision"] = 0.99
    standardise: Annotated[bool, "zero mean and unit deviation over the batch"] = False
    equation: ClassVar[str] = "A_t = sum_{k<n} gamma^k r_{t+k} + gamma^n V(s_{t+n}) - V(s_t)"

    @property
    def needs(self) -> frozenset[str]:
        """Values at the start of the update, of this and of the next state."""
        return VALUES

    @property
    def requires(self) -> frozenset[Can]:
        """A value function."""
        return frozenset({Can.VALUE})

    def returns(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Bootstrapped n-step returns: what the critic regresses to."""
        value, after = batch.stat("value@old"), batch.stat("value_next@old").detach()
        assert_decisions(batch, **{"value@old": value, "value_next@old": after})
        terminated, end = ends(batch)
        end = end | last_valid(batch.mask)
        bootstrap = keep(end & ~terminated, after)
        gain = keep(batch.mask, batch.scalar_reward() + self.gamma * bootstrap)
        return keep(batch.mask, discounted_sum(gain, chain(batch, self.gamma, end, gain)))

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantages of the batch."""
        advantage = keep(batch.mask, self.returns(batch) - batch.stat("value@old").detach())
        return standardised(advantage, batch) if self.standardise else advantage
