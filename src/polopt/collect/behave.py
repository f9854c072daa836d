"""How actions come about while experience is collected: uniform at first, then the policy's own, perhaps perturbed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polopt.interfaces import State
from polopt.part import Part

Array = NDArray[Any]


class Behaviour:
    """Replaces or perturbs the policy's actions of `n` running environments.

    start: decisions that are drawn uniformly before the policy acts. explore: the method's exploration part, or None.
    """

    def __init__(self, head: Any, explore: Part | None, start: int, n: int, rng: np.random.Generator) -> None:
        self.head, self.explore, self.start, self.n, self.rng = head, explore, start, n, rng
        self.made = 0  # decisions so far
        self.noise: Array = np.zeros((n, 0 if explore is None else head.action.size), dtype=np.float32)
        self.fresh: NDArray[np.bool_] = np.ones(n, dtype=bool)

    @property
    def passive(self) -> bool:
        """Whether the policy's own actions pass unchanged from here on."""
        return self.explore is None and self.made >= self.start

    def __call__(self, action: Array) -> Array:
        """The actions to take, for the policy's own."""
        if self.made < self.start:
            action = self.head.random(self.rng, self.n)
        elif self.explore is not None:
            action, self.noise = self.explore(action, self.noise, self.fresh, self.rng)
        self.made += self.n
        return action

    def ended(self, done: NDArray[np.bool_]) -> None:
        """Tell which episodes ended with this step."""
        self.fresh = done

    def state(self) -> State:
        """Where it stands; its random stream is the collector's."""
        return {"made": self.made, "noise": self.noise, "fresh": self.fresh}

    def load(self, state: State) -> None:
        """Restore from `state()`."""
        self.made, self.noise, self.fresh = int(state["made"]), np.array(state["noise"]), np.array(state["fresh"])
