"""Peak memory of statistics of tokens, with gradient, over that of the model's hidden states, in units of one chunk's logits.

Arguments: rows, tokens, vocabulary, width of the model, elements of a chunk. Two processes are measured, one of which stops at the
hidden states. The peak is that of resident memory (Linux), counted from when the model is loaded.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROWS, TOKENS, VOCABULARY, WIDTH, CHUNK = (int(x) for x in sys.argv[1:6])
NAMES = ("logp", "entropy", "proxy_logp(0.02)", "proxy_kl(0.02)")


def peak() -> int:
    """Largest resident memory since it was last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(whole: bool) -> dict[str, float]:
    """Resident memory at the peak of one forward and backward pass, and its seconds."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from polopt.batch import Batch
    from polopt.policies.lm import LMPolicy, wrap

    class Tokenizer:
        """Prompts are given as ids: only the special ones are asked for."""

        pad_token_id, eos_token_id = 0, 1

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=TOKENS + 16, tie_word_embeddings=True,
    )  # fmt: skip
    policy = LMPolicy(wrap(Qwen2ForCausalLM(config), Tokenizer()), max_new_tokens=TOKENS, chunk=CHUNK)
    for p in policy.backbone.module.parameters():
        p.grad = torch.zeros_like(p)
    prompt = torch.randint(2, VOCABULARY, (ROWS, 8))
    action = torch.randint(2, VOCABULARY, (ROWS, TOKENS))
    mask = torch.ones_like(action, dtype=torch.bool)
    batch = Batch(mask=mask, action=action, context={"prompt": prompt, "prompt_mask": torch.ones_like(prompt, dtype=torch.bool)})
    few = replace(batch.rows(slice(0, 1)), mask=mask[:1] & (torch.arange(TOKENS) < 8))
    policy.evaluate(few, frozenset({"logp"}))["logp"].sum().backward()  # what libraries load in a first pass is not counted
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    if whole:
        found = policy.evaluate(batch, frozenset(NAMES))
        torch.stack([v.mean() for v in found.values() if v.requires_grad]).sum().backward()
    else:
        policy.engine.hidden(prompt, batch.context["prompt_mask"], action).square().mean().backward()
    return {"peak": peak(), "seconds": time.perf_counter() - start}


if len(sys.argv) > 6:
    print(json.dumps(measure(sys.argv[6] == "whole")))
else:
    found = {}
    for mode in ("hidden", "whole"):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:6], mode], capture_output=True, text=True, check=True)
        found[mode] = json.loads(done.stdout.splitlines()[-1])
    unit = 4 * VOCABULARY * min(ROWS * TOKENS, CHUNK // VOCABULARY)
    print(
        json.dumps(
            {
                "value": round((found["whole"]["peak"] - found["hidden"]["peak"]) / unit, 2), "unit": "x one chunk's logits",
                "chunk_mb": round(unit / 1e6), "all_logits_mb": round(4e-6 * ROWS * TOKENS * VOCABULARY),
                "hidden_mb": round(found["hidden"]["peak"] / 1e6), "whole_mb": round(found["whole"]["peak"] / 1e6),
                "seconds": round(found["whole"]["seconds"], 1),
            }
        )
    )  # fmt: skip
