"""Dotted paths over the settings of a run and the parts of its method: what can be set, of which type, and setting it."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

from polopt.errors import CallError
from polopt.method import Method
from polopt.part import KINDS, Part, Range, hints, make_part
from polopt.recipe import OWN_SETTINGS, STAGE_FIELDS, Recipe, Stage, stages_of
from polopt.settings import Settings
from polopt.suggest import suggestion
from polopt.update import OPTIONAL, PLURAL, SLOTS, UPDATE_SLOTS, Update

T = TypeVar("T")

#: Settings of an update that are no slots: what a bare name such as `epochs` may mean.
UPDATE_FIELDS = tuple(f.name for f in fields(Update) if f.name not in (*UPDATE_SLOTS, "name", "rule", "after"))
SECTIONS = tuple(f.name for f in fields(Settings))
NONE = ("none", "null")


@dataclass(frozen=True)
class Slot:
    """The type of a path that holds parts: which kind, one or several."""

    kind: str
    plural: bool = False


@dataclass(frozen=True)
class Leaf:
    """One thing that can be set: its canonical path, its type (a `Slot` or an annotation) and its value."""

    path: str
    type: Any
    value: Any

    @property
    def help(self) -> str:
        """The help text that the field declares."""
        return next((m for m in getattr(self.type, "__metadata__", ()) if isinstance(m, str)), "")

    @property
    def range(self) -> Range | None:
        """The numeric bounds that the field declares."""
        return next((m for m in getattr(self.type, "__metadata__", ()) if isinstance(m, Range)), None)

    def expected(self) -> str:
        """The type and range in words: `integer, >= 1`."""
        bounds = f", {self.range}" if self.range else ""
        return type_text(self.type) + bounds


# -------------------------------------------------------------------- what there is
def settings_leaves(settings: Settings) -> dict[str, Leaf]:
    """Every setting of a run by path, `options.*` as far as they are set."""
    found = {leaf.path: leaf for leaf in _fields(settings, "") if leaf.path != "options"}
    return found | {f"options.{k}": Leaf(f"options.{k}", Any, v) for k, v in settings.options.items()}


def method_leaves(method: Method) -> dict[str, Leaf]:
    """Every slot, part setting and update setting of a method by canonical path."""
    found = list(_slots(method, SLOTS, ""))
    for u in method.updates:
        prefix = f"updates.{u.name}."
        annotations = hints(Update)
        found += [Leaf(prefix + name, annotations[name], getattr(u, name)) for name in UPDATE_FIELDS]
        found += [Leaf(f"{prefix}rule", Slot("rule"), u.rule), *_fields(u.rule, f"{prefix}rule.")]
        inside = _slots(u, (*UPDATE_SLOTS, "after"), prefix)  # empty slots are the method's own; a setting may well be none
        found += [leaf for leaf in inside if not (isinstance(leaf.type, Slot) and leaf.value in (None, ()))]
    if isinstance(method, Recipe):
        found += [Leaf("repeat", hints(Recipe)["repeat"], method.repeat), *(leaf for s in method.stages for leaf in _stage(s))]
    return {leaf.path: leaf for leaf in found}


def _stage(stage: Stage) -> Iterator[Leaf]:
    """What can be set of a stage of a recipe: its own fields, settings of the run that it changes, and its method's."""
    prefix = f"stages.{stage.name}."
    yield from (Leaf(prefix + name, hints(Stage)[name], getattr(stage, name)) for name in STAGE_FIELDS)
    yield from (Leaf(prefix + p, leaf.type, stage.settings[p]) for p, leaf in _own_settings().items() if p in stage.settings)
    if stage.method is not None:
        yield from (dataclasses.replace(leaf, path=prefix + path) for path, leaf in method_leaves(stage.method).items())


@functools.cache
def _own_settings() -> Mapping[str, Leaf]:
    """Settings of a run that a stage may have for itself."""
    return {p: leaf for p, leaf in settings_leaves(Settings()).items() if p.partition(".")[0] in OWN_SETTINGS}


