"""The small fixed run that certificates are about: one exact world, in which every method works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from polopt.evidence.proof import actors
from polopt.method import Method
from polopt.part import Can

#: Answers per iteration, and how many of them answer the same prompt where a method compares such answers.
ANSWERS, GROUP = 16, 4
#: Rate of methods whose surrogate works on probability ratios, and passes over each batch of those that pass once.
RATE, EPOCHS = 0.3, 4
WORLD = {"prompts": 4, "symbols": 4, "length": 4, "dense": 0.25, "hardest": 0.05, "easiest": 0.3, "noise": 0.3}


class Small(NamedTuple):
    """A run: its task and its settings by dotted path."""

    task: str
    settings: Mapping[str, Any]


def world(method: Method) -> Small:
    """The world in which a method is certified: exact, short answers of unequal length, paid in part along the way.

    Methods that keep transitions are certified on small control tasks, offline ones on a line of cells with logged data.
    """
    if actors.acts(method):
        return _control(method)
    if Can.FLOW in method.requires():
        return _flow(method)
    if Can.SOLUTIONS in method.requires():
        return _text()
    grouped = getattr(method.sampler, "group_size", 1) > 1
    settings: dict[str, Any] = {
        "seed": 0, "threads": 1, "collect.prompts": ANSWERS // GROUP if grouped else ANSWERS, "evaluate.episodes": 8,
        "evaluate.every": 0, **{f"options.{k}": v for k, v in WORLD.items()},
    }  # fmt: skip
    if grouped:
        settings["sampler.group_size"] = GROUP
    main = method.update()
    if (s := method.slots(main).surrogate) is not None and "logp@old" in s.needs and hasattr(main.rule, "lr"):
        # several large steps per batch: ratios must come to where a surrogate bounds them, or its bounds would not be seen
        settings[f"updates.{main.name}.rule.lr"] = RATE
        if main.epochs == 1:
            settings[f"updates.{main.name}.epochs"] = EPOCHS
    return Small("table:lengths", settings)


def _control(method: Method) -> Small:
    settings: dict[str, Any] = {
        "seed": 0, "threads": 1, "policy.hidden": (16, 16), "evaluate.episodes": 2, "evaluate.every": 0, "source.batch": 16,
    }  # fmt: skip
    if hasattr(method.source, "rounds"):  # a dataset
        return Small("dataset:line", {**settings, "source.rounds": 4})
    settings |= {"collect.envs": 1, "collect.steps": 4, "source.start": 0, "source.size": 1000}
    if getattr(method.critic, "hidden", None) is not None:
        settings["critic.hidden"] = (16, 16)
    return Small("gym:CartPole-v1" if Can.ENUMERATE in method.requires() else "gym:Pendulum-v1", settings)


def _text() -> Small:
    """Words to reverse, with a solution to take hints from; long ones, so that some groups fail."""
    return Small("text:spell", {
        "seed": 0, "threads": 1, "collect.prompts": 2, "sampler.group_size": GROUP, "evaluate.episodes": 4, "evaluate.every": 0,
        "options.min_length": 8,
    })  # fmt: skip


def _flow(method: Method) -> Small:
    settings: dict[str, Any] = {
        "seed": 0, "threads": 1, "policy.hidden": (16,), "policy.flow_steps": 4, "collect.envs": 4, "collect.steps": 4,
        "evaluate.episodes": 2, "evaluate.every": 0, "minibatch": 8,
    }  # fmt: skip
    if hasattr(method.update().rule, "lr"):
        settings["rule.lr"] = 0.01  # ratios must come to where a surrogate bounds them
    return Small("point:two", settings)


__all__ = ["Small", "world"]
