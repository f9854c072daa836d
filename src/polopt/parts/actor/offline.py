"""Actors that stay close to a dataset: by its actions, by the nearest of all its actions, or by weighted cloning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError, PoloptError
from polopt.interfaces import Nets
from polopt.part import Can, Part, Range, register_part
from polopt.parts.actor.pathwise import DeterministicGradient
from polopt.parts.transitions import Pool, seen, taken, valued

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("actor", "behaviour-cloned")
@dataclass(frozen=True)
class BehaviourCloned(DeterministicGradient):
    """l = -lambda Q(s, mu(s)) + |mu(s) - a|^2 / dim(A), lambda = alpha / mean|Q|, detached (TD3+BC, arXiv 2106.06860, eq. 5)."""

    alpha: Annotated[float, Range(ge=0), "weight of the critic against cloning; 0 clones"] = 2.5
    equation: ClassVar[str] = "l = -λ Q(s, μ(s)) + mean_j (μ(s)_j - a_j)²,  λ = α / mean|Q|"

    def __call__(  # type: ignore[override]  # it also tells the distance
        self, batch: Batch, nets: Nets
    ) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the distance to what is cloned."""
        obs = seen(batch)
        action = nets.mode(obs)
        return self.weighed(batch, nets, obs, action, taken(batch))

    def weighed(
        self, batch: Batch, nets: Nets, obs: Tensor, action: Float[Tensor, "N A"], goal: Float[Tensor, "N A"]
    ) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss with `goal` as the actions that are cloned."""
        value = valued(nets, "critic", obs, action, pool=self.pool)
        lam = self.alpha / value.detach().abs().mean().clamp(min=1e-8)
        distance = (action - goal).square().mean(-1)
        loss = distance - lam * value if self.alpha else distance
        return loss.view(batch.shape), {"clone_distance": distance.detach().mean(), "q_weight": lam}


@register_part("actor", "nearest-in-data")
@dataclass(frozen=True)
class NearestInData(BehaviourCloned):
    """Cloning of the nearest dataset action: a = action of argmin over the data of |(beta s_i, a_i) - (beta s, mu(s))| (arXiv
    2306.06569).

    A tree over all [beta s, a] rows is built once on the host and asked without gradient, so only mu(s) receives the pull. Many
    neighbours are averaged. Observations are those that the networks see (standardised where the source standardises).
    """

    beta: Annotated[float, Range(ge=0), "weight of states in the distance; large: the action taken in the same state"] = 2.0
    neighbours: Annotated[int, Range(ge=1), "neighbours whose actions are averaged"] = 1
    host: ClassVar[bool] = True
    equation: ClassVar[str] = "l = -λ Q(s, μ(s)) + mean_j (μ(s)_j - ā_j)²,  ā = a_i, i = argmin |[β s_i, a_i] - [β s, μ(s)]|"

    def build(self, columns: Mapping[str, Tensor], standard: Any) -> Any:
        """The tree over a dataset's `obs` and `action` columns, [N,D] and [N,A], and the actions at its rows."""
        from scipy.spatial import KDTree

        obs, action = standard(columns["obs"]), columns["action"]
        if not bool(torch.isfinite(obs).all() & torch.isfinite(action).all()):
            raise PoloptError("the dataset holds numbers that are not finite, among which no nearest one can be found")
        actions = action.numpy(force=True)
        if self.neighbours > len(actions):
            raise CallError(
                f"actor.neighbours = {self.neighbours}: the dataset holds {len(actions)} transitions; use at most as many"
            )
        rows = np.concatenate([self.beta * obs.numpy(force=True), actions], 1)
        return KDTree(rows), actions

    def validate(self, method: Method, update: Update) -> str | None:
        """The tree is built once, so the data must not change."""
        return None if method.source.name == "dataset" else "searches a fixed set of data: use source 'dataset'"

    def __call__(self, batch: Batch, nets: Nets, built: Any) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:  # type: ignore[override]
        """The loss of each decision; tells the distance to the neighbour's action."""
        tree, actions = built
        obs = seen(batch)
        action = nets.mode(obs)
        query = np.concatenate([self.beta * nets.standardised(obs).numpy(force=True), action.numpy(force=True)], 1)
        if not np.isfinite(query).all():
            raise PoloptError("the policy's actions are not finite: no nearest action of the dataset can be found")
        found = tree.query(query, k=[*range(1, self.neighbours + 1)])[1]
        goal = torch.from_numpy(actions[found].mean(1)).to(action)
        return self.weighed(batch, nets, obs, action, goal)


@register_part("actor", "advantage-weighted")
@dataclass(frozen=True)
class AdvantageWeighted(Part):
    """l = -exp(beta (Q'(s, a) - V(s))) log pi(a|s), the weight at most `most` (IQL, arXiv 2110.06169, eq. 7)."""

    beta: Annotated[float, Range(ge=0), "inverse temperature; 0 clones"] = 3.0
    most: Annotated[float, Range(gt=0), "largest weight"] = 100.0
    pool: Annotated[Pool, "how the members' values become one"] = "min"
    distribution: ClassVar[str] = "bounded-normal"
    equation: ClassVar[str] = "l = -min(exp(β (Q'(s, a) - V(s))), w) log π(a|s)"

    @property
    def requires(self) -> frozenset[Can]:
        """A policy that holds critics, and continuous actions."""
        return frozenset({Can.NETS, Can.REPARAM})

    @property
    def copies(self) -> frozenset[str]:
        """Of the critic."""
        return frozenset({"critic"})

    def __call__(self, batch: Batch, nets: Nets) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The loss of each decision; tells the mean weight."""
        obs, action = seen(batch), taken(batch)
        with torch.no_grad():
            value = valued(nets, "value", obs, pool="first")
            gain = valued(nets, "critic", obs, action, slow=True, pool=self.pool) - value
            weight = (self.beta * gain).exp().clamp(max=self.most)
        return -(weight * nets.score(obs, action)).view(batch.shape), {"weight": weight.mean()}
