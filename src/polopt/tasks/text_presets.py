"""Settings under which the shipped tiny model learns a short text task, by what a method is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update

#: Completions per iteration, and how many of them answer the same prompt where a method compares such answers.
COMPLETIONS, GROUP = 256, 8
#: Learning rate of Adam for half a million parameters and one gradient step per iteration.
RATE = 2e-4


def text_preset(method: Method, *, completions: int = COMPLETIONS, rate: float = RATE) -> Mapping[str, Any]:
    """Dotted settings for `method`; only fields that it has. `rate` is that of one gradient step per iteration.

    Every method gets the same number of completions per iteration. A method that takes many gradient steps per iteration, or
    several without a bound that stops the policy, moves more slowly in each.
    """
    grouped = getattr(method.sampler, "group_size", 1) > 1
    chosen: dict[str, Any] = {
        "threads": 1,  # a second gains a small model little, and loses much when the machine has other work
        "collect.prompts": completions // GROUP if grouped else completions,
        "collect.max_new_tokens": 16,
        "optim.micro": 64,  # a quarter of the memory at the same speed
        "evaluate.every": 10,
        "evaluate.episodes": 256,
    }
    if grouped:
        chosen["sampler.group_size"] = GROUP
    for update in method.updates:
        if hasattr(update.rule, "lr"):
            chosen[f"updates.{update.name}.rule.lr"] = rate / max(1.0, _steps(update, completions) / _free(method, update))
    return chosen


def _steps(update: Update, completions: int) -> float:
    """Gradient steps per iteration."""
    each = completions / update.minibatch if update.minibatch else update.minibatches or 1
    return update.epochs * each


def _free(method: Method, update: Update) -> int:
    """Gradient steps that may be taken at the full rate: more where the surrogate cuts the gradient of what moved too far."""
    return 4 if hasattr(method.slots(update).surrogate, "cut") else 1
