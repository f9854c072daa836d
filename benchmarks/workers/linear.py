"""Cost of an update against its size: doubling decisions, sequences or group size must at most multiply time by 2.2."""

import itertools
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from polopt.loops.improve import Improve
from polopt.overrides import resolve


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in a batch or tree."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(bytes_of(v) for v in value.values())
    return sum(bytes_of(v) for v in vars(value).values()) if hasattr(value, "mask") else 0


def measure(method: str, task: str, settings: dict[str, Any]) -> tuple[float, int]:
    """Median seconds of an update, and bytes of its batch."""
    resolved = resolve(method, task, {"budget": "1000-updates", "threads": 1, "optim.compile": "never", **settings})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    sizes: list[int] = []
    answer = run.collector.answer

    def noted(*args: Any, **kwargs: Any) -> Any:
        batch = answer(*args, **kwargs)
        sizes.append(bytes_of(batch))
        return batch

    run.collector.answer = noted  # type: ignore[method-assign]
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run.step()
        times.append(time.perf_counter() - start)
    run.collector.close()
    return statistics.median(times[1:]), max(sizes)


text = {"collect.max_new_tokens": 6, "penalty": "none"}  # below every length: all batches are equally wide
control = {"collect.envs": 8, "minibatch": 64, "epochs": 4}
cases: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "decisions": ("ppo", "gym:CartPole-v1", [{**control, "collect.steps": n} for n in (256, 512, 1024)]),
    "sequences": ("grpo", "text:spell_backward", [{**text, "collect.prompts": n, "group_size": 8} for n in (32, 64, 128)]),
    "group size": ("grpo", "text:spell_backward", [{**text, "collect.prompts": 32, "group_size": n} for n in (8, 16, 32)]),
}
found: dict[str, Any] = {}
for name, (method, task, sizes) in cases.items():
    rows = [measure(method, task, s) for s in sizes]
    found[name] = {
        "seconds": [round(t, 3) for t, _ in rows],
        "time": [round(b[0] / a[0], 2) for a, b in itertools.pairwise(rows)],
        "batch bytes": [round(b[1] / a[1], 2) for a, b in itertools.pairwise(rows)],
    }
worst = max(x for row in found.values() for x in (*row["time"], *row["batch bytes"]))
print(json.dumps({"value": worst, "unit": "x per doubling, worst", **found}))