def _slots(owner: Any, names: Sequence[str], prefix: str) -> Iterator[Leaf]:
    for slot in names:
        value = getattr(owner, slot)
        yield Leaf(prefix + slot, Slot(slot, slot in PLURAL), value)
        for part in value or () if slot in PLURAL else (value,):
            if part is not None:
                yield from _fields(part, f"{prefix}{slot}.{part.name}." if slot in PLURAL else f"{prefix}{slot}.")


def _fields(owner: Any, prefix: str) -> Iterator[Leaf]:
    """Fields of a dataclass, going into those that are dataclasses themselves."""
    try:
        annotations = hints(typing.cast(Any, type(owner)))
    except NameError:  # a user's part that annotates with names imported for type checking only
        annotations = {}
    for f in fields(owner):
        value = getattr(owner, f.name)
        if not f.init:
            continue
        if is_dataclass(value) and not isinstance(value, type):
            yield from _fields(value, f"{prefix}{f.name}.")
        else:
            yield Leaf(prefix + f.name, annotations.get(f.name, Any), value)


# -------------------------------------------------------------------- names
def canonical(path: str, method: Method) -> str:
    """The full path of a shorthand: `lr` is `updates.<main>.rule.lr`, `penalty.coef` the one penalty's, `group_size` a sampler's.

    Paths that are unknown come back as they are.
    """
    head, _, rest = path.partition(".")
    main = method.update() if method.updates else Update()
    if head == "task" and rest:
        return f"options.{rest}"
    if head in SECTIONS:
        return path
    if head == "stages":
        return _in_stage(path, method)
    if head == "rule":
        return f"updates.{main.name}.{path}"
    known = method_leaves(method)
    if head in UPDATE_SLOTS and getattr(main, head) is not None:  # the method's own part does not act there
        inner = f"updates.{main.name}.{path}"
        path = inner if inner in known or path not in known else path  # but a setting that only that part has is its own
    if path in known:
        return path
    if "." not in path:
        for prefix in (f"updates.{main.name}.", f"updates.{main.name}.rule.", "sampler."):
            if prefix + path in known:
                return prefix + path
    return _in_plural(path, method, known)


def _in_stage(path: str, method: Method) -> str:
    """`stages.estimate.lr` as `stages.estimate.updates.policy.rule.lr`; of a stage with the recipe's own parts, what `lr` means."""
    _, name, inner = (*path.split(".", 2), "", "")[:3]
    stage = next((s for s in stages_of(method) if s.name == name), None)
    head = inner.partition(".")[0]
    if stage is None or head in ("", *STAGE_FIELDS, *SECTIONS):
        return path
    return canonical(inner, method) if stage.method is None else f"stages.{name}.{canonical(inner, stage.method)}"


def _in_plural(path: str, method: Method, known: Mapping[str, Leaf]) -> str:
    """`penalty.coef` as `penalty.<part>.coef` if exactly one of the parts in the slot has that setting."""
    before, _, name = path.rpartition(".")
    slot = known.get(before)
    if slot is None or not isinstance(slot.type, Slot) or not slot.type.plural:
        return path
    having = [f"{before}.{p.name}.{name}" for p in slot.value if f"{before}.{p.name}.{name}" in known]
    if len(having) > 1:
        raise CallError(f"'{path}' is ambiguous: {' or '.join(having)}")
    return having[0] if having else path


def find(path: str, method: Method, settings: Settings, source: str = "", *, full_first: bool = False) -> Leaf:
    """The leaf that a path or shorthand means; an unknown one is refused with the nearest valid path.

    full_first: a full path means itself, also where the first update has a part of its own in that slot.
    """
    if full_first and (exact := method_leaves(method).get(path)) is not None:
        return exact
    for form in dict.fromkeys((path, path.replace("-", "_"))):
        full = canonical(form, method)
        leaves = settings_leaves(settings) if full.partition(".")[0] in SECTIONS else method_leaves(method)
        if full in leaves:
            return leaves[full]
        if full.startswith("options."):
            return Leaf(full, Any, None)
        if (open_ := _update_slot(full, method) or _stage_setting(full, method)) is not None:
            return open_
    leaves = settings_leaves(settings) | method_leaves(method)
    if any(p.startswith(f"{path}.") for p in leaves):
        inside = sorted(p for p in leaves if p.startswith(f"{path}."))
        raise CallError(f"'{path}'{_from(source)} is a section; set one of {', '.join(inside)}")
    raise CallError(f"unknown setting '{path}'{_from(source)}{suggestion(path, list(leaves), method)}")


