"""The worlds by equations as Gymnasium environments: `polopt/Point-v0`, `polopt/Bandit-v0`, also for other libraries.

Importing this module registers them; `gymnasium.make("polopt.tasks.envs:polopt/Point-v0", variant="two")` does both. Further
keywords are the task's options.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from polopt.interfaces import State
from polopt.policies.mlp_spaces import Action
from polopt.tasks import make
from polopt.tasks.equations import EquationTask, World

Array = NDArray[Any]
#: Gymnasium's name -> (prefix of the task, its first variant)
NAMES = {"polopt/Point-v0": ("point", "two"), "polopt/Bandit-v0": ("bandit", "wave")}


def action_space(action: Action) -> spaces.Space[Any]:
    """The Gymnasium space of such actions."""
    if action.kind == "discrete":
        return spaces.Discrete(action.counts[0])
    return spaces.Box(np.array(action.low, np.float32), np.array(action.high, np.float32), dtype=np.float32)


def observation_space(world: World) -> spaces.Box:
    """Any numbers: states may lie anywhere."""
    return spaces.Box(-np.inf, np.inf, (world.sight,), np.float32)


class EquationEnv(gym.Env[Array, Any]):
    """One row of a world."""

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(self, task: EquationTask) -> None:
        self.world = task.world
        self.observation_space, self.action_space = observation_space(self.world), action_space(self.world.action)
        self.state: Array = np.zeros((1, 1))
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """A fresh episode."""
        super().reset(seed=seed)
        self.state, self.steps = self.world.start(1, self.np_random), 0
        return self.world.observe(self.state)[0].astype(np.float32), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """One decision."""
        self.state, reward, ended = self.world.step(self.state, np.asarray(action)[None], self.np_random)
        self.steps += 1
        over = bool(ended[0])
        cut = not over and self.steps >= self.world.horizon
        return self.world.observe(self.state)[0].astype(np.float32), float(reward[0]), over, cut, {}

    def save_state(self) -> State:
        """What changes while it runs, but for the random stream."""
        return {"state": self.state.copy(), "steps": self.steps}

    def load_state(self, state: State) -> None:
        """Restore what `save_state` returned."""
        self.state, self.steps = np.array(state["state"]), int(state["steps"])


class EquationVectorEnv(VectorEnv[Array, Array, Array]):
    """n rows of a world, computed at once; a finished one starts its next episode in the same step."""

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, task: EquationTask, n: int) -> None:
        self.num_envs, self.world = n, task.world
        self.single_observation_space, self.single_action_space = observation_space(self.world), action_space(self.world.action)
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self.state: Array = np.zeros((n, 1))
        self.steps = np.zeros(n, dtype=np.int64)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Fresh episodes in all rows, from one seed."""
        super().reset(seed=seed)
        self.state, self.steps[:] = self.world.start(self.num_envs, self.np_random), 0
        return self.world.observe(self.state).astype(np.float32), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """One decision of each row; `final_obs` holds the true last observations of rows that ended."""
        self.state, reward, over = self.world.step(self.state, np.asarray(actions), self.np_random)
        self.steps += 1
        cut = ~over & (self.steps >= self.world.horizon)
        obs = self.world.observe(self.state).astype(np.float32)
        done = over | cut
        if not done.any():
            return obs, reward, over, cut, {}
        info = {"final_obs": obs, "_final_obs": done}
        self.state = self.state.copy()
        self.state[done] = self.world.start(int(done.sum()), self.np_random)
        self.steps[done] = 0
        return self.world.observe(self.state).astype(np.float32), reward, over, cut, info

    def save_state(self) -> State:
        """What changes while it runs, but for the random stream."""
        return {"state": self.state.copy(), "steps": self.steps.copy()}

    def load_state(self, state: State) -> None:
        """Restore what `save_state` returned."""
        self.state, self.steps = np.array(state["state"]), np.array(state["steps"])


def in_processes(task: EquationTask, n: int) -> VectorEnv[Any, Any, Any]:
    """`n` environments, each in a process of its own."""
    return AsyncVectorEnv([task.make] * n, autoreset_mode=AutoresetMode.SAME_STEP)


def made(name: str, variant: str | None, options: dict[str, Any]) -> EquationTask:
    """The task behind a registered environment."""
    prefix, first = NAMES[name]
    task = make(f"{prefix}:{variant or first}", options)
    assert isinstance(task, EquationTask)
    return task


def register() -> None:
    """Make the environments known to Gymnasium, once."""
    for name in NAMES:
        if name not in gym.registry:
            gym.register(name, entry_point=_solo(name), vector_entry_point=_vector(name), disable_env_checker=True)


def _solo(name: str) -> Any:
    return lambda variant=None, **options: EquationEnv(made(name, variant, options))


def _vector(name: str) -> Any:
    return lambda num_envs=1, variant=None, **options: EquationVectorEnv(made(name, variant, options), num_envs)


register()
