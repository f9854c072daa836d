"""Monte Carlo returns of whole episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Can, Part, Range, register_part, register_preset
from polopt.parts.advantage.scan import chain, discounted_sum, ends, standardised
from polopt.parts.shapes import assert_decisions, keep


@register_part("advantage", "returns-to-go")
@dataclass(frozen=True)
class MonteCarlo(Part):
    """The return of a whole episode, from each decision on or in all (Williams 1992; Sutton et al. 2000).

    A_t = sum_{k >= t} gamma^{k-t} r_k - b, with b = 0 or V(s_t). Nothing is bootstrapped: an episode cut by a time limit
    counts with the rewards it got. `credit` "whole" gives every decision the return of the first one.
    """

    gamma: Annotated[float, Range(ge=0, le=1), "discount per decision"] = 1.0
    baseline: Annotated[Literal["none", "value"], "what is subtracted"] = "none"
    credit: Annotated[Literal["to-go", "whole"], "a decision answers for what follows it, or for the whole episode"] = "to-go"
    standardise: Annotated[bool, "zero mean and unit deviation over the batch"] = False
    equation: ClassVar[str] = "A_t = sum_{k>=t} gamma^(k-t) r_k - b(s_t)"

    @property
    def needs(self) -> frozenset[str]:
        """The value at the start of the update, if it is the baseline."""
        return frozenset({"value@old"} if self.baseline == "value" else ())

    @property
    def requires(self) -> frozenset[Can]:
        """Whole episodes, and a value function if it is the baseline."""
        return frozenset({Can.EPISODES} | ({Can.VALUE} if self.baseline == "value" else set()))

    def returns(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Returns without baseline: what the critic regresses to."""
        reward = keep(batch.mask, batch.scalar_reward())
        found = discounted_sum(reward, chain(batch, self.gamma, ends(batch)[1], reward))
        return keep(batch.mask, found[:, :1].expand_as(found) if self.credit == "whole" else found)

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantages of the batch."""
        advantage = self.returns(batch)
        if self.baseline == "value":
            value = batch.stat("value@old").detach()
            assert_decisions(batch, **{"value@old": value})
            advantage = keep(batch.mask, advantage - value)
        return standardised(advantage, batch) if self.standardise else advantage


register_preset("advantage", "return", MonteCarlo(credit="whole"))
