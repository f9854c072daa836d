"""Small environments with known consequences, registered for the collectors' tests."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class Counter(gym.Env[np.ndarray, int]):
    """The observation is [episode number, step in it]; the reward of a step is 10 * episode + step; ends after `length` steps.

    cut: episodes are truncated, else they terminate. bad: what goes wrong in step 2 of episode 1 ("nan", "reward", "raise").
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 3, cut: bool = True, bad: str = "") -> None:
        self.length, self.cut, self.bad = length, cut, bad
        self.episode, self.t = -1, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def _obs(self) -> np.ndarray:
        return np.array([self.episode, self.t], dtype=np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = 10.0 * self.episode + self.t
        self.t += 1
        over = self.t >= self.length
        obs = self._obs()
        if self.bad and self.episode == 1 and self.t == 2:
            if self.bad == "raise":
                raise RuntimeError("the wheel came off")
            obs, reward = (obs * np.nan, reward) if self.bad == "nan" else (obs, float("inf"))
        return obs, reward, over and not self.cut, over and self.cut, {}


class CounterVector(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`Counter` in vector form that resets in the step after an end."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, **settings: Any) -> None:
        self.num_envs = num_envs
        self.envs = [Counter(**settings) for _ in range(num_envs)]
        self.single_observation_space, self.single_action_space = Counter.observation_space, Counter.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.over = np.zeros(num_envs, dtype=bool)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.over[:] = False
        return np.stack([e.reset()[0] for e in self.envs]), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        rows = [
            (e.reset()[0], 0.0, False, False) if over else e.step(a)[:4]
            for e, over, a in zip(self.envs, self.over, actions, strict=True)
        ]
        obs, reward, terminated, truncated = (np.array(c) for c in zip(*rows, strict=True))
        self.over = terminated | truncated
        return obs, reward, terminated, truncated, {}


class Mixed(gym.Env[Any, Any]):
    """MultiDiscrete observations and actions; rewards the action (2, 1)."""

    observation_space = spaces.MultiDiscrete([2, 3], start=[0, 5])
    action_space = spaces.MultiDiscrete([3, 2])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.integers([0, 5], [2, 8]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        good = bool((action == [2, 1]).all())
        return self.np_random.integers([0, 5], [2, 8]), float(good), False, self.np_random.random() < 0.2, {}


class Dicts(gym.Env[Any, Any]):
    """An unsupported observation space."""

    observation_space = spaces.Dict({"x": spaces.Discrete(2)})
    action_space = spaces.Discrete(2)


def register() -> None:
    """Make the environments known (once)."""
    if "toy/Counter-v0" not in gym.registry:
        gym.register("toy/Counter-v0", entry_point=Counter, vector_entry_point=CounterVector)
        gym.register("toy/Mixed-v0", entry_point=Mixed)
        gym.register("toy/Dicts-v0", entry_point=Dicts)
