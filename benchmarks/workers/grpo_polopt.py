"""Seconds per GRPO step of polopt, and peak memory: fast | general."""

import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from tiny_qwen import GROUP, NEW_TOKENS, PROMPTS, digits, model, prompts, tokenizer

from polopt.loops.improve import Improve
from polopt.overrides import resolve

how = sys.argv[1]
steps = 12
with tempfile.TemporaryDirectory() as place:
    folder, data = Path(place) / "model", Path(place) / "prompts.jsonl"
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in dict.fromkeys(prompts(600))))
    settings = {
        "budget": "1000-updates", "threads": 2, "policy.model": str(folder), "options.reward": digits, "group_size": GROUP,
        "collect.prompts": PROMPTS, "collect.max_new_tokens": NEW_TOKENS, "penalty": "none", "lr": 1e-4,
        "policy.engine": "general" if how == "general" else "fast", "evaluate.episodes": 2,
        "optim.compile": "never",
    }  # fmt: skip
    resolved = resolve("grpo", f"data:{data}", settings)
    run = Improve(resolved.method, resolved.task, resolved.settings)
    times, lengths = [], []
    for _ in range(steps):
        start = time.perf_counter()
        metrics = run.step()
        times.append(time.perf_counter() - start)
        lengths.append(metrics["length"])
    run.collector.close()
print(
    json.dumps(
        {
            "value": round(statistics.median(times[3:]), 3), "unit": "s/step",
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
            "length": round(statistics.mean(lengths), 1), "first_s": round(times[0], 1),
        }
    )
)  # fmt: skip
