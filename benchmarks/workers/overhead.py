"""Share of a run that metrics, TensorBoard, checkpoints and the display cost: the same run with and without them."""

import json
import statistics
import tempfile
import time
from pathlib import Path

import polopt

settings = {"evaluate.episodes": 2, "optim.compile": "never"}
cases = {
    "control": ("ppo", "gym:CartPole-v1", "60k-decisions", settings),
    "text": ("grpo", "text:spell_backward", "30-updates", {**settings, "evaluate.every": 0}),
}
found = {}
for name, (method, task, budget, overrides) in cases.items():
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(4):
        for kept in (True, False):
            with tempfile.TemporaryDirectory() as place:
                start = time.perf_counter()
                polopt.train(method, task, budget=budget, out=Path(place) / "run" if kept else False, overrides=overrides)
                if i:
                    times[kept].append(time.perf_counter() - start)
    found[name] = round(100 * (statistics.median(times[True]) / statistics.median(times[False]) - 1), 1)
print(json.dumps({"value": max(found.values()), "unit": "% of a run", **found}))
