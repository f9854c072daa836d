"""What a comparison found, as plain values: runs with their curves, and the comparison that holds them.

The scheduler writes run folders, `read.py` reads them into these, `analysis.py` weighs them, `page.py` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from polopt.evidence.compare.entries import plain

#: done: its budget is spent and its score is a number. failed: it crashed, or its score is not a number. unfinished: it was
#: interrupted or killed, or never began, and would be continued by the same command.
Status = Literal["done", "failed", "unfinished"]


@dataclass(frozen=True)
class RunResult:
    """One seed of one contestant.

    spent [N] and score [N]: budget spent (in the comparison's unit) and the metric at each evaluation, the one before training
    included at 0 where there is one; scores that are not finite stay as they came.
    """

    contestant: str
    seed: int
    status: Status
    folder: Path
    spent: Float[np.ndarray, " N"]
    score: Float[np.ndarray, " N"]
    decisions: float | None = None
    updates: float | None = None
    seconds: float | None = None  # of training, evaluations apart
    wall_seconds: float | None = None  # of the whole process
    peak_rss: int | None = None  # bytes
    seconds_at: Float[np.ndarray, " N"] | None = None  # training seconds at each evaluation
    decisions_at: Float[np.ndarray, " N"] | None = None
    error: str = ""  # the last line of the traceback, or why the run does not count
    weights: str | None = None  # fingerprint of the parameters before training
    versions: Mapping[str, Any] = field(default_factory=dict)  # as in summary.json, with commit and hardware


@dataclass(frozen=True)
class Contestant:
    """What was compared: a name, what it is in words, and how it differs from the library's defaults."""

    name: str
    method: str = ""  # the method's name; empty for an external program
    title: str = ""
    command: str = ""  # of an external program
    settings: Mapping[str, Any] = field(default_factory=dict)  # its own, by dotted path
    tuned: Mapping[str, Any] = field(default_factory=dict)  # found by tuning, by dotted path
    trials: int = 0  # settings that tuning tried; where it found none that is better, the preset stays

    @property
    def tuning(self) -> str:
        """What came out of tuning, in words; empty without any."""
        words = ", ".join(f"{k} = {plain(v)}" for k, v in self.tuned.items())
        if not words and self.trials:
            words = f"the preset stays, the best of {self.trials} setting{'s' * (self.trials > 1)}"
        return f"{self.name} tuned: {words}" if words else ""


@dataclass(frozen=True)
class Comparison:
    """Contestants on one task at equal budget, with everything needed to repeat and to judge it."""

    task: str
    budget: float
    unit: str  # decisions, updates, tokens or seconds
    metric: str  # "eval_score" unless asked otherwise
    higher_is_better: bool
    seeds: tuple[int, ...]
    contestants: tuple[Contestant, ...]
    runs: tuple[RunResult, ...]
    baseline: str | None = None  # compare everything with this one only; None: all pairs
    settings: Mapping[str, Any] = field(default_factory=dict)  # given for all contestants
    command: str = ""  # repeats the comparison
    folder: Path | None = None
    episodes: int | None = None  # per evaluation
    jobs: int | None = None  # runs side by side
    notes: tuple[str, ...] = ()  # damage found, runs set aside, ...

    def of(self, contestant: str) -> dict[int, RunResult]:
        """Runs of a contestant by seed."""
        return {r.seed: r for r in self.runs if r.contestant == contestant}


__all__ = ["Comparison", "Contestant", "RunResult", "Status"]
