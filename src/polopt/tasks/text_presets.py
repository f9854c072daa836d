"""Settings under which the shipped tiny model learns a short text task, by what a method is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_preset(method: Any) -> Mapping[str, Any]:
    """Dotted settings for `method`: sizes of an iteration, learning rate, threads; only fields that the method has."""
    chosen: dict[str, Any] = {
        "threads": 2,
        "collect.prompts": 32,
        "collect.max_new_tokens": 16,
        "evaluate.every": 10,
        "evaluate.episodes": 256,
    }
    group = 8
    if hasattr(method.sampler, "group_size"):
        chosen["sampler.group_size"] = group
    else:
        chosen["collect.prompts"] = 32 * group  # the same number of completions
    for update in method.updates:
        if hasattr(update.rule, "lr"):
            chosen[f"updates.{update.name}.rule.lr"] = 1e-3
    return chosen
