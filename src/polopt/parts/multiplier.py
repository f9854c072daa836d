"""Dual variables: what weighs a constraint, moved by how far it is from being met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.draws import Draws
from polopt.interfaces import Nets
from polopt.part import Can, Net, Part, Range, register_part
from polopt.parts.transitions import expected, seen

if TYPE_CHECKING:
    from polopt.method import Method

#: log alpha is kept within these bounds: a policy that cannot reach its target entropy must not drive alpha to infinity
LOG_ALPHA = (-20.0, 5.0)
#: the statistic in which an actor hands the log-probabilities of its draws to the updates that follow in the same round
DRAWN = "logp@drawn"


def temperature(alpha: float | None, nets: Nets) -> Float[Tensor, ""] | float:
    """The temperature without gradient: the given number, or exp of the dual variable "temperature"."""
    return alpha if alpha is not None else nets.scalar("temperature").detach().clamp(*LOG_ALPHA).exp()


def lacks_temperature(alpha: float | None, method: Method) -> str | None:
    """What is wrong when no number is given and no update trains one."""
    if alpha is not None or any("multiplier" in u.terms and method.slots(u).multiplier is not None for u in method.updates):
        return None
    return "has no temperature: set alpha, or add an update whose term is multiplier 'temperature'"


@register_part("multiplier", "temperature")
@dataclass(frozen=True)
class Temperature(Part):
    """The Lagrange multiplier of a least entropy (arXiv 1812.05905, sec. 5): l = -log alpha (log pi(a|s) + H), log pi detached.

    Its gradient vanishes where the policy's entropy equals H; below it alpha rises. The logarithm is trained, and brought back
    within [-20, 5] after each step, so that it leaves a bound when its gradient turns. The draws are the actor's of the same round
    where it made some, else its own.
    """

    entropy: Annotated[float | None, "target entropy H in nats; none: minus the number of action components"] = None
    initial_alpha: Annotated[float, Range(ge=3e-9, le=148), "temperature at the start"] = 1.0
    equation: ClassVar[str] = "l = -log α (log π(a|s) + H)"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds the variable."""
        return frozenset({Can.NETS})

    @property
    def networks(self) -> tuple[Net, ...]:
        """One trained number."""
        return (Net("temperature", inputs="none", init=math.log(self.initial_alpha), bounds=LOG_ALPHA),)

    def goal(self, nets: Nets) -> float:
        """The target entropy in nats."""
        return -float(nets.actions) if self.entropy is None else self.entropy

    def __call__(self, batch: Batch, nets: Nets, rng: Draws) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the temperature and the entropy estimate."""
        if DRAWN in batch.stats:
            logp = batch.stats[DRAWN]
        else:
            with torch.no_grad():
                logp = nets.draw(seen(batch), rng)[1].view(batch.shape)
        log_alpha = nets.scalar("temperature")
        told = {"temperature": log_alpha.detach().clamp(*LOG_ALPHA).exp(), "entropy": -logp.detach().mean()}
        return -log_alpha * (logp.detach() + self.goal(nets)), told


@register_part("multiplier", "discrete-temperature")
@dataclass(frozen=True)
class DiscreteTemperature(Temperature):
    """The multiplier for discrete actions: l = pi(s)^T [-log alpha (log pi(s) + H)], H a share of log |A| (arXiv 1910.07207, eq.
    11).

    A share close to 1 keeps the policy almost uniform.
    """

    share: Annotated[float, Range(gt=0, lt=1), "target entropy as a share of the largest, where `entropy` is not given"] = 0.98
    equation: ClassVar[str] = "l = π(s)ᵀ [-log α (log π(s) + H)], H = share log|A|"

    def goal(self, nets: Nets) -> float:
        """The target entropy in nats."""
        return self.share * math.log(nets.actions) if self.entropy is None else self.entropy

    def __call__(self, batch: Batch, nets: Nets, rng: Draws) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the temperature, the entropy and its share of the largest (0 where that is 0)."""
        if DRAWN not in batch.stats:
            with torch.no_grad():
                log_probs = nets.log_probs(seen(batch))
                batch = batch.adding({DRAWN: expected(log_probs, log_probs).view(batch.shape)})
        loss, told = super().__call__(batch, nets, rng)
        most = math.log(nets.actions)
        return loss, {**told, "entropy_share": told["entropy"] / most if most else torch.zeros_like(told["entropy"])}
