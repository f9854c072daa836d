"""Seconds of a whole cold run of 100,000 CartPole steps, from the start of the process: imports and compilation included."""

import json
import os
import shutil
import sys
import tempfile
import time

cache = tempfile.mkdtemp()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # cold: no compiled code from earlier runs

import polopt  # noqa: E402

settings = {"collect.envs": 8, "collect.steps": 256, "minibatch": 64, "epochs": 10, "evaluate.episodes": 8}
run = polopt.train("ppo", f"gym:{sys.argv[1]}", budget="100k-decisions", out=False, overrides=settings)
with open("/proc/self/stat") as f:
    started = int(f.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - started
shutil.rmtree(cache, ignore_errors=True)
print(json.dumps({"value": round(seconds, 2), "unit": "s", "score": run.summary["eval_score"]}))
