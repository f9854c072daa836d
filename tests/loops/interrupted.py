"""Runs that are stopped on the way, and what they wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from polopt.interfaces import Event


class StopAt:
    """An observer that asks the run to stop after an update (what a signal handler does)."""

    def __init__(self, update: int) -> None:
        self.update = update

    def start(self, info: Any) -> None: ...

    def event(self, event: Event) -> None:
        if event.update == self.update:
            os.kill(os.getpid(), 15)

    def end(self, summary: Any) -> None: ...


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]
