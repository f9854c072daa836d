"""The runs of compare_polopt.py, each by a `polopt train` of its own, as many side by side as there are cores."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

methods, budget, seeds = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3])
SAME = ["--evaluate.points", "10", "--evaluate.episodes", "20", "--checkpoint.keep", "1", "--threads", "1"]


def train(job: tuple[str, int], place: str) -> None:
    method, seed = job
    words = [sys.executable, "-m", "polopt", "train", method, "gym:CartPole-v1", "--budget", budget, "--seed", str(seed), *SAME]
    out = str(Path(place) / f"{method}-{seed}")
    subprocess.run([*words, "--out", out, "--quiet", "--no-report"], check=True, stdout=subprocess.DEVNULL)


with tempfile.TemporaryDirectory() as place:
    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda job: train(job, place), [(m, s) for s in range(seeds) for m in methods]))
    wall = time.perf_counter() - start
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"value": round(wall, 1), "unit": "s", "cpu": round(used.ru_utime + used.ru_stime, 1)}))
