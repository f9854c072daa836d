"""The small fixed run that certificates are about: one exact world, in which every method works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from polopt.method import Method

#: Answers per iteration, and how many of them answer the same prompt where a method compares such answers.
ANSWERS, GROUP = 16, 4
WORLD = {"prompts": 4, "symbols": 3, "length": 4, "dense": 0.25, "hardest": 0.2, "easiest": 0.5}


class Small(NamedTuple):
    """A run: its task and its settings by dotted path."""

    task: str
    settings: Mapping[str, Any]


def world(method: Method) -> Small:
    """The exact world in which every method is certified: short answers of unequal length, paid in part along the way."""
    grouped = getattr(method.sampler, "group_size", 1) > 1
    settings: dict[str, Any] = {
        "seed": 0, "threads": 1, "collect.prompts": ANSWERS // GROUP if grouped else ANSWERS, "evaluate.episodes": 8,
        "evaluate.every": 0, **{f"options.{k}": v for k, v in WORLD.items()},
    }  # fmt: skip
    if grouped:
        settings["sampler.group_size"] = GROUP
    return Small("table:lengths", settings)


__all__ = ["Small", "world"]
