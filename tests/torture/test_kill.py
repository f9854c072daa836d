"""Kill runs of both domains with SIGKILL at random moments, also while saving: the end result never differs.

`make torture` kills KILLS=100 times in all; the test suite does a handful (`test_a_handful`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from polopt.run import RunFolder
from polopt.tree import load_tree

COMMON = ["--checkpoint.every", "1", "--evaluate.episodes", "2", "--threads", "1", "--quiet", "--no-report"]
RUNS = {
    "control": [
        "ppo", "gym:CartPole-v1", "--budget", "150-updates", "--collect.envs", "2", "--collect.steps", "32",
        "--policy.hidden", "8", "--minibatch", "32", "--epochs", "2",
    ],
    "text": [
        "grpo", "text:spell_backward", "--budget", "40-updates", "--collect.prompts", "2", "--group_size", "2",
        "--collect.max_new_tokens", "4", "--evaluate.every", "5",
    ],
}  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "polopt", *words]


def numbers(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def torture(domain: str, kills: int, tmp_path: Path, seed: int) -> None:
    """Run once undisturbed; then again with `kills` kills; compare."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    started = time.monotonic()
    subprocess.run(command("train", *RUNS[domain], *COMMON, "--out", str(whole)), check=True, env=env, timeout=300)
    length = time.monotonic() - started
    rng = random.Random(seed)
    words = command("train", *RUNS[domain], *COMMON, "--out", str(broken))
    done = 0
    for _ in range(kills * 20):
        process = subprocess.Popen(words, env=env, start_new_session=True)
        # wait for the run to begin, so that kills fall into training and saving rather than into imports
        before = progress(broken)
        limit = time.monotonic() + 120
        while process.poll() is None and progress(broken) == before and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02 * length))
        if (broken / "config.yaml").exists():
            words = command("resume", str(broken), "--quiet", "--no-report")
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            for checkpoint in RunFolder(broken).all_checkpoints():
                load_tree(checkpoint)  # every checkpoint that has its name is whole
        elif process.returncode == 0:
            break
        else:
            raise AssertionError(f"the run failed by itself with status {process.returncode}")
        if done == kills:
            subprocess.run(words, check=True, env=env, timeout=300)
            break
    assert json.loads((broken / "summary.json").read_text())["status"] == "done"
    assert numbers(broken) == numbers(whole)
    mine, other = (load_tree(RunFolder(f).load_path("last"))[0]["policy"] for f in (broken, whole))
    assert str(mine) == str(other)
    assert done > 0


def progress(folder: Path) -> tuple[int, int]:
    """Number of checkpoints and the newest one's, to see that a process has begun to work."""
    found = RunFolder(folder).all_checkpoints()
    return len(found), int(found[-1].name.rpartition("-")[2]) if found else -1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("domain", RUNS)
def test_a_handful(domain: str, tmp_path: Path) -> None:
    torture(domain, 2, tmp_path, seed=0)


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("domain", RUNS)
def test_many(domain: str, tmp_path: Path) -> None:
    torture(domain, int(os.environ.get("KILLS", "100")) // 2, tmp_path, seed=1)
