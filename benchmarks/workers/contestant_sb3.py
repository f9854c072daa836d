"""Stable-Baselines3's PPO as a contestant of `polopt compare`: writes OUT/metrics.jsonl with scores on held-out seeds.

polopt compare ppo --task gym:CartPole-v1 --seeds 5 --budget 50k-decisions --external \\
  "sb3-ppo=python benchmarks/workers/contestant_sb3.py --task {task} --seed {seed} --decisions {decisions} --out {out}"
"""

import argparse
import json
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

HELD_OUT = 2**31  # where polopt's held-out start seeds begin


class Score(BaseCallback):
    """Scores the policy before training, at even shares of the budget (after a rollout), and at the end."""

    def __init__(self, task: str, budget: int, points: int, episodes: int, out: Path) -> None:
        super().__init__()
        self.budget, self.points, self.episodes = budget, points, episodes
        self.envs = [gym.make(task) for _ in range(episodes)]
        self.file = (out / "metrics.jsonl").open("w")
        self.seconds, self.mark, self.due = 0.0, time.perf_counter(), 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:  # the update of the rollout before is done
        if self.num_timesteps * self.points >= self.due * self.budget:
            self.score()

    def score(self) -> None:
        """Mean return of greedy episodes from the held-out seeds, all stepped together."""
        self.seconds += time.perf_counter() - self.mark
        self.due = int(self.num_timesteps * self.points / self.budget) + 1
        obs = np.stack([env.reset(seed=HELD_OUT + i)[0] for i, env in enumerate(self.envs)])
        going, total = np.ones(self.episodes, dtype=bool), np.zeros(self.episodes)
        while going.any():
            actions, _ = self.model.predict(obs, deterministic=True)
            for i in going.nonzero()[0]:
                obs[i], reward, terminated, truncated, _ = self.envs[i].step(actions[i])
                total[i] += reward
                going[i] = not (terminated or truncated)
        line = {"decisions": self.num_timesteps, "seconds": self.seconds, "eval_score": total.mean()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.mark = time.perf_counter()


def main() -> None:
    """Train and score."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--decisions", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = args.task.removeprefix("gym:")
    envs = make_vec_env(task, n_envs=8, seed=args.seed)
    # collection and optimisation as in polopt's preset, the rest as SB3 has it
    model = PPO(
        "MlpPolicy", envs, n_steps=128, batch_size=256, n_epochs=10, learning_rate=lambda left: 1e-3 * left,
        seed=args.seed, device="cpu",
    )  # fmt: skip
    score = Score(task, args.decisions, args.points, args.episodes, args.out)
    model.learn(args.decisions, callback=score)
    score.num_timesteps = model.num_timesteps
    score.score()


if __name__ == "__main__":
    main()
