"""Helpers of parts that work on transitions (s, a, r, s'), one decision per row or several."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.interfaces import Nets

#: How the numbers of an ensemble become one: the smallest, the mean, or the first member's.
Pool = Literal["min", "mean", "first"]


def seen(batch: Batch) -> Float[Tensor, "N D"]:
    """Observations of all decisions, one per row."""
    obs: Tensor = batch.obs.flatten(0, 1)
    return obs


def taken(batch: Batch) -> Tensor:
    """Actions of all decisions, one per row: [N,A], or [N] indices."""
    action: Tensor = batch.action.flatten(0, 1)
    return action


def following(batch: Batch) -> Float[Tensor, "N D"]:
    """True next observations; raises `CallError` on a batch that is no sample of transitions."""
    if batch.next_obs is None:
        raise CallError("the batch holds no next observations: this part needs transitions, from source 'ring' or 'dataset'")
    obs: Tensor = batch.next_obs.flatten(0, 1)
    return obs


def discount(batch: Batch, gamma: float) -> Float[Tensor, " N"]:
    """gamma^m (1 - terminated), m the decisions folded into a transition: truncation bootstraps, termination does not."""
    if batch.terminated is None:
        raise CallError("the batch does not say which decisions ended an episode (terminated)")
    steps = batch.row.get("steps")
    if steps is None:
        return (~batch.terminated).flatten().to(torch.get_default_dtype()) * gamma
    return (~batch.terminated * gamma ** steps[:, None]).flatten()


def rewards(batch: Batch) -> Float[Tensor, " N"]:
    """Rewards with channels added up, one per decision."""
    return batch.scalar_reward().flatten()


def pooled(values: Float[Tensor, "E N K"], how: Pool) -> Float[Tensor, " N"]:
    """One number per decision: atoms averaged, members pooled."""
    mean = values.squeeze(-1) if values.shape[-1] == 1 else values.mean(-1)
    if how == "first":
        return mean[0]
    return mean.amin(0) if how == "min" else mean.mean(0)


def valued(
    nets: Nets, name: str, obs: Tensor, action: Tensor | None = None, *, pool: Pool, slow: bool = False
) -> Float[Tensor, " N"]:
    """One value per decision; members that the pooling does not read are not computed."""
    return pooled(nets.values(name, obs, action, slow=slow, members=1 if pool == "first" else None), pool)


def of_actions(values: Float[Tensor, "E N V"], how: Pool) -> Float[Tensor, "N V"]:
    """One value per action: members pooled."""
    if how == "first":
        return values[0]
    return values.amin(0) if how == "min" else values.mean(0)


def expected(log_probs: Float[Tensor, "N V"], x: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """sum_a pi(a) x(a); an action of probability 0 adds 0, whatever its x."""
    return torch.where(log_probs.isneginf(), torch.zeros_like(x), log_probs.exp() * x).sum(-1)
