"""Steady-state environment steps per second of polopt's PPO: ENV ENVS BATCH MINIBATCH EPOCHS."""

import json
import statistics
import sys
import time

import torch

from polopt.loops.improve import Improve
from polopt.overrides import resolve

env, envs, batch, minibatch, epochs = sys.argv[1], *map(int, sys.argv[2:6])
settings = {
    "budget": "100000-updates", "threads": 1, "collect.envs": envs, "collect.steps": batch // envs, "minibatch": minibatch,
    "epochs": epochs, "policy.hidden": (64, 64), "policy.normalize_obs": False, "policy.normalize_reward": False,
    "optim.compile": "always", "updates.policy.rule.lr": 3e-4,
}  # fmt: skip
resolved = resolve("ppo", f"gym:{env}", settings)
run = Improve(resolved.method, resolved.task, resolved.settings)
start = time.perf_counter()
run.step()
first = time.perf_counter() - start
run.step()
times, collect = [], []
while len(times) < 12:
    start = time.perf_counter()
    metrics = run.step()
    times.append(time.perf_counter() - start)
    collect.append(metrics["seconds_collect"])
middle = statistics.median(times)
print(
    json.dumps(
        {
            "value": round(batch / middle), "unit": "env steps/s", "collect_us": round(1e6 * statistics.median(collect) / batch, 1),
            "first_s": round(first, 1), "torch": torch.__version__,
        }
    )
)  # fmt: skip
