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
from polopt.parts.transitions import Pool, discount, expected, following, of_actions, rewards, seen, valued

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("target", "soft")
@dataclass(frozen=True)
class SoftTarget(Part):
    """y = r + gamma (1 - d) [min_i Q'_i(s', a') - alpha log pi(a'|s')], a' drawn from the present policy (arXiv 1812.05905, eq.
    5)."""

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
        value = valued(nets, "critic", after, action, slow=True, pool=self.pool) - temperature(self.alpha, nets) * logp
        return (rewards(batch) + discount(batch, self.gamma) * value).view(batch.shape)


@register_part("target", "soft-truncated")
@dataclass(frozen=True)
class SoftTruncated(SoftTarget):
    """Atoms r + gamma (1 - d) (z_(i) - alpha log pi(a'|s')) for the smallest of all members' atoms (TQC, arXiv 2005.04269, eq. 11).

    All E x M atoms of the slow critics at (s', a') are sorted together; the `drop` x E largest are left out.
    """

    drop: Annotated[int, Range(ge=0), "atoms left out, per member"] = 2
    equation: ClassVar[str] = "y_i = r + γ (1 - d) (z_(i) - α log π(a'|s')), i = 1..(M - d) N"

    def validate(self, method: Method, update: Update) -> str | None:
        """Some atoms must remain."""
        atoms = getattr(method.slots(update).critic, "atoms", None)
        if atoms is None:
            return "drops atoms, so the critic must predict quantiles (critic 'quantiles')"
        if self.drop >= atoms:
            return f"target.drop = {self.drop} of critic.atoms = {atoms} atoms per member leaves none"
        return super().validate(method, update)

    def __call__(self, batch: Batch, nets: Nets, rng: Draws) -> Float[Tensor, "B T M"]:
        """The atoms of each decision's target."""
        after = following(batch)
        action, logp = nets.draw(after, rng)
        atoms = nets.values("critic", after, action, slow=True)  # [E,N,M]
        members, count, each = atoms.shape
        kept = atoms.transpose(0, 1).reshape(count, members * each).sort(-1).values[:, : members * (each - self.drop)]
        soft = kept - temperature(self.alpha, nets) * logp[:, None]
        return (rewards(batch)[:, None] + discount(batch, self.gamma)[:, None] * soft).view(*batch.shape, -1)


@register_part("target", "soft-state")
@dataclass(frozen=True)
class SoftState(Part):
    """V(s) = E_a [min_i Q_i(s, a) - alpha log pi(a|s)], a drawn afresh (SAC, arXiv 1801.01290, eq. 5): what the value net
    regresses to. It looks no step ahead, so that it has no discount."""

    alpha: Annotated[float | None, Range(ge=0), "temperature; none: the dual variable that an update trains"] = None
    pool: Annotated[Pool, "how the members' values become one"] = "min"
    equation: ClassVar[str] = "y = min_i Q_i(s, a) - α log π(a|s), a ~ π(.|s)"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics, and continuous draws."""
        return frozenset({Can.NETS, Can.REPARAM})

    def validate(self, method: Method, update: Update) -> str | None:
        """A temperature is fixed here or trained by some update."""
        return lacks_temperature(self.alpha, method)

    def __call__(self, batch: Batch, nets: Nets, rng: Draws) -> Float[Tensor, "B T"]:
        """The target of each decision's state."""
        obs = seen(batch)
        action, logp = nets.draw(obs, rng)
        value = valued(nets, "critic", obs, action, pool=self.pool) - temperature(self.alpha, nets) * logp
        return value.view(batch.shape)


@register_part("target", "state-value")
@dataclass(frozen=True)
class StateValueTarget(Part):
    """y = c r + gamma (1 - d) V(s'), V the value net or its slow copy; c scales rewards, as an inverse temperature (arXiv
    1801.01290)."""

    gamma: Annotated[float, Range(ge=0, le=1), "discount"] = 0.99
    reward_scale: Annotated[float, Range(gt=0), "factor of rewards"] = 1.0
    slow: Annotated[bool, "read the slow copy of the value net"] = True
    equation: ClassVar[str] = "y = c r + γ (1 - d) V'(s')"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics."""
        return frozenset({Can.NETS})

    @property
    def copies(self) -> frozenset[str]:
        """Of the value net, if it is read."""
        return frozenset({"value"} if self.slow else ())

    def __call__(self, batch: Batch, nets: Nets) -> Float[Tensor, "B T"]:
        """The target of each decision."""
        value = valued(nets, "value", following(batch), slow=self.slow, pool="first")
        return (self.reward_scale * rewards(batch) + discount(batch, self.gamma) * value).view(batch.shape)


@register_part("target", "soft-enumerated")
@dataclass(frozen=True)
class SoftEnumerated(SoftTarget):
    """y = r + gamma (1 - d) pi(s')^T [Q'(s') - alpha log pi(s')], the expectation over all actions (arXiv 1910.07207, eq. 10)."""

    equation: ClassVar[str] = "y = r + γ (1 - d) π(s')ᵀ [min_i Q'_i(s') - α log π(s')]"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics, and discrete actions."""
        return frozenset({Can.NETS, Can.ENUMERATE})

    def __call__(self, batch: Batch, nets: Nets, rng: Draws) -> Float[Tensor, "B T"]:
        """The target of each decision."""
        after = following(batch)
        log_probs = nets.log_probs(after)
        values = of_actions(nets.values("critic", after, slow=True), self.pool)
        value = expected(log_probs, values - temperature(self.alpha, nets) * log_probs)
        return (rewards(batch) + discount(batch, self.gamma) * value).view(batch.shape)
