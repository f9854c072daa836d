"""`bandit:<variant>`: one state; the reward of an action is a known function of it, with noise; the best action is known."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from polopt.part import Range, check_fields
from polopt.policies.mlp_spaces import Action
from polopt.tasks.equations import EquationTask, Floats, Rng, World, box

Form = Literal["wave", "bumps", "quadratic", "arms"]


@dataclass(frozen=True)
class BanditOptions:
    """Dials of a bandit."""

    form: Annotated[Form, "reward by action a: wave f(a), bumps (modes), quadratic 1 - |a - best|^2, or numbered arms"] = "wave"
    noise: Annotated[float, Range(ge=0), "deviation of the reward around its mean"] = 0.0
    horizon: Annotated[int, Range(ge=1), "decisions per episode; more than one: an endless world, cut here"] = 1
    size: Annotated[int, Range(ge=1), "numbers in an action (bumps, quadratic)"] = 2
    modes: Annotated[int, Range(ge=1), "bumps: on a line for size 1, else on a circle in the first two numbers"] = 2
    radius: Annotated[float, Range(ge=0, le=1), "distance of bumps from 0; of the best action (quadratic), along the diagonal"] = (
        0.7
    )
    width: Annotated[float, Range(gt=0), "width of a bump"] = 0.15
    hidden: Annotated[bool, "bumps: one of each episode pays 1 where the bump exceeds 1/2, is not shown, and ends it"] = False
    tilt: Annotated[float, Range(ge=0, le=1), "what each further bump pays less than the one before; the first pays 1"] = 0.0
    arms: Annotated[int, Range(ge=2), "numbered arms"] = 10
    gap: Annotated[float, Range(gt=0), "what the best arm pays more than the worst; those between are spaced evenly"] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "options")


class Bandit:
    """A world of one state, seen as the number 1.

    wave: f(a) = 0.6 sin(6a) exp(-a^2) + 0.4a on [-1,1], several peaks. bumps: max_k (1 - k tilt) exp(-|a - c_k|^2 / width^2).
    quadratic: 1 - |a - best|^2. arms: arm i pays gap i / (arms - 1). With a hidden mode the best memoryless policy hits all modes
    equally often: in h decisions that pays 1 - (1 - 1/modes)^h, any one mode 1/modes.
    """

    sight = 1

    def __init__(self, options: BanditOptions) -> None:
        self.options, self.horizon = options, options.horizon
        size = 1 if options.form == "wave" else options.size
        self.action = Action("discrete", (), "<i8", (options.arms,), (0,)) if options.form == "arms" else box(size)
        self.size = size

    @functools.cached_property
    def centres(self) -> Floats:
        """Where the bumps are [modes,size]; the first one pays most."""
        o = self.options
        if self.size == 1:
            return np.linspace(o.radius, -o.radius, o.modes)[:, None] if o.modes > 1 else np.array([[o.radius]])
        angle = 2 * math.pi * np.arange(o.modes) / o.modes
        return np.concatenate([o.radius * np.stack([np.cos(angle), np.sin(angle)], 1), np.zeros((o.modes, self.size - 2))], 1)

    def value(self, action: NDArray[Any]) -> Floats:
        """Mean reward [n] of actions [n,size], or [n] arms: exact."""
        o = self.options
        if o.form == "arms":
            return np.asarray(o.gap * action / (o.arms - 1), dtype=np.float64)
        a = np.clip(np.asarray(action, dtype=np.float64), -1, 1)
        if o.form == "wave":
            x = a[:, 0]
            return np.asarray(0.6 * np.sin(6 * x) * np.exp(-x * x) + 0.4 * x)
        if o.form == "quadratic":
            return np.asarray(1 - np.square(a - o.radius / math.sqrt(self.size)).sum(1))
        far = np.square(a[:, None] - self.centres).sum(2) / o.width**2
        return np.asarray(((1 - o.tilt * np.arange(o.modes)) * np.exp(-far)).max(1))

    @functools.cached_property
    def best(self) -> tuple[NDArray[Any], float]:
        """A best action and its mean reward; for the wave by search on a grid of 1e-5."""
        o = self.options
        if o.form == "arms":
            return np.array(o.arms - 1), o.gap
        if o.form == "wave":
            grid = np.linspace(-1, 1, 200_001)[:, None]
            value = self.value(grid)
            return grid[value.argmax()], float(value.max())
        at = np.full(self.size, o.radius / math.sqrt(self.size)) if o.form == "quadratic" else self.centres[0]
        return at, 1.0

    def start(self, n: int, rng: Rng) -> Floats:
        state = np.ones((n, 2))
        if self.options.hidden:
            state[:, 1] = rng.integers(0, self.options.modes, n)
        return state

    def observe(self, state: Floats) -> Floats:
        return state[:, :1]

    def step(self, state: Floats, action: NDArray[Any], rng: Rng) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        if self.options.hidden:
            far = np.square(np.clip(action, -1, 1) - self.centres[state[:, 1].astype(int)]).sum(1)
            hit = far < math.log(2) * self.options.width**2
            return state, hit.astype(np.float64), hit
        reward = self.value(action)
        if self.options.noise:
            reward = reward + self.options.noise * rng.standard_normal(len(reward))
        return state, reward, np.full(len(reward), self.horizon == 1)


class BanditTask(EquationTask):
    """A one-state task by equation."""

    prefix = "bandit"
    kind = BanditOptions
    variants: ClassVar = {
        "wave": ({"form": "wave", "noise": 1.0}, "one number, several peaks, noise"),
        "two": ({"form": "bumps", "size": 1, "modes": 2}, "one number, two equally good modes at +-0.7"),
        "ring": ({"form": "bumps", "size": 2, "modes": 8}, "two numbers, eight equally good modes on a circle"),
        "hidden": ({"form": "bumps", "width": 0.25, "hidden": True, "horizon": 12}, "two modes; which one pays is not shown"),
        "quadratic": ({"form": "quadratic"}, "one smooth peak"),
        "arms": ({"form": "arms", "noise": 0.5}, "ten numbered arms"),
    }
    presets: ClassVar = {"collect.steps": 16, "evaluate.episodes": 256}

    @functools.cached_property
    def world(self) -> World:
        """The bandit with these options."""
        return Bandit(self.dials)


__all__ = ["Bandit", "BanditOptions", "BanditTask"]
