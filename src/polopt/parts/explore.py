"""Exploration: how actions differ from the policy's own while experience is collected. Host-side, in NumPy.

Actions are normalised to [-1, 1], so noise is in units of the largest action.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from polopt.part import Can, Part, Range, register_part

Floats = NDArray[np.float32]


@register_part("explore", "gaussian")
@dataclass(frozen=True)
class GaussianNoise(Part):
    """a = clip(mu(s) + std n, -1, 1), n standard normal, independent over time (TD3, arXiv 1802.09477)."""

    std: Annotated[float, Range(ge=0), "deviation of the noise, in units of the largest action"] = 0.1
    equation: ClassVar[str] = "a = clip(μ(s) + σ n, -1, 1)"
    host: ClassVar[bool] = True

    @property
    def requires(self) -> frozenset[Can]:
        """Continuous actions."""
        return frozenset({Can.REPARAM})

    def __call__(self, action: Floats, state: Floats, fresh: NDArray[np.bool_], rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Perturbed actions [n,A] and the next state; `fresh` marks environments at the start of an episode."""
        noise = rng.standard_normal(action.shape, dtype=np.float32)
        return np.clip(action + np.float32(self.std) * noise, -1, 1), state


@register_part("explore", "ornstein-uhlenbeck")
@dataclass(frozen=True)
class OrnsteinUhlenbeck(GaussianNoise):
    """Noise that is correlated in time: x <- x - theta x dt + sigma sqrt(dt) n, from 0 at each start (arXiv 1509.02971, sec. 7).

    Its stationary variance is sigma^2 dt / (1 - (1 - theta dt)^2).
    """

    std: Annotated[float, Range(ge=0), "sigma: deviation of an increment over a time of 1"] = 0.2
    theta: Annotated[float, Range(ge=0, le=1), "rate at which the noise returns to 0"] = 0.15
    dt: Annotated[float, Range(gt=0), "time of a step"] = 1.0
    equation: ClassVar[str] = "x <- x - θ x dt + σ sqrt(dt) n;  a = clip(μ(s) + x, -1, 1)"

    def __call__(self, action: Floats, state: Floats, fresh: NDArray[np.bool_], rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Perturbed actions [n,A] and the noise that the next step starts from."""
        state = np.where(fresh[:, None], np.float32(0), state)
        noise = rng.standard_normal(action.shape, dtype=np.float32)
        state = (state * (1 - self.theta * self.dt) + self.std * math.sqrt(self.dt) * noise).astype(np.float32)
        return np.clip(action + state, -1, 1), state


__all__ = ["GaussianNoise", "OrnsteinUhlenbeck"]
