"""Options of tasks as frozen dataclasses: `Annotated[type, Range(...), "help"]` fields, checked by name, type, choice and range."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from polopt.errors import CallError, unknown
from polopt.part import hints

T = TypeVar("T")


def options_from(task: str, kind: type[T], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> T:
    """The options of `task`: `given` over `defaults` over the defaults of `kind`.

    Raises `CallError` when there is no such option, or when its value is not of the kind of the default.
    """
    for key, value in given.items():
        _check(task, kind, key, value)
    return kind(**{**(defaults or {}), **given})


def option_help(options: Any) -> dict[str, tuple[Any, str]]:
    """Every option by name: (value, help)."""
    known = hints(cast(Hashable, type(options)))
    return {
        f.name: (getattr(options, f.name), next(m for m in known[f.name].__metadata__ if isinstance(m, str)))
        for f in fields(options)
    }


def _check(task: str, kind: type, key: str, value: Any) -> None:
    known = {f.name: f.default for f in fields(kind)}
    if key not in known:
        raise unknown(f"option of {task}", key, known)
    default = known[key]
    wanted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if isinstance(value, bool) is not isinstance(default, bool) or not isinstance(value, wanted):
        raise CallError(f"option {key} = {value!r} of {task} must be {wanted[-1].__name__} (default {default!r})")
    choices = getattr(getattr(hints(cast(Hashable, kind))[key], "__origin__", None), "__args__", ())
    if choices and value not in choices:
        raise unknown(f"value of options.{key}", str(value), choices)


__all__ = ["option_help", "options_from"]
