"""What a critic of actions regresses to, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.interfaces import Nets
from polopt.part import Can, Net, Part, Range, register_part
from polopt.parts.transitions import pooled, seen, taken

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("critic", "q")
@dataclass(frozen=True)
class QRegression(Part):
    """scale * sum_e (Q_e(s, a) - y)^2 over the members of the net "critic"; y comes from the update's target."""

    members: Annotated[int, Range(ge=1), "critics of the same form"] = 2
    scale: Annotated[float, Range(gt=0), "factor of the squared error"] = 1.0
    hidden: Annotated[tuple[int, ...] | None, "widths of hidden layers; none: those of the policy"] = None
    equation: ClassVar[str] = "l = c sum_e (Q_e(s, a) - y)^2"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics."""
        return frozenset({Can.NETS})

    @property
    def networks(self) -> tuple[Net, ...]:
        """The critics of this form."""
        return (Net("critic", "obs-action", 1, self.members, self.hidden),)

    def validate(self, method: Method, update: Update) -> str | None:
        """A critic of actions needs a target."""
        return None if method.slots(update).target is not None else "needs a target to regress to (target='soft', say)"

    def value(self, batch: Batch, nets: Nets) -> Float[Tensor, " N"]:
        """The value of each decision: the mean over members and atoms."""
        return nets.values("critic", seen(batch), taken(batch)).mean((0, 2))

    def __call__(self, batch: Batch, nets: Nets, target: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the mean value and the mean absolute TD error."""
        values = nets.values("critic", seen(batch), taken(batch)).squeeze(-1)  # [E,N]
        error = values - target.flatten()
        told = {"q": values.detach().mean(), "td_error": error.detach().abs().mean()}
        return self.scale * error.square().sum(0).view(batch.shape), told


