"""Whole episodes from given start seeds: for methods that compare returns, and for held-out scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polopt.collect.envs import raised
from polopt.errors import PoloptError
from polopt.policies.mlp_heads import Head
from polopt.policies.mlp_spaces import Observation

Array = NDArray[Any]
Act = Callable[[NDArray[np.float32]], Array]  # encoded observations [k,D] -> actions [k,...] as stored
LIMIT = 100_000  # decisions after which an episode of an environment without a time limit is cut


@dataclass(frozen=True)
class Episodes:
    """R episodes, padded on the right to T decisions; `final` holds the true last observation of each [R,D]."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    obs: NDArray[np.float32] | None = None
    action: Array | None = None
    reward: NDArray[np.float64] | None = None
    terminated: NDArray[np.bool_] | None = None
    final: NDArray[np.float32] | None = None


def run_episodes(
    envs: Sequence[Any], seeds: Sequence[int], act: Act, head: Head, observation: Observation, name: str, *, keep: bool
) -> Episodes:
    """One episode per seed, started by `reset(seed=...)`; an environment that is done takes the next seed.

    keep: also return what happened at each decision. Raises `PoloptError` naming environment, seed and step when an
    environment raises or returns a number that is not finite.
    """
    runner = _Runner(envs, seeds, observation, name)
    log: list[tuple[Array, ...]] = []
    while runner.live.size:
        obs = observation.encode(runner.raw[runner.live])
        action = act(obs)
        before = runner.row[runner.live], runner.steps[runner.live]  # copies: stepping changes both
        reward, terminated = runner.step(head.outward(action))
        if keep:
            log.append((*before, obs, action.copy(), reward, terminated))
    runner.refuse_bad()
    if not keep:
        return Episodes(runner.returns, runner.lengths)
    row, t, obs, action, reward, terminated = (np.concatenate(c) for c in zip(*log, strict=True))
    bad = np.flatnonzero(~np.isfinite(obs).all(1))
    if bad.size:
        k = int(bad[0])
        raise PoloptError(f"{name} returned the observation {obs[k]} in step {t[k]} of the episode with start seed {seeds[row[k]]}")

    def pad(x: Array) -> Array:
        out = np.zeros((len(seeds), int(runner.lengths.max()), *x.shape[1:]), dtype=x.dtype)
        out[row, t] = x
        return out

    return Episodes(
        runner.returns, runner.lengths, pad(obs), pad(action), pad(reward), pad(terminated), observation.encode(runner.final)
    )


class _Runner:
    """Slots that work through a queue of episodes."""

    def __init__(self, envs: Sequence[Any], seeds: Sequence[int], observation: Observation, name: str) -> None:
        self.envs, self.seeds, self.name = envs, seeds, name
        n = min(len(envs), len(seeds))
        self.returns, self.lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=np.int64)
        self.raw, self.final = observation.empty(n), observation.empty(len(seeds))
        self.row, self.steps = np.arange(n), np.zeros(n, dtype=np.int64)  # episode and its decision number, by slot
        self.live = np.arange(n)
        self.waiting = n
        for i in range(n):
            self._start(i)

    def _start(self, i: int) -> None:
        try:
            self.raw[i] = self.envs[i].reset(seed=int(self.seeds[self.row[i]]))[0]
        except Exception as error:
            raised(i, f"{self.name} (start seed {self.seeds[self.row[i]]})", error)
        self.steps[i] = 0

    def step(self, actions: Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """One decision of each running episode: rewards and whether it terminated, in the order of `live`."""
        reward, terminated = np.empty(self.live.size), np.zeros(self.live.size, dtype=bool)
        over: list[int] = []
        i = 0
        try:
            for k, (i, action) in enumerate(zip(self.live.tolist(), actions, strict=True)):
                self.raw[i], reward[k], terminated[k], cut, _ = self.envs[i].step(action)
                if terminated[k] or cut:
                    over.append(i)
        except Exception as error:
            raised(i, f"{self.name} (start seed {self.seeds[self.row[i]]}, step {self.steps[i]})", error)
        self.steps[self.live] += 1
        rows = self.row[self.live]
        self.returns[rows] += reward
        self.lengths[rows] += 1
        over += self.live[self.steps[self.live] >= LIMIT].tolist()
        for i in dict.fromkeys(over):
            self.final[self.row[i]] = self.raw[i]
            if self.waiting < len(self.seeds):
                self.row[i] = self.waiting
                self.waiting += 1
                self._start(i)
            else:
                self.live = self.live[self.live != i]
        return reward, terminated

    def refuse_bad(self) -> None:
        """Raise `PoloptError` when a return is not finite."""
        bad = ~np.isfinite(self.returns)
        if bad.any():
            k = int(bad.nonzero()[0][0])
            raise PoloptError(f"{self.name} returned a reward that is not finite in the episode with start seed {self.seeds[k]}")
