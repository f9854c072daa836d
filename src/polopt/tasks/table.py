"""`table:<name>`: exact little worlds, in which every answer, its probability and every gradient can be written down."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import fields
from typing import Any, cast

from polopt.errors import CallError, unknown
from polopt.part import Can, hints
from polopt.tasks.table_presets import table_preset
from polopt.tasks.table_world import World
from polopt.tasks.table_worlds import WORLDS, options_of

TABLE_OFFERS = frozenset({
    Can.SCORE, Can.ENUMERATE, Can.KL, Can.VALUE, Can.REFERENCE, Can.GROUPS, Can.EPISODES, Can.REFILL, Can.ITEMS,
})  # fmt: skip


class TableTask:
    """A tabular task: prompts by number, answers over a few symbols, everything enumerable.

    It is a text-like world (a row is an answer, judged at its end, several for the same prompt) and a Markov decision process (a
    prefix is a state; `dense` pays along the way; whole episodes are rows), so that methods of both kinds run in it.
    """

    domain = "table"
    offers = TABLE_OFFERS

    def __init__(self, name: str, options: Mapping[str, Any] | None = None) -> None:
        """`name` is "table:<world>". Raises `CallError` for unknown names, options and values out of range."""
        self.name = name
        self.world_name = name.removeprefix("table:")
        kind = options_of(self.world_name)
        given = dict(options or {})
        for key, value in given.items():
            _check(self.name, kind, key, value)
        self.options = kind(**given)
        self.given = given
        if self.options.families > self.options.prompts:
            raise CallError(f"options.families = {self.options.families} exceeds options.prompts = {self.options.prompts}")

    @functools.cached_property
    def world(self) -> World:
        """The world: made when it is first asked for, from the task's own seed."""
        return WORLDS[self.world_name][1](self.options)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the reward channels."""
        return self.world.channels

    def preset(self, method: Any) -> Mapping[str, Any]:
        """Settings under which a table learns."""
        return table_preset(method)

    def option_fields(self) -> dict[str, tuple[Any, str]]:
        """Every option by name: (default, help)."""
        kind = type(self.options)
        known = hints(cast(Hashable, kind))
        return {f.name: (f.default, next(m for m in known[f.name].__metadata__ if isinstance(m, str))) for f in fields(kind)}


def _check(task: str, kind: Any, key: str, value: Any) -> None:
    """Raise `CallError` when there is no such option, or when its value is not of the kind of the default."""
    known = {f.name: f.default for f in fields(kind)}
    if key not in known:
        raise unknown(f"option of {task}", key, known)
    default = known[key]
    wanted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise CallError(f"option {key} = {value!r} of {task} must be {wanted[-1].__name__} (default {default!r})")
    choices = getattr(getattr(hints(kind)[key], "__origin__", None), "__args__", ())
    if choices and value not in choices:
        raise unknown(f"value of options.{key}", str(value), choices)


def table_names() -> dict[str, str]:
    """Names of the worlds, and what they are."""
    return {f"table:{name}": about for name, (_, _, about) in WORLDS.items()}


__all__ = ["TABLE_OFFERS", "TableTask", "table_names"]