@register_part("critic", "expectile-q")
@dataclass(frozen=True)
class ExpectileQ(QRegression):
    """Expectile regression that anneals to the mean: |tau - 1[u < 0]| u^2, u = y - Q(s, a) (arXiv 2506.05968, eq. 8).

    tau falls linearly from `start` to `end` over the first `share` of the budget: from close to the optimality operator to the
    Bellman operator. At 1/2 it is half the squared error. Stochastic rewards and transitions are taken as optimistically as
    actions are.
    """

    start: Annotated[float, Range(gt=0, lt=1), "expectile at the start"] = 0.9
    end: Annotated[float, Range(gt=0, lt=1), "expectile at the end"] = 0.5
    share: Annotated[float, Range(gt=0, le=1), "share of the budget over which it falls"] = 1.0
    equation: ClassVar[str] = "l = c sum_e |τ - 1[u < 0]| u², u = y - Q_e(s, a);  τ(t) = τ_0 - (τ_0 - 1/2) min(1, t/T)"

    def expectile(self, fraction: float | Tensor) -> float | Tensor:
        """tau when `fraction` of the budget is spent."""
        spent = fraction / self.share
        spent = spent.clamp(max=1.0) if isinstance(spent, Tensor) else min(1.0, spent)
        return self.start - (self.start - self.end) * spent

    def __call__(self, batch: Batch, nets: Nets, target: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the mean value and the mean absolute TD error."""
        values = nets.values("critic", seen(batch), taken(batch)).squeeze(-1)
        error = target.flatten() - values
        told = {"q": values.detach().mean(), "td_error": error.detach().abs().mean()}
        loss = asymmetric(error, self.expectile(batch.clock.fraction))
        return self.scale * loss.sum(0).view(batch.shape), told


@register_part("critic", "quantiles")
@dataclass(frozen=True)
class QuantileRegression(QRegression):
    """Quantile Huber regression of every member's atoms on the target's atoms (arXiv 2005.04269, eq. 13; QR-DQN, arXiv 1710.10044).

    l = sum_e 1/(K M) sum_{m,i} |tau_m - 1[u < 0]| H(u), u = y_i - theta_e^m, tau_m = (2m - 1)/(2M), H Huber's loss at `kappa`.
    over: members are added up (the paper) or averaged (its released code).
    """

    members: Annotated[int, Range(ge=1), "critics of the same form"] = 5
    atoms: Annotated[int, Range(ge=1), "quantiles that each member predicts"] = 25
    kappa: Annotated[float, Range(gt=0), "error beyond which the loss grows linearly"] = 1.0
    over: Annotated[Literal["sum", "mean"], "how members' losses add up"] = "sum"
    equation: ClassVar[str] = "l = sum_e 1/(KM) sum_m sum_i |τ_m - 1[u < 0]| H(u), u = y_i - θ_e^m(s, a)"

    @property
    def networks(self) -> tuple[Net, ...]:
        """The critics of this form."""
        return (Net("critic", "obs-action", self.atoms, self.members, self.hidden),)

    def __call__(self, batch: Batch, nets: Nets, target: Tensor) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision, for a target [B,T] or atoms [B,T,K]; tells the mean value and the mean absolute TD error."""
        atoms = nets.values("critic", seen(batch), taken(batch))  # [E,N,M]
        goal = target.reshape(atoms.shape[1], -1)
        level = (torch.arange(self.atoms, device=atoms.device, dtype=torch.float64) + 0.5) / self.atoms
        loss = quantile_huber(atoms, goal, level, self.kappa).sum(0)
        loss = loss / len(atoms) if self.over == "mean" else loss
        error = (goal.mean(-1) - atoms.detach().mean(-1)).abs().mean()
        told = {"q": atoms.detach().mean(), "td_error": error}
        return self.scale * loss.view(batch.shape), told


@register_part("critic", "q-of-actions")
@dataclass(frozen=True)
class QOfActions(QRegression):
    """scale * sum_e (Q_e(s)[a] - y)^2, each member giving the values of all discrete actions."""

    equation: ClassVar[str] = "l = c sum_e (Q_e(s)[a] - y)^2"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics, and discrete actions."""
        return frozenset({Can.NETS, Can.ENUMERATE})

    @property
    def networks(self) -> tuple[Net, ...]:
        """The critics of this form."""
        return (Net("critic", "obs", "actions", self.members, self.hidden),)

    def value(self, batch: Batch, nets: Nets) -> Float[Tensor, " N"]:
        """The value of each decision: the mean over members."""
        return nets.values("critic", seen(batch)).mean(0).gather(-1, taken(batch)[:, None]).squeeze(-1)

    def __call__(self, batch: Batch, nets: Nets, target: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the mean value and the mean absolute TD error."""
        all_values = nets.values("critic", seen(batch))  # [E,N,V]
        index = taken(batch).expand(all_values.shape[0], -1).unsqueeze(-1)
        values = all_values.gather(-1, index).squeeze(-1)
        error = values - target.flatten()
        told = {"q": values.detach().mean(), "td_error": error.detach().abs().mean()}
        return self.scale * error.square().sum(0).view(batch.shape), told


@register_part("critic", "state-value")
@dataclass(frozen=True)
class StateRegression(Part):
    """scale * L_tau(y - V(s)) for the net "value": squared error at tau = 1/2 (where L = u^2), an expectile above (IQL, eq. 5).

    L_tau(u) = 2 |tau - 1[u < 0]| u^2 with `doubled`, else without the factor 2, as IQL writes it.
    """

    tau: Annotated[float, Range(gt=0, lt=1), "expectile; 0.5 is the mean"] = 0.5
    doubled: Annotated[bool, "twice the expectile loss: the squared error at tau = 0.5"] = True
    scale: Annotated[float, Range(gt=0), "factor of the loss"] = 0.5
    hidden: Annotated[tuple[int, ...] | None, "widths of hidden layers; none: those of the policy"] = None
    equation: ClassVar[str] = "l = c |τ - 1[u < 0]| u², u = y - V(s)"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics."""
        return frozenset({Can.NETS})

    @property
    def networks(self) -> tuple[Net, ...]:
        """One value net."""
        return (Net("value", "obs", 1, 1, self.hidden),)

    def validate(self, method: Method, update: Update) -> str | None:
        """It needs a target."""
        return None if method.slots(update).target is not None else "needs a target to regress to (target='soft-state', say)"

    def __call__(self, batch: Batch, nets: Nets, target: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the mean value."""
        value = pooled(nets.values("value", seen(batch)), "first")
        loss = asymmetric(target.flatten() - value, self.tau)
        loss = 2 * loss if self.doubled else loss
        return self.scale * loss.view(batch.shape), {"v": value.detach().mean()}


def asymmetric(u: Tensor, tau: float | Tensor) -> Tensor:
    """The expectile loss |tau - 1[u < 0]| u^2 (Newey & Powell 1987)."""
    return (tau - (u < 0).to(u.dtype)).abs() * u.square()


def quantile_huber(
    atoms: Float[Tensor, "E N M"], goal: Float[Tensor, "N K"], level: Float[Tensor, " M"], kappa: float
) -> Float[Tensor, "E N"]:
    """1/(MK) sum_{m,i} |level_m - 1[u < 0]| H_kappa(u), u = goal_i - atoms_m, with its gradient for the atoms; goals are constants.

    Huber's loss is a quadratic between two lines, so that sorted goals, their running sums and three searches for each atom give
    the sums over i: E N M log K steps in place of the E N M K pairs. Sums are kept in float64, as they are differences.
    """
    members, rows, count = atoms.shape
    with torch.no_grad():
        y = goal.to(torch.float64).sort(-1).values
        centre = y.mean(-1, keepdim=True)
        y = y - centre
        theta = atoms.to(torch.float64).transpose(0, 1).reshape(rows, members * count).contiguous() - centre
        first, second = (F.pad(x.cumsum(-1), (1, 0)) for x in (y, y.square()))
        total = y.shape[-1]
        start, end = torch.zeros_like(theta, dtype=torch.int64), torch.full_like(theta, total, dtype=torch.int64)
        low, zero = torch.searchsorted(y, theta - kappa), torch.searchsorted(y, theta)
        high = torch.searchsorted(y, theta + kappa, right=True)

        def moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Count, sum of u and sum of u^2 over goals a..b-1."""
            n = (b - a).to(torch.float64)  # an integer times kappa would be a float32
            one, two = first.gather(-1, b) - first.gather(-1, a), second.gather(-1, b) - second.gather(-1, a)
            return n, one - n * theta, two - 2 * theta * one + n * theta.square()

        (below, far_below, _), (_, near_below, square_below) = moments(start, low), moments(low, zero)
        (_, near_above, square_above), (above, far_above, _) = moments(zero, high), moments(high, end)
        up = level.repeat(members)
        slope = up * (near_above + kappa * above) + (1 - up) * (near_below - kappa * below)
        value = up * (square_above / 2 + kappa * far_above - above * kappa**2 / 2)
        value = value + (1 - up) * (square_below / 2 - kappa * far_below - below * kappa**2 / 2)
        slope, value = ((x / (count * total)).view(rows, members, count).transpose(0, 1).to(atoms.dtype) for x in (slope, value))
    return (value + slope * (atoms.detach() - atoms)).sum(-1)
