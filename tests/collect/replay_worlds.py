"""Environments that count, and what a replay of them must hold: plain lists of transitions, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polopt.batch import Batch, Final
from polopt.collect.replay import Replay
from polopt.parts.replay import Ring

GAMMA = 0.9


@dataclass
class Kept:
    """One transition: observations are (environment, serial number)."""

    obs: tuple[float, float]
    action: float
    reward: float
    end: int  # 0 goes on, 1 terminated, 2 truncated
    next_obs: tuple[float, float]


@dataclass
class World:
    """`envs` environments whose episodes end at random. next_step: the step after an end only resets and is masked out."""

    envs: int
    rng: np.random.Generator
    next_step: bool = False
    p_end: float = 0.3
    serial: list[int] = field(default_factory=list)
    resetting: list[bool] = field(default_factory=list)
    kept: list[list[Kept]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.serial = [0] * self.envs
        self.resetting = [False] * self.envs
        self.kept = [[] for _ in range(self.envs)]

    def fragment(self, steps: int) -> Batch:
        """The next fragment, remembered in `kept`."""
        n = self.envs
        obs, reward, action = np.zeros((n, steps, 2)), np.zeros((n, steps, 1)), np.zeros((n, steps, 1))
        mask, ended, cut = np.ones((n, steps), bool), np.zeros((n, steps), bool), np.zeros((n, steps), bool)
        at, final = [], []
        for e in range(n):
            for t in range(steps):
                obs[e, t] = e, self.serial[e]
                action[e, t], reward[e, t] = self.rng.normal(), self.rng.normal()
                if self.resetting[e]:  # its action is ignored
                    mask[e, t], self.resetting[e] = False, False
                    self.serial[e] += 1
                    continue
                end = int(self.rng.choice([0, 1, 2], p=[1 - self.p_end, self.p_end / 2, self.p_end / 2]))
                ended[e, t], cut[e, t] = end == 1, end == 2
                after = (float(e), float(self.serial[e] + 1))
                self.serial[e] += 1
                if end == 2 or (end == 0 and t == steps - 1):
                    at.append((e, t))
                    final.append(after)
                seen = after
                if end and self.next_step:
                    self.resetting[e] = True
                    seen = (
                        after if end == 2 or t < steps - 1 else tuple(obs[e, t])
                    )  # the last observation is in the row, or nowhere
                elif end:
                    self.serial[e] += 1  # a new episode
                    seen = after if end == 2 else tuple(obs[e, t])
                kept = Kept(tuple(obs[e, t]), float(np.float32(action[e, t, 0])), float(reward[e, t, 0]), end, seen)
                self.kept[e].append(kept)
        return Batch(
            mask=torch.from_numpy(mask), reward=torch.from_numpy(reward).float(), terminated=torch.from_numpy(ended),
            truncated=torch.from_numpy(cut), obs=torch.from_numpy(obs).float(), action=torch.from_numpy(action).float(),
            final=Final(torch.tensor(at, dtype=torch.int64).reshape(-1, 2), torch.tensor(final).reshape(-1, 2).float()),
        )  # fmt: skip


def ring(world: World, **settings: Any) -> Replay:
    """A ring for a world; `folder` and `budget` may be given."""
    folder, budget, seed = settings.pop("folder", None), settings.pop("budget", None), settings.pop("seed", 0)
    part = Ring(**{"size": 64, "batch": 32, "start": 0, **settings})
    return Replay(
        part, obs_size=2, action_size=1, discrete=False, channels=1, envs=world.envs, gamma=GAMMA,
        generator=torch.Generator().manual_seed(seed), device="cpu", folder=folder, budget_decisions=budget,
    )  # fmt: skip


def held(world: World, slots: int) -> list[list[Kept]]:
    """What a ring of so many slots per environment holds: each environment's newest transitions."""
    return [k[-slots:] for k in world.kept]


def folded(history: list[Kept], i: int, n: int) -> tuple[float, int, Kept]:
    """(discounted reward, decisions folded, last of them) of the window of up to n from i, by the definition."""
    total, steps = 0.0, 0
    while True:
        total += GAMMA**steps * history[i + steps].reward
        steps += 1
        last = history[i + steps - 1]
        if last.end or steps == n or i + steps == len(history):
            return total, steps, last


def expect(batch: Batch, world: World, slots: int, n: int) -> set[tuple[float, float]]:
    """Check every row of a drawn batch against the definition; returns the observations that were drawn."""
    table = {k.obs: (h, i) for h in held(world, slots) for i, k in enumerate(h)}
    assert batch.reward is not None
    assert batch.terminated is not None
    assert batch.truncated is not None
    assert batch.mask.all()
    for row in range(batch.shape[0]):
        obs = tuple(batch.obs[row, 0].tolist())
        history, i = table[obs]  # KeyError: drawn, but no longer held
        total, steps, last = folded(history, i, n)
        assert batch.action[row, 0].item() == history[i].action
        assert abs(batch.reward[row, 0, 0].item() - total) < 1e-5
        assert batch.row["steps"][row].item() == steps
        assert bool(batch.terminated[row, 0]) == (last.end == 1)
        assert bool(batch.truncated[row, 0]) == (last.end == 2)
        assert tuple(batch.next_obs[row, 0].tolist()) == last.next_obs
    return {tuple(o) for o in batch.obs[:, 0].tolist()}


def same(a: Batch, b: Batch) -> None:
    """Two drawn batches are equal, bit for bit."""
    for name in ("mask", "reward", "terminated", "truncated", "obs", "action", "next_obs"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.row["steps"], b.row["steps"])


def saved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A state as it comes back from a checkpoint on disk."""
    from polopt.tree import load_tree, save_tree

    save_tree(folder, state, {})
    return load_tree(folder)[0]