def _update_slot(path: str, method: Method) -> Leaf | None:
    """A slot that an update could override but does not yet (`updates.critic.surrogate`)."""
    head, _, rest = path.partition(".")
    name, _, slot = rest.partition(".")
    known = any(u.name == name for u in method.updates)
    return Leaf(path, Slot(slot, slot in PLURAL), None) if head == "updates" and known and slot in UPDATE_SLOTS else None


def _stage_setting(path: str, method: Method) -> Leaf | None:
    """A setting of the run that a stage could have for itself but does not yet (`stages.estimate.collect.prompts`)."""
    _, name, inner = (*path.split(".", 2), "", "")[:3]
    known = path.startswith("stages.") and any(s.name == name for s in stages_of(method))
    return Leaf(path, _own_settings()[inner].type, None) if known and inner in _own_settings() else None


# -------------------------------------------------------------------- types and values
def type_text(annotation: Any) -> str:
    """A type in words: `integer or none`, `tanh|relu`, `integers a,b,...`."""
    if isinstance(annotation, Slot):
        return f"{annotation.kind} part{'s, separated by commas' if annotation.plural else ''}"
    words = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "none", Any: "anything"}
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_text(args[0])
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(a) for a in args)
    if origin in (tuple, list):
        return f"{type_text(args[0])}s a,b,..." if args else "a,b,..."
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def coerce(leaf: Leaf, value: Any, source: str = "", path: str = "") -> Any:
    """`value` in the leaf's type, within its range; otherwise `CallError` naming path, value, source, type and range."""
    path = path or leaf.path
    if isinstance(leaf.type, Slot):
        return coerce_slot(leaf, value, source, path)
    bare = typing.get_args(leaf.type)[0] if typing.get_origin(leaf.type) is Annotated else leaf.type
    try:
        made = _convert(bare, value)
    except ValueError as error:
        raise CallError(f"{path} = {value!r}{_from(source)}: expected {leaf.expected()}") from error
    for x in made if isinstance(made, tuple | list) else (made,):
        if isinstance(x, float) and math.isnan(x):
            raise CallError(f"{path} = {value!r}{_from(source)}: not a number; expected {leaf.expected()}")
        if leaf.range and isinstance(x, int | float) and not isinstance(x, bool) and (problem := leaf.range.problem(float(x))):
            raise CallError(f"{path} = {value!r}{_from(source)}: {problem} (expected {leaf.expected()})")
    return made


def _convert(annotation: Any, value: Any) -> Any:
    if annotation is Any:
        return guess(value) if isinstance(value, str) else value
    if isinstance(value, str) and value in _words(annotation):
        return value  # before "none" is taken for None
    args = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    if value is None or (isinstance(value, str) and value.strip().lower() in NONE and str not in args):
        if type(None) in args:
            return None
        raise ValueError
    holds_sequence = any(typing.get_origin(a) in (tuple, list) for a in args)
    if isinstance(value, str):
        value = value.strip() if str not in args else value
        if holds_sequence:
            value = [v.strip().strip("'\"") for v in value.strip("[]() ").split(",") if v.strip()]
        elif int in args and float not in args and "e" in value.lower():
            value = float(value)  # 1e5 is a fine integer
    elif holds_sequence and isinstance(value, int | float):
        value = [value]
    if isinstance(value, bool) and bool not in args and str not in args:
        raise ValueError  # true is not 1
    return _adapter(annotation).validate_python(value)


@functools.cache
def _words(annotation: Any) -> frozenset[Any]:
    """The literal words among the alternatives of a type."""
    if typing.get_origin(annotation) is Literal:
        return frozenset(typing.get_args(annotation))
    return frozenset[Any]().union(*(_words(a) for a in typing.get_args(annotation)))


@functools.cache
def _adapter(annotation: Any) -> Any:
    from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError):  # dataclasses bring their own configuration
        return TypeAdapter(annotation)


