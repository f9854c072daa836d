"""Seconds of a whole cold run of 100,000 CartPole steps, from the start of the process."""

import json
import os
import sys
import time

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

torch.set_num_threads(1)
model = PPO("MlpPolicy", make_vec_env(sys.argv[1], n_envs=8, seed=0), n_steps=256, batch_size=64, n_epochs=10, seed=0, device="cpu")
model.learn(100_000)
score, _ = evaluate_policy(model, make_vec_env(sys.argv[1], seed=1), n_eval_episodes=8)
with open("/proc/self/stat") as f:
    started = int(f.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
print(json.dumps({"value": round(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 2), "unit": "s", "score": float(score)}))
