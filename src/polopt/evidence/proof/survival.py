"""Kill and resume: a run that dies by SIGKILL midway and is resumed must end as the undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from polopt.interfaces import Event, State
from polopt.loops.drive import drive
from polopt.method import Method
from polopt.overrides import Resolved, resolve
from polopt.run import RunFolder

UPDATES, EVERY, KILLED = 12, 4, 7  # length of the run, updates between checkpoints, update after which it is killed


@dataclass(frozen=True)
class Survival:
    """Whether the resumed run equals the undisturbed one; where it does not, in what."""

    ok: bool
    message: str = ""


class KillAt:
    """An observer that ends its process with SIGKILL after an update, which nothing can catch."""

    def __init__(self, update: int) -> None:
        self.update = update

    def start(self, info: Mapping[str, Any]) -> None: ...

    def event(self, event: Event) -> None:
        """Die when the time has come."""
        if event.update == self.update:
            os.kill(os.getpid(), signal.SIGKILL)

    def end(self, summary: Mapping[str, Any]) -> None: ...


def check(method: Method, task: str, settings: Mapping[str, Any]) -> Survival:
    """Run undisturbed; run in a child process that is killed between two checkpoints; resume; compare metrics and weights."""
    fixed = {
        **settings, "budget": f"{UPDATES}-updates", "checkpoint.every": EVERY, "checkpoint.seconds": 3600.0, "evaluate.every": 3,
        "optim.compile": "never", "threads": 1, "device": "cpu",
    }  # fmt: skip
    resolved = resolve(method, task, fixed, sources="certificate")
    with TemporaryDirectory(prefix="polopt-certify-") as folder:
        whole, broken = (RunFolder.create(Path(folder) / name) for name in ("whole", "broken"))
        drive(resolved, whole)
        if problem := _killed(resolved, broken):
            return Survival(False, problem)
        drive(resolved, broken, resuming=True)
        return _compare(whole, broken)


def _killed(resolved: Resolved, folder: RunFolder) -> str:
    """Run in a child process that kills itself; what went wrong, if it did not come to that."""
    child = os.fork()
    if child == 0:  # pragma: no cover - this process is killed
        try:
            torch.set_num_threads(1)  # before anything is computed: a forked child cannot use its parent's threads
            drive(resolved, folder, [KillAt(KILLED)])
        finally:
            os._exit(3)  # whatever happened: nothing of the parent may go on here
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        return f"the run ended by itself before update {KILLED}: {_last_line(folder.path / 'error.txt')}"
    newest = folder.newest()
    # any from before it will do: a new best score is saved besides, and puts the next regular checkpoint off
    if newest is None or not 0 < int(newest.name.rpartition("-")[2]) < KILLED:
        return (
            f"the run killed after update {KILLED} left {newest.name if newest else 'no checkpoint'}, expected one from before it"
        )
    return ""


def _last_line(path: Path) -> str:
    return (path.read_text(encoding="utf-8").strip().splitlines() or [""])[-1] if path.exists() else "no error was written"


def _compare(whole: RunFolder, broken: RunFolder) -> Survival:
    wanted, found = (_metrics(f) for f in (whole, broken))
    if len(wanted) != len(found):
        return Survival(False, f"the resumed run has {len(found)} lines of metrics, the undisturbed one {len(wanted)}")
    for a, b in zip(wanted, found, strict=True):
        if differing := sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)):
            return Survival(
                False, f"{differing[0]} after update {a.get('update')} is {b.get(differing[0])}, was {a.get(differing[0])}"
            )
    states = [f.load_checkpoint("last") for f in (whole, broken)]
    for entry in ("policy", "updates", "memory", "supply", "rounds", "streams", "collector"):
        if place := difference(states[0].get(entry), states[1].get(entry), entry):
            return Survival(False, f"{place} at the end differs from the undisturbed run")
    return Survival(True)


def _metrics(folder: RunFolder) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in folder.metrics_path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def difference(a: State | Any, b: State | Any, path: str) -> str:
    """The first place where two trees differ in any bit; empty if they do not."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return path
        return next((d for k in a if (d := difference(a[k], b[k], f"{path}.{k}"))), "")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
        return "" if same else path
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return "" if np.array_equal(a, b) else path
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return path
        return next((d for k, (x, y) in enumerate(zip(a, b, strict=True)) if (d := difference(x, y, f"{path}.{k}"))), "")
    return "" if a == b or (a != a and b != b) else path


__all__ = ["Survival", "check", "difference"]
