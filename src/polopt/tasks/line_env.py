"""A line of cells as a Gymnasium environment. Imported by Gymnasium when the environment is made."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Array = NDArray[Any]
END = 100


class Line(gym.Env[Array, Array]):
    """x in [0, 100], seen as x / 100; an action in [-1, 1] moves by as much. Starts at 0, pays 1 and ends at 100."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.x = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Back to 0."""
        super().reset(seed=seed)
        self.x = 0.0
        return self._seen(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move."""
        self.x = float(np.clip(self.x + float(np.clip(action, -1, 1)[0]), 0, END))
        ended = self.x >= END - 1e-6
        return self._seen(), float(ended), ended, False, {}

    def _seen(self) -> Array:
        return np.array([self.x / END], dtype=np.float32)

    def save_state(self) -> dict[str, Any]:
        """Where it stands, for checkpoints."""
        return {"x": self.x}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore from `save_state()`."""
        self.x = float(state["x"])
