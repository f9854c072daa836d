"""Comparisons that never ran: curves with a known course, for tests of the page and for looking at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from polopt.evidence.compare.results import Comparison, Contestant, RunResult, Status

NASTY = '</script><script>alert("x")</script> & <b>$x_1$</b>'
NAMES = ("grpo", "dapo", "gspo", "dr-grpo", "cispo", "rloo", "ppo", "a2c", "trpo", "reinforce", "reinforce-baseline", "sb3 ppo")
VERSIONS = {
    "polopt": "0.1.0", "torch": "2.13.0", "numpy": "2.4.0", "python": "3.12.3", "commit": "1a297a7",
    "hardware": {"cpu": "Some Processor 9000", "cores": 2, "memory_gb": 16, "gpu": None},
}  # fmt: skip


def curve(level: float, speed: float, seed: int, points: int, noise: float) -> np.ndarray[Any, Any]:
    """A score that rises from 10 to about `level`."""
    draw = np.random.default_rng((seed, int(level * 10), points))
    x = np.linspace(0, 1, points)
    top = level + noise * draw.standard_normal()
    return (
        10 + (top - 10) / (1 + np.exp(-9 * (x - 0.4 / speed))) + 0.15 * noise * draw.standard_normal(points).cumsum() / points**0.5
    )


def comparison(
    contestants: int | tuple[str, ...] = 4,
    seeds: int = 5,
    *,
    points: int = 21,
    failing: dict[tuple[int, int], str] | None = None,
    nan: tuple[tuple[int, int], ...] = (),
    folder: Path = Path("/nowhere/comparison"),
    baseline: str | None = None,
    unit: str = "decisions",
    timed: bool = True,
    seeds_wanted: int | None = None,
    **changes: Any,
) -> Comparison:
    """contestants: how many of the usual names, or names. failing: (contestant, seed) -> error; nan: runs whose scores are NaN."""
    names = NAMES[:contestants] if isinstance(contestants, int) else contestants
    failing = failing or {}
    budget = 200_000.0
    runs = []
    for i, name in enumerate(names):
        for seed in range(seeds):
            score = curve(210 - 14 * i, 1.3 - 0.05 * i, seed, points, 18)
            spent = np.linspace(0, budget, points)
            status: Status = "done"
            error = ""
            if (i, seed) in failing:
                status, error = "failed", failing[i, seed]
                keep = points // 3 if error else 0
                status = "failed" if error else "unfinished"
                spent, score = spent[:keep], score[:keep]
            if (i, seed) in nan:
                status, error, score = "failed", "the last score is not a number", np.where(spent > budget / 2, np.nan, score)
            seconds = spent / (9000 + 700 * i)
            last = float(spent[-1]) if len(spent) else 0.0
            runs.append(
                RunResult(
                    name, seed, status, folder / "runs" / f"{i:02d}" / f"seed-{seed}", spent, score, decisions=last,
                    updates=last / 2048, seconds=float(seconds[-1]) if len(seconds) else None,
                    wall_seconds=float(seconds[-1]) * 1.2 + 2 if len(seconds) else None, peak_rss=(500 + 20 * i) * 1_000_000,
                    seconds_at=seconds if timed else None, decisions_at=spent, error=error, weights="abc", versions=VERSIONS,
                )
            )  # fmt: skip
    given = tuple(
        Contestant(n, method=n, title=f"Method {n.upper()}"[:40], settings={"lr": 3e-4} if i == 1 else {},
                   tuned={"entropy": 0.01} if i == 2 else {}, command="python sb3.py {seed}" if n.startswith("sb3") else "")
        for i, n in enumerate(names)
    )  # fmt: skip
    out: dict[str, Any] = {
        "task": "gym:CartPole-v1", "budget": budget, "unit": unit, "metric": "eval_score", "higher_is_better": True,
        "seeds": tuple(range(seeds_wanted or seeds)), "contestants": given, "runs": tuple(runs), "baseline": baseline,
        "settings": {"evaluate": {"points": points - 1}, "seeds": seeds}, "folder": folder, "episodes": 20, "jobs": 2,
        "command": f"polopt compare {' '.join(names)} --task gym:CartPole-v1 --seeds {seeds} --budget 200k-decisions",
    }  # fmt: skip
    return Comparison(**(out | changes))
