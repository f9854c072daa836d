"""Methods and tasks that go wrong on purpose, named by `path/to/this_file.py:NAME`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

from polopt.methods.onpolicy.a2c import A2C
from polopt.methods.onpolicy.ppo import PPO
from polopt.parts.advantage.gae import GAE
from polopt.tasks.gym import GymTask


@dataclass(frozen=True)
class Faulty(GAE):
    """GAE that raises, dies, hangs, or sends SIGINT to `process`, in update `at`; only once if `mark` (a file) is given."""

    what: str = "raise"
    at: int = 1
    mark: str = ""
    process: int = 0

    def __call__(self, batch: Any) -> Any:
        if batch.clock.update >= self.at and not (self.mark and Path(self.mark).exists()):
            if self.mark:
                Path(self.mark).touch()
            if self.what == "raise":
                raise ValueError("no luck today")
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "hang":
                time.sleep(60)
            if self.what == "interrupt":
                os.kill(self.process, signal.SIGINT)
                time.sleep(1.0)  # until the signal has come back
            if self.what == "insist":
                for _ in range(2):
                    os.kill(self.process, signal.SIGINT)
                    time.sleep(1.0)
                time.sleep(60)
        return super().__call__(batch)


FAULTY = PPO.but("faulty", advantage=Faulty())
SLOW = A2C.but("slow")


class NotANumber(gym.Wrapper):
    """The reward of held-out episodes is not a number."""

    def reset(self, *, seed: int | None = None, **rest: Any) -> Any:
        self.held_out = seed is not None and seed >= 2**31
        return self.env.reset(seed=seed, **rest)

    def step(self, action: Any) -> Any:
        obs, reward, *rest = self.env.step(action)
        return (obs, float("nan") if self.held_out else reward, *rest)


class NaNTask(GymTask):
    """CartPole whose held-out scores are not numbers."""

    def __init__(self) -> None:
        super().__init__("gym:CartPole-v1")

    def make(self) -> Any:
        return NotANumber(super().make())
