"""Environments behind one interface: raw observations in, ends and true last observations out, whatever steps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from polopt.collect import env_state
from polopt.errors import CallError, PoloptError
from polopt.interfaces import State
from polopt.policies.mlp_spaces import Observation

Array = NDArray[Any]
#: observations [n,...], rewards [n], terminated [n], truncated [n], last observations of those that ended by index
Step = tuple[Array, Array, Array, Array, dict[int, Array]]


class Envs(Protocol):
    """n environments that keep running: a finished one starts its next episode by itself."""

    n: int
    next_step: bool  # True: the step after an end only resets (its action is ignored); False: an end resets at once

    def reset(self, seeds: Sequence[int]) -> Array: ...

    def step(self, actions: Array) -> Step: ...

    def state(self) -> State | None: ...

    def load(self, state: State) -> None: ...

    def close(self) -> None: ...


def raised(index: int | None, name: str, error: Exception) -> NoReturn:
    """Raise `PoloptError` with an environment's own message."""
    which = "an environment" if index is None else f"environment {index}"
    raise PoloptError(f"{which} of {name} raised {type(error).__name__}: {error}") from error


class InProcess:
    """Environments of this process, stepped one after the other (cheaper than Gymnasium's own loop, which copies more)."""

    next_step = False

    def __init__(self, envs: Sequence[Any], observation: Observation, name: str) -> None:
        self.envs, self.n, self.name = list(envs), len(envs), name
        self.obs = observation.empty(self.n)

    def reset(self, seeds: Sequence[int]) -> Array:
        """First observations."""
        for i, (env, seed) in enumerate(zip(self.envs, seeds, strict=True)):
            try:
                self.obs[i] = env.reset(seed=seed)[0]
            except Exception as error:
                raised(i, self.name, error)
        return self.obs

    def step(self, actions: Array) -> Step:
        """One step of each; the observations' memory is reused by the next one."""
        reward = np.empty(self.n)
        terminated, truncated = np.zeros(self.n, dtype=bool), np.zeros(self.n, dtype=bool)
        last: dict[int, Array] = {}
        obs = self.obs
        i = 0
        try:
            for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
                seen, reward[i], ended, cut, _ = env.step(action)
                if ended or cut:
                    terminated[i], truncated[i], last[i] = ended, cut, np.array(seen)
                    seen = env.reset()[0]
                obs[i] = seen
        except Exception as error:
            raised(i, self.name, error)
        return obs, reward, terminated, truncated, last

    def state(self) -> State | None:
        """All environments' states; None when one cannot be saved."""
        found = [env_state.save(env) for env in self.envs]
        return None if any(f is None for f in found) else {"envs": found}

    def load(self, state: State) -> None:
        """Restore from `state()`."""
        for env, saved in zip(self.envs, state["envs"], strict=True):
            env_state.load(env, saved)

    def close(self) -> None:
        """Close all environments."""
        for env in self.envs:
            env.close()


class Vector:
    """A Gymnasium vector environment; how it resets is read from its metadata."""

    def __init__(self, venv: Any, name: str) -> None:
        from gymnasium.vector import AutoresetMode

        mode = AutoresetMode(venv.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        if mode is AutoresetMode.DISABLED:
            raise CallError(f"the vector form of {name} does not reset its environments; use collect.vectorize = 'sync'")
        self.venv, self.n, self.name = venv, int(venv.num_envs), name
        self.next_step = mode is AutoresetMode.NEXT_STEP

    def reset(self, seeds: Sequence[int]) -> Array:
        """First observations; a native vector form takes only the first seed."""
        from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

        each = isinstance(self.venv.unwrapped, AsyncVectorEnv | SyncVectorEnv)
        try:
            obs: Array = self.venv.reset(seed=list(seeds) if each else seeds[0])[0]
            return obs
        except Exception as error:
            raised(None, self.name, error)

    def step(self, actions: Array) -> Step:
        """One step of each."""
        try:
            obs, reward, terminated, truncated, info = self.venv.step(actions)
        except Exception as error:
            raised(None, self.name, error)
        last: dict[int, Array] = {}
        done = terminated | truncated
        if done.any():
            # with NEXT_STEP what is returned at an end is the true last observation
            source = obs if self.next_step else info["final_obs"]
            last = {int(i): np.array(source[i]) for i in done.nonzero()[0]}
        return obs, reward, terminated, truncated, last

    def state(self) -> State | None:
        """The vector environment's state where it can be saved."""
        return env_state.save_vector(self.venv)

    def load(self, state: State) -> None:
        """Restore from `state()`."""
        env_state.load_vector(self.venv, state)

    def close(self) -> None:
        """Close all environments."""
        self.venv.close()
