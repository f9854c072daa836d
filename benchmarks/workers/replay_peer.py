"""The peer's steady state on the same work as replay_polopt: seconds per environment step with one update.

Arguments: stable_baselines3 or sbx, method (sac, td3, ddpg), steps, threads, and two that only the other side reads.
"""

import itertools
import json
import statistics
import sys
import time
from importlib import import_module
from typing import Any

import torch

library, method, steps, threads, *_ = sys.argv[1:]
torch.set_num_threads(int(threads))
START, WARM, BLOCK = 320, 128, 32
cls = getattr(import_module(library), method.upper())
kwargs: dict[str, Any] = {"device": "cpu"} if library == "stable_baselines3" else {}
if method != "sac":  # their defaults for these are batch 256, 400-300 nets and an update per step; noise as here
    import numpy as np
    from stable_baselines3.common.noise import NormalActionNoise

    kwargs["action_noise"] = NormalActionNoise(np.zeros(6), 0.1 * np.ones(6))
model = cls(
    "MlpPolicy", "HalfCheetah-v5", batch_size=256, learning_starts=START, buffer_size=100_000, seed=0, train_freq=1,
    gradient_steps=1, policy_kwargs={"net_arch": [256, 256]}, **kwargs,
)  # fmt: skip
ends: list[float] = []
train = model.train


def timed(*args: Any, **named: Any) -> None:
    train(*args, **named)
    if library == "sbx":
        import jax

        jax.block_until_ready(model.policy.qf_state.params)
    ends.append(time.perf_counter())


model.train = timed
begun = time.perf_counter()
model.learn(START + WARM + int(steps) + BLOCK)
marks = ends[WARM::BLOCK]
times = [(b - a) / BLOCK for a, b in itertools.pairwise(marks)]
print(json.dumps({"value": statistics.median(times), "best": min(times), "warm_s": round(ends[WARM] - begun, 1)}))
