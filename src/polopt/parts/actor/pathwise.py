"""Actors that follow the gradient of a critic with respect to the action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.draws import Draws
from polopt.interfaces import Nets
from polopt.part import Can, Part, Range, register_part
from polopt.parts.multiplier import DRAWN, lacks_temperature, temperature
from polopt.parts.transitions import Pool, expected, of_actions, seen, valued

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("actor", "deterministic-gradient")
@dataclass(frozen=True)
class DeterministicGradient(Part):
    """l = -Q(s, mu(s)): the deterministic policy gradient (Silver et al. 2014; DDPG, arXiv 1509.02971, eq. 6)."""

    pool: Annotated[Pool, "how the members' values become one"] = "first"
    distribution: ClassVar[str] = "deterministic"
    equation: ClassVar[str] = "l = -Q(s, μ(s))"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics, and continuous actions."""
        return frozenset({Can.NETS, Can.REPARAM})

    def __call__(self, batch: Batch, nets: Nets) -> Float[Tensor, "B T"]:
        """The loss of each decision."""
        obs = seen(batch)
        return -valued(nets, "critic", obs, nets.mode(obs), pool=self.pool).view(batch.shape)


@register_part("actor", "soft-gradient")
@dataclass(frozen=True)
class SoftGradient(Part):
    """l = alpha log pi(a|s) - min_i Q_i(s, a) at a reparametrised draw a (SAC, arXiv 1812.05905, eq. 7).

    It is minimised by pi proportional to exp(Q / alpha). Its draws' log-probabilities serve the temperature of the same round.
    """

    alpha: Annotated[float | None, Range(ge=0), "temperature; none: the dual variable that an update trains"] = None
    pool: Annotated[Pool, "how the members' values become one"] = "min"
    distribution: ClassVar[str] = "squashed-normal"
    equation: ClassVar[str] = "l = α log π(a|s) - min_i Q_i(s, a), a = f(ξ; s)"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics, and continuous actions."""
        return frozenset({Can.NETS, Can.REPARAM})

    def validate(self, method: Method, update: Update) -> str | None:
        """A temperature is fixed here or trained by some update."""
        return lacks_temperature(self.alpha, method)

    def __call__(self, batch: Batch, nets: Nets, rng: Draws) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; hands on the log-probabilities of its draws."""
        obs = seen(batch)
        action, logp = nets.draw(obs, rng)
        value = valued(nets, "critic", obs, action, pool=self.pool)
        loss = temperature(self.alpha, nets) * logp - value
        return loss.view(batch.shape), {DRAWN: logp.detach().view(batch.shape)}


@register_part("actor", "soft-enumerated")
@dataclass(frozen=True)
class SoftActions(SoftGradient):
    """l = pi(s)^T [alpha log pi(s) - min_i Q_i(s)], Q without gradient (SAC for discrete actions, arXiv 1910.07207, eq. 12)."""

    distribution: ClassVar[str] = "categorical"
    equation: ClassVar[str] = "l = π(s)ᵀ [α log π(s) - min_i Q_i(s)]"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics, and discrete actions."""
        return frozenset({Can.NETS, Can.ENUMERATE})

    def __call__(self, batch: Batch, nets: Nets, rng: Draws) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; hands on the expected log-probability (minus the entropy)."""
        obs = seen(batch)
        log_probs = nets.log_probs(obs)
        values = of_actions(nets.values("critic", obs), self.pool).detach()
        loss = expected(log_probs, temperature(self.alpha, nets) * log_probs - values)
        return loss.view(batch.shape), {DRAWN: expected(log_probs, log_probs).detach().view(batch.shape)}
