"""Speed and memory against the peers, interleaved in one run: `make bench`, or `python benchmarks ppo grpo linear long`.

Every contender is a process of its own; contenders of one benchmark take turns (A B C A B C ...), so that a machine whose
speed drifts drifts for all. What counts are the ratios to the named peer. Peers run under PEER_PYTHON, an environment
that holds them (benchmarks/requirements.txt); contenders that are not installed there are left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORKERS = HERE / "workers"

CARTPOLE = ["CartPole-v1", "8", "2048", "64", "10"]  # environments, steps per environment x8, minibatch, epochs
CHEETAH = ["HalfCheetah-v5", "8", "2048", "64", "10"]
BENCHMARKS: dict[str, dict[str, Any]] = {
    "ppo-cartpole": {
        "args": CARTPOLE,
        "contenders": ["ppo_polopt", "ppo_peer:stable_baselines3", "ppo_peer:sbx"],
        "threads": 1,
        "higher": True,
    },
    "ppo-cheetah": {
        "args": CHEETAH,
        "contenders": ["ppo_polopt", "ppo_peer:stable_baselines3", "ppo_peer:sbx"],
        "threads": 1,
        "higher": True,
    },
    "ppo-cold": {"args": ["CartPole-v1"], "contenders": ["cold_polopt", "cold_sb3"], "threads": 1, "higher": False},
    "grpo": {"args": ["fast"], "contenders": ["grpo_polopt", "grpo_trl"], "threads": 2, "higher": False},
    "grpo-general": {"args": ["general"], "contenders": ["grpo_polopt", "grpo_trl"], "threads": 2, "higher": False},
    "linear": {"args": [], "contenders": ["linear"], "threads": 1, "higher": False},
    "long": {"args": [], "contenders": ["long"], "threads": 1, "higher": False},
    "compare": {
        "args": ["ppo,a2c,trpo,reinforce-baseline", "50k-decisions", "5"],
        "contenders": ["compare_polopt", "apart_polopt"],
        "threads": 1,
        "higher": False,
    },
    "updates-control": {"args": ["control", "eager"], "contenders": ["updates"], "threads": 1, "higher": False},
    "updates-compiled": {"args": ["control", "compiled"], "contenders": ["updates"], "threads": 1, "higher": False},
    "updates-text": {"args": ["text", "eager"], "contenders": ["updates"], "threads": 1, "higher": False},
    "overhead": {"args": [], "contenders": ["overhead"], "threads": 1, "higher": False},
    # 16 x 512 tokens, 50,000 symbols, a model of width 64, chunks of 671 tokens
    "vocabulary": {
        "args": ["16", "512", "50000", "64", str(1 << 25)],
        "contenders": ["vocabulary"],
        "threads": 1,
        "higher": False,
    },
    "padding": {"args": [], "contenders": ["padding"], "threads": 1, "higher": False},
    "replay": {"args": [], "contenders": ["replay"], "threads": 1, "higher": False},
    # HalfCheetah, batch 256, layers of 256 and 256, one update per step: method, steps, threads, how
    **{
        f"{method}-{how}-{threads}": {
            "args": [method, "960", str(threads), how],
            "threads": threads,
            "higher": False,
            "contenders": ["replay_polopt", "replay_peer:stable_baselines3", *(["replay_peer:sbx"] if method != "ddpg" else [])],
        }
        for method in ("sac", "td3", "ddpg")
        for how in ("eager", "compiled")
        for threads in (1, 2)
    },
}


def run(contender: str, args: list[str], threads: int, peer_python: str) -> dict[str, Any]:
    """One run of one contender (`worker` or `worker:first-argument`): the JSON object on its last line."""
    worker, _, first = contender.partition(":")
    args = [first, *args] if first else args
    ours = worker.endswith("polopt") or worker in ("linear", "vocabulary", "padding", "long", "overhead", "replay", "updates")
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    python = sys.executable if ours else peer_python
    done = subprocess.run(
        [python, str(WORKERS / f"{worker}.py"), *args], env=env, capture_output=True, text=True, timeout=1800, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def benchmark(name: str, rounds: int, peer_python: str) -> dict[str, Any]:
    """All rounds of one benchmark, contenders in turn; medians and ratios of the first contender to the others."""
    spec = BENCHMARKS[name]
    rows: dict[str, list[dict[str, Any]]] = {c: [] for c in spec["contenders"]}
    for i in range(rounds):
        for contender in spec["contenders"]:
            if rows[contender] and "failed" in rows[contender][0]:
                continue
            found = run(contender, spec["args"], spec["threads"], peer_python)
            rows[contender].append(found)
            print(f"  {name} round {i + 1} {contender}: {found}", flush=True)
    out: dict[str, Any] = {"rows": rows}
    mine = rows[spec["contenders"][0]]
    for peer in spec["contenders"][1:]:
        theirs = rows[peer]
        if not theirs or "failed" in theirs[0] or "failed" in mine[0]:
            continue
        pairs = zip(mine, theirs, strict=False)
        ratios = [a["value"] / b["value"] if spec["higher"] else b["value"] / a["value"] for a, b in pairs]
        out[f"times as fast as {peer}"] = round(statistics.median(ratios), 2)
        if "peak_mb" in mine[0] and "peak_mb" in theirs[0]:
            memory = [a["peak_mb"] / b["peak_mb"] for a, b in zip(mine, theirs, strict=False)]
            out[f"memory relative to {peer}"] = round(statistics.median(memory), 2)
    return out


def main() -> None:
    """Run the named benchmarks (default: all) and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"prefixes of {', '.join(BENCHMARKS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.json"))
    options = parser.parse_args()
    names = [n for n in BENCHMARKS if not options.names or any(n.startswith(p) for p in options.names)]
    if not names:
        parser.error(f"no benchmark starts with {options.names}; known: {', '.join(BENCHMARKS)}")
    peer_python = os.environ.get("PEER_PYTHON", sys.executable)
    results = {n: benchmark(n, options.rounds, peer_python) for n in names}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    for n, found in results.items():
        print(n, {k: v for k, v in found.items() if k != "rows"})


if __name__ == "__main__":
    main()
