"""Seconds per GRPO step of TRL, and peak memory."""

import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(2)
sys.path.insert(0, str(Path(__file__).parent))
from datasets import Dataset  # noqa: E402
from tiny_qwen import GROUP, NEW_TOKENS, PROMPTS, digits, model, prompts, tokenizer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

ends: list[float] = []
lengths: list[float] = []


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        ends.append(time.perf_counter())


def reward(completions: list[str], completion_ids: Any = None, **columns: Any) -> list[float]:
    """The shared reward; also notes lengths."""
    lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
    return digits(completions)


with tempfile.TemporaryDirectory() as place:
    config = GRPOConfig(
        output_dir=place, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, temperature=1.0, beta=0.0,
        max_completion_length=NEW_TOKENS, max_steps=12, use_cpu=True, bf16=False, gradient_checkpointing=False,
        learning_rate=1e-4, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model(), reward_funcs=reward, args=config, processing_class=tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": prompts(600)}),
    )  # fmt: skip
    trainer.add_callback(Clock())
    trainer.train()
times = [b - a for a, b in itertools.pairwise(ends)]
print(
    json.dumps(
        {
            "value": round(statistics.median(times[2:]), 3), "unit": "s/step",
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
            "length": round(statistics.mean(lengths), 1),
        }
    )
)  # fmt: skip
