"""Resident memory over a run of 10,000 updates with metrics, TensorBoard and checkpoints on: it must hold."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import polopt
from polopt.interfaces import Event

marks: dict[int, int] = {}


class Resident:
    """Notes resident memory every thousand updates."""

    def start(self, info: Any) -> None: ...

    def event(self, event: Event) -> None:
        if event.update % 1000 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            marks[event.update] = pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000

    def end(self, summary: Any) -> None: ...


with tempfile.TemporaryDirectory() as place:
    polopt.train(
        "ppo", "gym:CartPole-v1", budget="10000-updates", out=Path(place) / "run", observers=[Resident()],
        overrides={
            "collect.envs": 2, "collect.steps": 8, "minibatch": 16, "epochs": 1, "evaluate.episodes": 2,
            "checkpoint.seconds": 5.0, "optim.compile": "never",
        },
    )  # fmt: skip
print(json.dumps({"value": round(marks[10000] / marks[2000], 3), "unit": "memory at 10,000 / at 2,000 updates", "mb": marks}))
