"""Share of the tokens that a language model computes which are padding, or decode rows that are finished.

`text:spell_backward` as GRPO trains on it, and completions of heavy-tailed lengths (1 to 200 tokens, median 22). Counted are
prompts, completions in training passes, and steps of decoding, by what enters the layers of the fast engine.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from polopt.batch import Batch
from polopt.loops.improve import Improve
from polopt.overrides import resolve
from polopt.policies.lm import fast
from polopt.policies.lm.prompts import pad_left

computed = {"prompts": 0, "completions": 0, "decoding": 0}


def counted(owner: Any, name: str, kind: str, size: Callable[..., int]) -> None:
    """Count what a method of the engine is given."""
    inner = getattr(owner, name)

    def outer(self: Any, *args: Any) -> Any:
        computed[kind] += size(*args)
        return inner(self, *args)

    setattr(owner, name, outer)


def completions(*args: Any) -> int:
    """Tokens of completions that are read: all but the last of each row."""
    action: torch.Tensor = args[-1]
    return action.shape[0] * (action.shape[1] - 1)


counted(fast.FastEngine, "_read", "prompts", lambda ids, mask: ids.numel())
counted(fast.FastEngine, "_completions", "completions", completions)
counted(fast._FastDecoding, "step", "decoding", len)


def share(real: dict[str, int]) -> dict[str, float]:
    """Share of padding by kind and in all; the counts start anew."""
    found = {k: round(1 - real[k] / computed[k], 3) for k in real}
    found["all"] = round(1 - sum(real.values()) / sum(computed[k] for k in real), 3)
    computed.update(dict.fromkeys(computed, 0))
    return found


def spell() -> dict[str, float]:
    """Two iterations of GRPO: sampling, reference and training passes."""
    resolved = resolve("grpo", "text:spell_backward", {"budget": "99-updates", "threads": 1})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    real = dict.fromkeys(computed, 0)
    evaluate, generate = run.policy._evaluate, run.policy.generate

    def evaluated(batch: Batch, want: Any, view: Any) -> Any:
        known = batch.context["prompt_mask"]
        distinct = torch.unique(torch.where(known, batch.context["prompt"] + 1, 0), dim=0)
        real["prompts"] += int((distinct > 0).sum())
        real["completions"] += int((batch.mask.sum(1) - 1).clamp(min=0).sum())
        return evaluate(batch, want, view)

    def generated(prompts: Any, *args: Any, **named: Any) -> Any:
        drawn = generate(prompts, *args, **named)
        real["prompts"] += sum(map(len, prompts))
        real["decoding"] += int((drawn.mask.sum(1) - 1).clamp(min=0).sum())
        return drawn

    run.policy._evaluate, run.policy.generate = evaluated, generated
    for _ in range(2):
        run.step()
    run.collector.close()
    return share(real)


def heavy() -> dict[str, float]:
    """256 rows, 32 prompts of 4 to 40 tokens, log-normal lengths."""
    resolved = resolve("grpo", "text:spell_backward", {"budget": "99-updates", "threads": 1, "collect.max_new_tokens": 200})
    policy = Improve(resolved.method, resolved.task, resolved.settings).policy
    g = torch.Generator().manual_seed(0)
    lengths = (3.1 + 1.0 * torch.randn(256, generator=g)).exp().long().clamp(1, 200)
    prompts = [torch.randint(3, 30, (n,), generator=g).tolist() for n in torch.randint(4, 41, (32,), generator=g).tolist()]
    spread = torch.arange(256) // 8
    ids, known = pad_left(prompts, 0)
    start = time.perf_counter()
    policy.backbone.tokenizer.eos_token_id = None  # only the limits end a row
    policy.backbone.causal.generation_config.eos_token_id = 10**6
    drawn = policy.generate(prompts, spread, g, limits=lengths)
    generated = time.perf_counter()
    batch = Batch(mask=drawn.mask, action=drawn.action, context={"prompt": ids[spread], "prompt_mask": known[spread]})
    policy.evaluate(batch, frozenset({"logp"}))["logp"].sum().backward()
    done = time.perf_counter()
    real = {"prompts": 2 * sum(map(len, prompts)), "completions": int((lengths - 1).sum()), "decoding": int((lengths - 1).sum())}
    return {**share(real), "seconds_generating": round(generated - start, 2), "seconds_training": round(done - generated, 2)}


found = {"spell_backward": spell(), "heavy-tailed": heavy()}
print(json.dumps({"value": max(f["all"] for f in found.values()), "unit": "share of computed tokens, worst", **found}))
