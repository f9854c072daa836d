"""Settings under which a table learns, by what a method is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update

#: Answers per iteration, and how many of them answer the same prompt where a method compares such answers.
ANSWERS, GROUP = 64, 8
#: Learning rate of Adam on logits, for up to so many gradient steps per iteration.
RATE, FREE = 0.05, 4


def table_preset(method: Method) -> Mapping[str, Any]:
    """Dotted settings for `method`; only fields that it has."""
    grouped = getattr(method.sampler, "group_size", 1) > 1
    chosen: dict[str, Any] = {
        "threads": 1,
        "collect.prompts": ANSWERS // GROUP if grouped else ANSWERS,
        "evaluate.every": 10,
        "evaluate.greedy": False,
        "optim.compile": "never",
    }
    if grouped:
        chosen["sampler.group_size"] = GROUP
    for update in method.updates:
        chosen |= {f"updates.{update.name}.{k}": v for k, v in _of(method, update).items()}
    return chosen


def _of(method: Method, update: Update) -> dict[str, Any]:
    rule = update.rule
    chosen: dict[str, Any] = {}
    if hasattr(rule, "lr"):
        chosen["rule.lr"] = RATE / max(1.0, _steps(update) / FREE) if "surrogate" in update.terms else RATE
        if str(getattr(rule, "optimizer", "")).startswith("rmsprop"):
            # a mean square that starts from 1 and far exceeds these gradients must be forgotten quickly
            chosen |= {"rule.lr": 0.5, "rule.alpha": 0.9}
    if hasattr(rule, "damping"):  # the Fisher matrix of a table has small entries: those of rarely visited nodes
        chosen |= {"rule.damping": 1e-4, "rule.delta": 0.02}
    return chosen


def _steps(update: Update) -> float:
    """Gradient steps per iteration."""
    each = -(-ANSWERS // update.minibatch) if update.minibatch else update.minibatches or 1
    return float(update.epochs * each)
