"""Tasks by name: `gym:<id>`, `text:<name>`, `data:<path or id>`, `table:`, `point:`, `bandit:`, `dataset:`, `file.py:NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

from polopt.errors import CallError, nearest

if TYPE_CHECKING:
    from polopt.interfaces import Task

#: prefix -> (module, class or function, what follows the prefix); the module is imported when the task is made
FAMILIES = {
    "gym": ("polopt.tasks.gym", "GymTask", "any Gymnasium environment, e.g. gym:CartPole-v1"),
    "text": ("polopt.tasks.mini", "text_task", "any reasoning-gym task, e.g. text:spell_backward"),
    "data": ("polopt.tasks.data", "DataTask", "a JSONL or Parquet file or data set id with prompts, e.g. data:questions.jsonl"),
    "table": ("polopt.tasks.table", "TableTask", "an exact little world: arms, tree, bank, lengths or style, e.g. table:tree"),
    "dataset": (
        "polopt.tasks.logs",
        "DatasetTask",
        "an environment with data to learn from, e.g. dataset:pendulum-logs?noise=0.3, or a Minari dataset's folder or id",
    ),
    "point": ("polopt.tasks.point", "PointTask", "point robots: open, two, hidden, ring, routes, bends or team, e.g. point:two"),
    "bandit": (
        "polopt.tasks.bandit",
        "BanditTask",
        "one state, known rewards: wave, two, ring, hidden, quadratic or arms, e.g. bandit:two",
    ),
}


def make(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task called `name` with its options; unknown names are refused with the nearest valid one."""
    options = dict(options or {})
    if ".py:" in name:
        from polopt.registry import load_object

        return _built(load_object(name), name, options)
    prefix, colon, rest = name.partition(":")
    points = {p.name: p for p in entry_points(group="polopt.tasks")}
    if prefix in points and prefix not in FAMILIES:
        return _built(points[prefix].load(), name, {**({"name": rest} if colon else {}), **options})
    if prefix not in FAMILIES or not rest:
        close = nearest(f"{prefix}:", [*(f"{p}:" for p in FAMILIES), *points])
        hint = close if close.startswith(", did") else ""  # the list below says more than a bare list of prefixes
        known = "; ".join(f"{p}:… is {FAMILIES[p][2]}" for p in FAMILIES)
        raise CallError(f"unknown task '{name}'{hint}; {known}; or file.py:NAME of your own")
    module, cls, _ = FAMILIES[prefix]
    return cast("Task", getattr(import_module(module), cls)(name, options))


def _built(found: Any, name: str, options: Mapping[str, Any]) -> Task:
    """A task from what a user's file or a package offers: a task, or a class or function that makes one."""
    if callable(found):
        try:
            found = found(**options)
        except TypeError as error:
            raise CallError(f"task '{name}' with options {dict(options)}: {error}") from error
    elif options:
        raise CallError(f"options.{next(iter(options))}: task '{name}' is an object without options")
    lacking = [a for a in ("name", "domain", "offers", "preset") if not hasattr(found, a)]
    if lacking:
        raise CallError(
            f"task '{name}' is {type(found).__name__}, which lacks {', '.join(lacking)}; see the documentation of tasks"
        )
    return cast("Task", found)


def task_names() -> dict[str, str]:
    """What `polopt tasks` lists: name or form of name, and what it is."""
    found = {f"{prefix}:…": text for prefix, (_, _, text) in FAMILIES.items()}
    return found | {p.name: f"from {p.value}" for p in entry_points(group="polopt.tasks")}


__all__ = ["FAMILIES", "make", "task_names"]
