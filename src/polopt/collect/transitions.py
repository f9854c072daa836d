"""Transitions as rows of one matrix, and as a data set with the spaces that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.policies.mlp_spaces import Action, Observation

Array = NDArray[Any]
GOES_ON, TERMINATED, TRUNCATED = 0, 1, 2  # the end code of a row


@dataclass(frozen=True)
class Layout:
    """Columns of a transition in a float32 matrix: obs | action | reward channels | end code | next obs.

    One row holds all of it, so that a draw is one gather and the columns of what was drawn are views. A discrete action is
    kept as a float, which is exact below 2^24.
    """

    obs: int
    action: int
    discrete: bool
    channels: int

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return 2 * self.obs + self.action + self.channels + 1

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return 4 * self.width

    @property
    def actions(self) -> slice:
        """Columns of the action."""
        return slice(self.obs, self.obs + self.action)

    @property
    def rewards(self) -> slice:
        """Columns of the reward channels."""
        return slice(self.obs + self.action, self.obs + self.action + self.channels)

    @property
    def end(self) -> int:
        """Column of the end code."""
        return self.obs + self.action + self.channels

    @property
    def next(self) -> slice:
        """Columns of the next observation."""
        return slice(self.end + 1, self.width)

    def pack(
        self, obs: Array, action: Array, reward: Array, terminated: Array, truncated: Array, next_obs: Array
    ) -> Float[np.ndarray, "*N W"]:
        """Rows of obs [*N,D], action [*N,...], reward [*N,K], ends [*N] and next_obs [*N,D].

        An episode that terminates and is cut in the same step counts as terminated.
        """
        rows = np.empty((*terminated.shape, self.width), dtype=np.float32)
        rows[..., : self.obs] = obs
        rows[..., self.actions] = action.reshape(*terminated.shape, self.action)
        rows[..., self.rewards] = reward
        rows[..., self.end] = np.where(terminated, TERMINATED, TRUNCATED * truncated)
        rows[..., self.next] = next_obs
        return rows

    def action_of(self, rows: Float[Tensor, "N W"]) -> Tensor:
        """Actions [N,1,A] of float, or [N,1] (one) or [N,1,A] (several) of int64 where they are discrete."""
        action = rows[:, self.actions]
        if not self.discrete:
            return action.unsqueeze(1)
        return action.long() if self.action == 1 else action.long().unsqueeze(1)


def rows_of(layout: Layout, batch: Batch, envs: int) -> Float[np.ndarray, "B T W"]:
    """The transitions of a fragment; those of masked-out decisions mean nothing. Raises `CallError` when it does not fit."""
    _check(layout, batch, envs)
    assert batch.reward is not None
    mask = batch.mask.numpy(force=True)
    none = np.zeros_like(mask)
    terminated, truncated = (none if x is None else x.numpy(force=True) for x in (batch.terminated, batch.truncated))
    obs, action = batch.obs.numpy(force=True), batch.action.numpy(force=True)
    if batch.next_obs is not None:
        after = batch.next_obs.numpy(force=True)
    else:
        at, final = np.zeros((0, 2), dtype=np.int64), obs[0, :0]
        if batch.final is not None:
            at, final = batch.final.at.numpy(force=True), batch.final.obs.numpy(force=True)
        after = _next_observations(mask, terminated, truncated, obs, at, final)
    return layout.pack(obs, action, batch.reward.numpy(force=True), terminated, truncated, after)


def _check(layout: Layout, batch: Batch, envs: int) -> None:
    n, t = batch.shape
    if n != envs:
        raise CallError(f"the ring was made for {envs} environments, but the batch has {n} rows")
    for what, x, expected in (("obs", batch.obs, layout.obs), ("reward", batch.reward, layout.channels)):
        if x is None or x.shape != (n, t, expected):
            found = None if x is None else tuple(x.shape)
            raise CallError(f"the ring was made for {what} {(n, t, expected)}, but the batch has {found}")
    if batch.action is None or batch.action.numel() != n * t * layout.action:
        found = None if batch.action is None else tuple(batch.action.shape)
        raise CallError(f"the ring was made for actions of {layout.action} numbers, but the batch has actions {found}")


def _next_observations(mask: Array, ended: Array, truncated: Array, obs: Array, at: Array, final: Array) -> Array:
    """The true next observation of each decision: the row's next one, or a final one where the row was cut.

    After a termination nothing is bootstrapped, and a collector that resets at once need not keep the last observation: it is
    that of the decision itself then. Raises `CallError` naming a cut whose next observation is nowhere.
    """
    known = np.zeros_like(mask)
    known[:, :-1] = ~mask[:, 1:]  # the decision that follows only resets: it was made at the last observation
    lacking = truncated.copy()
    lacking[:, -1] = True
    lacking &= mask & ~ended & ~known
    after = np.empty_like(obs)
    after[:, :-1], after[:, -1] = obs[:, 1:], obs[:, -1]
    if len(at):
        row, t = at[:, 0], at[:, 1]
        after[row, t], known[row, t], lacking[row, t] = final, True, False
    if lacking.any():
        i, k = (int(x) for x in np.argwhere(lacking)[0])
        raise CallError(f"the batch's row {i} is cut after step {k}, but has neither next_obs nor a final observation there")
    if ended.any():
        alone = ended & ~known
        after[alone] = obs[alone]
    return after


@dataclass(frozen=True)
class Transitions:
    """N transitions in the order in which they happened, episode after episode, with the spaces they belong to.

    obs, next_obs [N,D] are encoded vectors; action [N,A] are the environment's own, floats or integers; reward [N,K]; start [N] is
    true where an episode begins. `name` is what messages call it; env is the JSON of the environment's spec, where known.
    """

    name: str
    observation: Observation
    action_space: Action
    obs: Float[np.ndarray, "N D"]
    action: Array
    reward: Float[np.ndarray, "N K"]
    terminated: Bool[np.ndarray, " N"]
    truncated: Bool[np.ndarray, " N"]
    next_obs: Float[np.ndarray, "N D"]
    start: Bool[np.ndarray, " N"]
    env: str | None = None

    def __len__(self) -> int:
        return int(self.obs.shape[0])

    @property
    def layout(self) -> Layout:
        """The columns of its rows."""
        return Layout(self.obs.shape[1], self.action_space.size, self.action_space.kind != "box", self.reward.shape[1])

    def statistics(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """Mean and standard deviation of each number of the observations, over all transitions."""
        x = self.obs.astype(np.float64)
        return torch.from_numpy(x.mean(0)).float(), torch.from_numpy(x.std(0)).float()

    def rows(self, inward: Callable[[Array], Array] | None = None) -> Float[Tensor, "N W"]:
        """All transitions as rows of a matrix; an episode that stops without an end is cut there.

        inward: from the environment's actions to those that batches hold; without it discrete actions count from 0.
        """
        if inward is not None:
            action = inward(self.action)
        else:
            action = self.action - np.asarray(self.action_space.start or 0)
        stop = np.append(self.start[1:], True)
        rows = self.layout.pack(self.obs, action, self.reward, self.terminated, self.truncated | stop, self.next_obs)
        return torch.from_numpy(rows)

    def episodes(self) -> Int[np.ndarray, "E 2"]:
        """First and one-past-last transition of each episode."""
        first = self.start.nonzero()[0]
        return np.stack((first, np.append(first[1:], len(self))), 1)

    def returns(self) -> Float[np.ndarray, " E"]:
        """Undiscounted return of each episode, channels added up."""
        found: Array = np.add.reduceat(self.reward.sum(1, dtype=np.float64), self.start.nonzero()[0])
        return found


__all__ = ["GOES_ON", "TERMINATED", "TRUNCATED", "Layout", "Transitions", "rows_of"]
