"""Targets of critics under entropy regularisation (SAC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.draws import Draws
from polopt.interfaces import Nets
from polopt.part import Can, Part, Range, register_part
from polopt.parts.multiplier import lacks_temperature, temperature
from polopt.parts.transitions import Pool, discount, following, pooled, rewards

if TYPE_CHECKING:
    from polopt.method import Method, Update


@register_part("target", "soft")
@dataclass(frozen=True)
class SoftTarget(Part):
    """y = r + gamma (1 - d) [min_i Q'_i(s', a') - alpha log pi(a'|s')], a' drawn from the present policy (arXiv 1812.05905, eq. 5)."""

    gamma: Annotated[float, Range(ge=0, le=1), "discount"] = 0.99
    alpha: Annotated[float | None, Range(ge=0), "temperature; none: the dual variable that an update trains"] = None
    pool: Annotated[Pool, "how the members' values become one"] = "min"
    equation: ClassVar[str] = "y = r + γ (1 - d) [min_i Q'_i(s', a') - α log π(a'|s')], a' ~ π(.|s')"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics, and continuous draws."""
        return frozenset({Can.NETS, Can.REPARAM})

    @property
    def copies(self) -> frozenset[str]:
        """Of the critic."""
        return frozenset({"critic"})

    def validate(self, method: Method, update: Update) -> str | None:
        """A temperature is fixed here or trained by some update."""
        return lacks_temperature(self.alpha, method)

    def __call__(self, batch: Batch, nets: Nets, rng: Draws) -> Float[Tensor, "B T"]:
        """The target of each decision."""
        after = following(batch)
        action, logp = nets.draw(after, rng)
        value = pooled(nets.values("critic", after, action, slow=True), self.pool) - temperature(self.alpha, nets) * logp
        return (rewards(batch) + discount(batch, self.gamma) * value).view(batch.shape)
