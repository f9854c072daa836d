"""Comparisons from outside: a plain script, signals, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

#: No main guard; the part is defined in the script itself.
SCRIPT = """
from dataclasses import dataclass
import polopt
from polopt.parts.advantage.gae import GAE
from polopt.methods.onpolicy.ppo import PPO

print("started")

@dataclass(frozen=True)
class Louder(GAE):
    factor: float = 2.0
    def __call__(self, batch):
        return self.factor * super().__call__(batch)

found = polopt.compare(
    {"louder": PPO.but("louder", advantage=Louder()), "ppo": "ppo"}, "gym:CartPole-v1", budget="2-updates", seeds=2, out="out",
    collect__envs=2, collect__steps=16, policy__hidden="8", evaluate__episodes=2, points=2,
)
assert [r.status for r in found.comparison.runs] == ["done"] * 4, found.comparison.runs
assert found.page.exists()
print(found)
"""


def test_a_plain_script_without_a_main_guard(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started") == 1  # no process imported the script again
    assert "louder" in done.stdout
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"plan.json", "index.html", "comparison.json", "runs", "worker.log"} <= names
    assert (tmp_path / "out/worker.log").read_text() == ""
    assert not list(tmp_path.rglob("*.pkl"))


def running(folder: Path) -> list[int]:
    """Processes of runs whose log is in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{folder}/out/runs/" in os.readlink(entry / "fd/1"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_children_save_and_end_with_the_comparison(tmp_path: Path, number: signal.Signals) -> None:
    words = [
        sys.executable, "-m", "polopt", "compare", "a2c", "--task", "gym:CartPole-v1", "--seeds", "2", "--budget", "10M-decisions",
        "--out", "out", "--collect.envs", "2", "--collect.steps", "16", "--episodes", "1", "--jobs", "2",
        "--optim.compile", "never",
    ]  # fmt: skip
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            check(process, tmp_path, number)
        finally:
            process.kill()


def check(process: subprocess.Popen[str], place: Path, number: signal.Signals) -> None:
    """Let the runs begin, send the signal, see that all ends."""
    metrics = [place / f"out/runs/a2c/s{s}/metrics.jsonl" for s in (0, 1)]
    limit = time.monotonic() + 90
    while time.monotonic() < limit and not all(m.exists() for m in metrics):
        assert process.poll() is None
        time.sleep(0.05)
    assert len(running(place)) == 2
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert "continue with: polopt compare a2c --task gym:CartPole-v1" in err
    while time.monotonic() < limit and running(place):
        time.sleep(0.05)
    assert running(place) == []
    for m in metrics:
        assert json.loads((m.parent / "summary.json").read_text())["status"] == "interrupted"  # they saved
        assert len(list((m.parent / "checkpoints").glob("update-*"))) >= 1
