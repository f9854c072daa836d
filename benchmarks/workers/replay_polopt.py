"""Steady state of a replay method on HalfCheetah: seconds per step of one environment with one round of updates.

Arguments: method (sac, td3, ddpg), steps, threads, "eager" or "compiled", critics.
"""

import json
import statistics
import sys
import time

import torch

from polopt.loops.improve import Improve
from polopt.overrides import resolve
from polopt.run import peak_rss

method, steps, threads, how, *more = sys.argv[1:]
torch.set_num_threads(int(threads))
START, WARM, BLOCK = 320, 128, 32
over = {
    "budget": f"{START + int(steps) + 10_000}-decisions", "seed": 0, "threads": int(threads), "policy.hidden": (256, 256),
    "source.batch": 256, "source.start": START, "source.size": 100_000, "collect.envs": 1, "collect.steps": BLOCK,
    "optim.compile": "always" if how == "compiled" else "never",
}  # fmt: skip
if more:
    over["critic.members"] = int(more[0])
resolved = resolve(method, "gym:HalfCheetah-v5", over, sources="benchmark")
run = Improve(resolved.method, resolved.task, resolved.settings)
begun = time.perf_counter()
while run.ledger.spent.get("rounds", 0) < WARM:
    run.step()
warm = time.perf_counter() - begun
times = []
while run.ledger.spent["rounds"] < WARM + int(steps):
    start = time.perf_counter()
    run.step()
    times.append((time.perf_counter() - start) / BLOCK)
print(
    json.dumps(
        {"value": statistics.median(times), "best": min(times), "warm_s": round(warm, 1), "peak_mb": round(peak_rss() / 2**20)}
    )
)