def guess(text: str) -> Any:
    """A value of unknown type from the command line: number, true/false, none, list, or the text itself."""
    word = text.strip()
    if word.lower() in (*NONE, "true", "false"):
        return {"true": True, "false": False}.get(word.lower())
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            pass
    if word[:1] == "[" and word[-1:] == "]":
        return [guess(v) for v in word[1:-1].split(",") if v.strip()]
    return text


def coerce_slot(leaf: Leaf, value: Any, source: str, path: str) -> Any:
    """The part or parts that a slot's value names: a name, `file.py:Name`, a Part, a mapping with `part`, or several of these."""
    slot: Slot = leaf.type
    if isinstance(value, str):
        value = None if value.strip().lower() in NONE else [v.strip() for v in value.split(",")] if slot.plural else value.strip()
    if value is None or value == []:
        if slot.plural:
            return ()
        if slot.kind in OPTIONAL:
            return None
        raise CallError(f"{path} = none{_from(source)}: the slot cannot be empty; 'polopt parts {slot.kind}' lists what fits")
    many = list(value) if isinstance(value, tuple | list) else [value]
    if len(many) > 1 and not slot.plural:
        raise CallError(f"{path} = {value!r}{_from(source)}: the slot holds one part")
    try:
        made = tuple(_part(slot.kind, v, path, source) for v in many)
    except CallError as error:
        raise CallError(f"{path}{_from(source)}: {error}") from error
    return made if slot.plural else made[0]


def _part(kind: str, value: Any, path: str, source: str) -> Part:
    if isinstance(value, Mapping):
        inner = dict(value)
        if "part" not in inner:
            raise CallError("a part given by its settings needs 'part: NAME'")
        made = _part(kind, inner.pop("part"), path, source)
        for name, given in inner.items():
            leaves = {leaf.path: leaf for leaf in _fields(made, "")}
            if name not in leaves:
                made.but(**{name: given})  # refuses with the nearest name
            made = replace_at(made, name.split("."), coerce(leaves[name], given, source, f"{path}.{name}"))
        return made
    if isinstance(value, type) and issubclass(value, Part):
        value = value()
    if isinstance(value, str):
        value = _made(kind, value)
    if isinstance(value, Part):
        cls = type(value)
        cls.kind, cls.name = cls.kind or kind, vars(cls).get("name") or cls.__name__  # a user's class that was not registered
        return value
    raise CallError(f"takes a {kind} part, got {type(value).__name__}: {value!r}")


def _made(kind: str, name: str) -> Part:
    try:
        return make_part(kind, name)
    except CallError as error:
        hint = "; reward functions of a data task are given as --options.reward" if kind == "reward" and ".py:" in name else ""
        raise CallError(f"{error}{hint}") from error
    except TypeError as error:  # a part with settings that have no default
        raise CallError(f"{kind} '{name}' cannot be made without its settings: {error}") from error


def replace_at(owner: T, path: Sequence[str], value: Any) -> T:
    """A copy of a method, update, part or settings with the value at `path` replaced."""
    head, rest = path[0], path[1:]
    if isinstance(owner, Mapping):
        return typing.cast(T, {**owner, ".".join(path): value})
    if isinstance(owner, Stage) and head in OWN_SETTINGS:
        return dataclasses.replace(owner, settings={**owner.settings, ".".join(path): value})
    if isinstance(owner, Stage) and head not in STAGE_FIELDS:
        return dataclasses.replace(owner, method=replace_at(owner.method, path, value))
    if isinstance(owner, tuple):
        return typing.cast(T, tuple(replace_at(item, rest, value) if item.name == head else item for item in owner))
    new = value if not rest else replace_at(getattr(owner, head), rest, value)
    if new is not None and head in KINDS and isinstance(owner, Method | Update):
        from polopt.method import _fit

        new = new if head == "rule" else _fit(head, new)
    return typing.cast(T, dataclasses.replace(typing.cast(Any, owner), **{head: new}))


def _from(source: str) -> str:
    return f" ({source})" if source else ""


__all__ = ["Leaf", "Slot", "canonical", "coerce", "find", "method_leaves", "replace_at", "settings_leaves", "type_text"]
