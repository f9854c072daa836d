"""Learns LPO's drift by evolution strategies, and writes it with its provenance: the drift that polopt ships came from

    python benchmarks/learn_drift.py --out src/polopt/assets/drift/cartpole.safetensors

Each candidate trains a policy from scratch on CartPole with many large steps per batch, where the plain ratio without any drift
breaks down. Afterwards the learnt drift is held against the plain ratio, PPO's clip and the closed form on seeds that the search
did not see, on the task it was learnt on and on others. The numbers are written beside the weights as they came out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from polopt.loops.search import OpenES, Search, Trial
from polopt.method import Method
from polopt.parts.surrogate.clip import Clip
from polopt.parts.surrogate.drift import DiscoveredDrift
from polopt.parts.surrogate.learnt_drift import LearntDrift, untrained
from polopt.parts.surrogate.score import Ratio
from polopt.registry import get_method
from polopt.run import environment

HARD: dict[str, Any] = {
    "budget": "6k-decisions", "collect.envs": 16, "collect.steps": 32, "minibatch": 256, "epochs": 10, "lr": 1e-2,
    "evaluate.episodes": 16,
}  # fmt: skip
#: Where the result is tried: task and what differs there. The last ones were never seen by the search.
TRIED = {
    "gym:CartPole-v1": {},
    "gym:CartPole-v1, twice as long": {"budget": "12k-decisions"},
    "gym:Acrobot-v1": {"budget": "16k-decisions", "collect.steps": 64, "lr": 3e-3},
    "gym:Pendulum-v1": {"budget": "16k-decisions", "collect.steps": 64, "lr": 3e-3},
}
SEEDS = range(1000, 1010)


def compared(method: Method, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Final held-out scores by task and surrogate, over seeds that the search did not use."""
    others = {"ratio": Ratio(), "clip": Clip(), "discovered-drift": DiscoveredDrift()}
    found: dict[str, Any] = {}
    for name, changes in TRIED.items():
        task, settings = name.partition(",")[0], {**HARD, **changes}
        scores = {}
        learnt = Trial(method, task, settings)
        scores["learnt-drift"] = [learnt(learnt.flat(weights), s) for s in SEEDS]
        for key, part in others.items():
            plain = Trial(method.but(key, surrogate=part), task, settings)
            scores[key] = [plain(torch.zeros(0), s) for s in SEEDS]
        found[name] = {k: {"mean": round(statistics.mean(v), 2), "scores": [round(x, 2) for x in v]} for k, v in scores.items()}
        print(name, {k: v["mean"] for k, v in found[name].items()}, flush=True)
    return found


def main() -> None:
    """Search, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generations", type=int, default=40)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--sigma", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=0.03)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(untrained(options.seed), str(options.out))
    method = get_method("ppo").but("lpo-search", surrogate=LearntDrift(weights=str(options.out)))
    trial = Trial(method, "gym:CartPole-v1", HARD)
    how = OpenES(population=options.population, sigma=options.sigma, lr=options.lr)
    search = Search(how.start(trial.flat(untrained(options.seed)), options.seed), trial, options.seed)
    phi = search.run(options.generations, [lambda row: print({k: round(v, 3) for k, v in row.items()}, flush=True)])
    searched = time.time() - began
    weights = trial.place(phi)
    save_file(weights, str(options.out))
    about = {
        "what": "the drift of LPO (arXiv 2210.05639), learnt by evolution strategies",
        "command": "python benchmarks/learn_drift.py "
        + " ".join(f"--{k} {getattr(options, k)}" for k in ("seed", "generations", "population", "sigma", "lr")),
        "task": trial.task, "settings": HARD, "fitness": "held-out score at the end of a run from scratch",
        "runs": options.generations * options.population, "seconds": round(searched), "history": search.history,
        "compared": compared(method, weights), "compared_seeds": [SEEDS.start, SEEDS.stop - 1], "versions": environment(),
    }  # fmt: skip
    options.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
