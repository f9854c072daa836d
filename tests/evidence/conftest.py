"""Synthetic metrics and run folders."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def healthy(n: int, *, control: bool = False) -> list[dict[str, Any]]:
    """Metrics of a run that goes well: performance rises, entropy falls slowly, everything else stays calm."""
    draw = random.Random(0)
    lines = []
    for i in range(1, n + 1):
        x = i / n
        level = 0.4 + 0.45 / (1 + math.exp(-8 * (x - 0.4)))
        line: dict[str, Any] = {
            "update": i, "decisions": i * 2048, "tokens": i * 4096, "seconds": i * 0.4, "entropy": 0.9 * math.exp(-1.2 * x),
            "kl_old": 0.002, "kl_ref": 0.3 * x, "clip_pos": 0.03, "clip_neg": 0.04 * (1 - x / 9), "sampler_gap": 1e-6,
             "grad_norm": 0.5 + draw.random(),
            "ratio_q01": 0.8, "ratio_q50": 1.0, "ratio_q99": 1.2 + x / 50,
             "ratio_max": 1.9, "lr": 1e-3, "loss": 0.1, "loss/surrogate": 0.1,
            "skipped": 0.0, "seconds_collect": 0.2, "seconds_update": 0.2,
        }  # fmt: skip
        if control:
            line |= {"episode_return": 20 + 400 * x, "explained_variance": 0.5 * x, "loss/critic": 3.0}
        else:
            line |= {"accuracy": level, "reward": level, "reward/correct": level, "reward/form": 0.9, "length": 9 + x}
            line |= {"truncated": 0.05, "dead_groups": 0.3}
        if i % max(n // 10, 1) == 0:
            line["eval_score"] = line["episode_return"] if control else level
        lines.append(line)
    return lines


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes a run folder from lines of metrics (numbers of updates: healthy ones)."""

    def make(lines: list[dict[str, Any]] | int = 60, *, control: bool = False, **summary: Any) -> Path:
        folder = tmp_path / "run"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        rows = healthy(lines, control=control) if isinstance(lines, int) else lines
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        task = "gym:CartPole-v1" if control else "text:spell_backward"
        (folder / "config.yaml").write_text(f"method: grpo\ntask: {task}\nseed: 3\ncollect:\n  prompts: 16\n  stop: []\n")
        facts: dict[str, Any] = {
            "method": "grpo", "task": task, "seed": 3, "status": "done", "updates": len(rows), "decisions": len(rows) * 2048,
            "tokens": len(rows) * 4096, "seconds": len(rows) * 0.4, "eval_score_initial": 0.41, "eval_score": 0.85,
            "peak_rss": 812_000_000, "versions": {"polopt": "0.1.0", "torch": "2.13.0", "gpu": None},
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(facts | summary))
        return folder

    return make


@pytest.fixture
def healthy_lines() -> Callable[..., list[dict[str, Any]]]:
    """Metrics of a run that goes well."""
    return healthy
