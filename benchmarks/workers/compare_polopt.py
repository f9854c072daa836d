"""Twenty CartPole runs through `polopt compare`: wall time, and what comparing costs beside the runs' own processor time."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

methods, budget, seeds = sys.argv[1].split(","), sys.argv[2], sys.argv[3]
with tempfile.TemporaryDirectory() as place:
    out = Path(place) / "out"
    words = [sys.executable, "-m", "polopt", "compare", *methods, "--task", "gym:CartPole-v1", "--budget", budget]
    start = time.perf_counter()
    subprocess.run([*words, "--seeds", seeds, "--out", str(out), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    runs = [json.loads(p.read_text())["cpu_seconds"] for p in out.glob("runs/*/s*/run.json")]
used = resource.getrusage(resource.RUSAGE_CHILDREN)
total = used.ru_utime + used.ru_stime
print(
    json.dumps(
        {"value": round(wall, 1), "unit": "s", "runs": len(runs), "cpu": round(total, 1), "cpu_of_runs": round(sum(runs), 1)}
    )
)
