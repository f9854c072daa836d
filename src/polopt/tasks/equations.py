"""Control tasks given by equations: small worlds that are computed for many environments at once, in NumPy.

A world says how episodes start, what is seen, and what an action does, for n rows at a time. From it follow a Gymnasium
environment (one row), a Gymnasium vector environment (n rows, one call per step), and a polopt task.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from polopt.errors import unknown
from polopt.policies.mlp_spaces import Action, Observation
from polopt.tasks.gym import GymTask
from polopt.tasks.gym_presets import preset, style_of
from polopt.tasks.options import option_help, options_from

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import VectorEnv

Floats = NDArray[np.float64]
Rng = np.random.Generator


class World(Protocol):
    """The equations of one task with its options filled in; holds no state of an episode."""

    horizon: int  # decisions after which an episode is cut
    sight: int  # numbers in an observation
    action: Action

    def start(self, n: int, rng: Rng) -> Floats:
        """States [n,S] of n fresh episodes."""
        ...

    def observe(self, state: Floats) -> Floats:
        """Observations [n,sight]."""
        ...

    def step(self, state: Floats, action: NDArray[Any], rng: Rng) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Next states [n,S], rewards [n], and which episodes ended [n], for actions within their space."""
        ...


class EquationTask(GymTask):
    """`<prefix>:<variant>`: a world by its variant, with dials as options."""

    prefix: ClassVar[str]
    kind: ClassVar[type]  # of the options
    variants: ClassVar[Mapping[str, tuple[Mapping[str, Any], str]]]  # options that differ from the defaults, and what it is
    presets: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, name: str, options: Mapping[str, Any] | None = None) -> None:
        """Raises `CallError` for unknown variants and options, and values out of range."""
        super().__init__(name, options)
        self.variant = name.partition(":")[2]
        if self.variant not in self.variants:
            raise unknown(f"variant of {self.prefix}:", self.variant, self.variants)
        self.dials: Any = options_from(name, self.kind, self.options, self.variants[self.variant][0])

    @functools.cached_property
    def world(self) -> World:
        """The world with these options."""
        raise NotImplementedError

    def check(self) -> None:
        """Nothing is left to check: the options were, when the task was made."""

    def make(self) -> gymnasium.Env[Any, Any]:
        """One environment."""
        from polopt.tasks.envs import EquationEnv

        return cast("gymnasium.Env[Any, Any]", EquationEnv(self))

    def make_vector(self, n: int, how: str) -> VectorEnv[Any, Any, Any]:
        """`n` environments computed at once ("native"), or in processes ("async"), which is slower."""
        from polopt.tasks.envs import EquationVectorEnv, in_processes

        return EquationVectorEnv(self, n) if how == "native" else in_processes(self, n)

    def spaces(self) -> tuple[Observation, Action]:
        """What observations and actions look like."""
        return Observation("box", (self.world.sight,), "<f4"), self.world.action

    def preset(self, method: Any) -> Mapping[str, Any]:
        """Settings that suit this world and a method with these properties."""
        chosen = preset(self.name, method)
        if style_of(method) != "episodes":
            chosen |= {"collect.vectorize": "native", "collect.envs": 32, "collect.steps": max(1, chosen["collect.steps"] // 2)}
        has_gamma = hasattr(method.advantage, "gamma")
        return chosen | {k: v for k, v in self.presets.items() if k != "advantage.gamma" or has_gamma}

    def option_fields(self) -> dict[str, tuple[Any, str]]:
        """Every option by name: (value of this variant, help)."""
        return option_help(self.dials)


def box(size: int) -> Action:
    """`size` numbers in [-1, 1]."""
    return Action("box", (size,), "<f4", low=(-1.0,) * size, high=(1.0,) * size)


__all__ = ["EquationTask", "Floats", "Rng", "World", "box"]
