"""Steady-state environment steps per second of the PPO of stable_baselines3 or sbx: LIBRARY ENV ENVS BATCH MINIBATCH EPOCHS."""

import importlib
import itertools
import json
import statistics
import sys
import time

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

torch.set_num_threads(1)
library, env, envs, batch, minibatch, epochs = *sys.argv[1:3], *map(int, sys.argv[3:7])
starts: list[float] = []


class Clock(BaseCallback):
    """Notes when each rollout starts."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        starts.append(time.perf_counter())


model = importlib.import_module(library).PPO(
    "MlpPolicy", make_vec_env(env, n_envs=envs, seed=0), n_steps=batch // envs, batch_size=minibatch, n_epochs=epochs, seed=0,
    device="cpu" if library == "stable_baselines3" else "auto",
)  # fmt: skip
model.learn(batch * 8, callback=Clock())
starts.append(time.perf_counter())
times = [b - a for a, b in itertools.pairwise(starts)][2:]
print(json.dumps({"value": round(batch / statistics.median(times)), "unit": "env steps/s"}))
