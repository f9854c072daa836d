"""What methods are, in words: the chain from the root with what each step changed, and the difference between two methods."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any

from polopt.method import Method
from polopt.part import Part
from polopt.paths import Leaf, Slot, method_leaves
from polopt.recipe import Recipe, stages_of
from polopt.update import UPDATE_SLOTS

WIDTH = 120


def explain(method: Method) -> str:
    """The method from the root of its family on: what each step changed, equations, settings, papers."""
    lines = [_heading(method), ""]
    if text := inspect.cleandoc(method.doc):
        lines += [text, ""]
    chain = method.chain()
    lines.append("Chain: " + " -> ".join(m.name for m in chain))
    lines += _wrap("  ", f"{chain[0].name}{_reference(chain[0])}")
    lines += _wrap("      ", "the root: " + ", ".join(f"{slot} {_names(value)}" for slot, value in _filled(chain[0])))
    for before, after in pairwise(chain):
        lines += _wrap("  ", f"{after.name}{_reference(after)}")
        found, _ = compare(before, after)
        lines += [line for change in found or ["(the same settings)"] for line in _wrap("      ", change)]
    if method.builds_on:
        lines += ["", *_wrap("", f"Builds on: {', '.join(method.builds_on)}")]
    lines += ["", "Parts:"]
    own = super(Recipe, method).parts() if isinstance(method, Recipe) else method.parts()
    told: dict[type[Part], tuple[str, Part]] = {}  # where a kind of part was described
    for path, part in method.parts().items():
        if path not in own and not _differs(method, path, part, own):
            continue
        first = told.setdefault(type(part), (path, part))
        if first[0] != path:
            lines += _wrap("  ", f"{path:<22} {part.name}, as {first[0]}{_but(part, first[1])}")
            continue
        lines += _wrap("  ", f"{path:<22} {part.describe()}")
        lines += [line for text in _about(part) for line in _wrap("      ", text)]
    lines += ["", "Updates:", *(line for u in method.updates for line in _wrap("  ", f"{u.name}: {_summary(method, u.name)}"))]
    if stages := stages_of(method):
        rounds = f", {method.repeat} rounds" if isinstance(method, Recipe) and method.repeat > 1 else ""
        lines += ["", f"Stages, within one budget{rounds}:"]
        lines += [line for s in stages for line in _wrap("  ", f"{s.name}: {_stage(method, s.name)}")]
    if needs := sorted(method.requires()):
        lines += ["", f"Needs of policy and task: {', '.join(needs)}"]
    if statistics := [*sorted(method.needs()), *sorted({r for p in method.parts().values() for r in p.reads})]:
        lines += [f"Needs of each decision: {', '.join(statistics)}"]
    if method.claim:
        lines += ["", *_wrap("", f"The paper's claim, not measured here: {' '.join(method.claim.split())}")]
    return "\n".join(lines)


def diff(a: Method, b: Method) -> str:
    """Every setting in which two methods differ, and how many are equal; descriptive fields do not count."""
    found, equal = compare(a, b)
    if not found:
        return f"{a.name} and {b.name} are equal in all {equal} parts and settings."
    lines = [f"{a.name} -> {b.name}", *(line for change in found for line in _wrap("  ", change))]
    lines.append(f"Equal in the other {equal} parts and settings." if equal else "They share no part or setting.")
    common = [m.name for m, n in zip(a.chain(), b.chain(), strict=False) if m == n]
    return "\n".join([*lines, *([f"Nearest common ancestor: {common[-1]}"] if common else [])])


def compare(a: Method, b: Method) -> tuple[list[str], int]:
    """One line per slot or setting in which `b` differs from `a`, and the number of slots and settings that are equal.

    A replaced part stands for its settings, an update that only one of them has for everything in it.
    """
    mine, other = method_leaves(a), method_leaves(b)
    done: list[str] = []
    lines: list[str] = []
    equal = 0
    for path in _in_order(mine, other):
        if any(path.startswith(f"{above}.") for above in done):
            continue
        x, y = mine.get(path), other.get(path)
        if x is None or y is None:
            if path == "repeat":  # of a recipe; other methods run once
                once, many = sorted((leaf.value if leaf else 1) for leaf in (x, y))
                lines += [f"{path}: {x.value if x else 1} -> {y.value if y else 1}"] if once != many else []
                continue
            name = path.split(".")[1] if path.startswith("stages.") else ""
            if name and name not in {s.name for s in stages_of(a if x is None else b)}:
                done.append(f"stages.{name}")
                shown = [_stage(m, name) if leaf else "(absent)" for m, leaf in ((a, x), (b, y))]
                lines.append(f"stages.{name}: {' -> '.join(shown)}")
                continue
            missing = (
                ".".join(path.split(".")[:2]) if path.startswith("updates.") and not _has(a if x is None else b, path) else path
            )
            done.append(missing)
            lines.append(f"{missing}: {_entry(a, missing, x)} -> {_entry(b, missing, y)}")
        elif isinstance(x.type, Slot):
            if _kinds(x.value) != _kinds(y.value):
                done.append(path)
                lines.append(f"{path}: {_describe(x.value)} -> {_describe(y.value)}")
            else:
                equal += 1
        elif x.value != y.value:
            lines.append(f"{path}: {_show(x.value)} -> {_show(y.value)}")
        else:
            equal += 1
    return lines, equal


def _in_order(mine: Mapping[str, Leaf], other: Mapping[str, Leaf]) -> list[str]:
    """All paths, slots of the method before its updates."""
    return sorted(dict.fromkeys((*mine, *other)), key=lambda p: p.startswith("updates."))


def _has(method: Method, path: str) -> bool:
    return any(path.startswith(f"updates.{u.name}.") for u in method.updates)


def _entry(method: Method, path: str, leaf: Leaf | None) -> str:
    if leaf is None:
        return "(absent)"
    return _summary(method, path.split(".")[1]) if path.count(".") == 1 and path.startswith("updates.") else _describe(leaf.value)


def _stage(method: Method, name: str) -> str:
    """A stage in one line: its length, what it takes over, and its settings where they are not the recipe's own."""
    assert isinstance(method, Recipe)
    stage = method.stage(name)
    words = [stage.length]
    if stage.takes and (method.repeat > 1 or stage != method.stages[0]):
        words.append(f"takes over {' and '.join(stage.takes)}")
    return ", ".join([*words, *(_own(method.own(), stage.method) if stage.method else ())])


def _differs(method: Method, path: str, part: Part, own: Mapping[str, Part]) -> bool:
    """Whether a stage's part acts and is not the recipe's own."""
    _, name, inner = path.split(".", 2)
    stage = next(s for s in stages_of(method) if s.name == name)
    return own.get(inner) != part and stage.method is not None and _acts(stage.method, inner)


def _acts(method: Method, path: str) -> bool:
    """Whether a slot acts at all: those of losses do in updates alone."""
    slot = path.partition(".")[0]
    return bool(method.updates) or slot not in UPDATE_SLOTS or slot == "advantage"


def _own(base: Method, method: Method) -> Iterator[str]:
    """In what a stage's method differs from the recipe's own parts, as far as it acts."""
    for line in compare(base, method)[0]:
        path, _, values = line.partition(": ")
        value = values.rpartition(" -> ")[2]
        if _acts(method, path):
            yield f"no {path}" if value == "(absent)" else f"{path} {value}"


def _summary(method: Method, update: str) -> str:
    """An update in one line: its settings that are set, and its rule."""
    prefix = f"updates.{update}."
    inner = {k.removeprefix(prefix): leaf.value for k, leaf in method_leaves(method).items() if k.startswith(prefix)}
    shown = [f"{_word(k)} {_brief(v) if k != 'on' else repr(v)}" for k, v in inner.items() if "." not in k and v is not None]
    return ", ".join(shown)


def _word(field: str) -> str:
    """How an update's setting is called in a sentence: what it is `on` is a batch."""
    return "on batch" if field == "on" else field


def _brief(value: Any) -> str:
    """Parts with those settings that are not their defaults."""
    if isinstance(value, tuple) and value and all(isinstance(p, Part) for p in value):
        return " + ".join(_brief(p) for p in value)
    if not isinstance(value, Part):
        return _describe(value)
    inner = ", ".join(f"{f.name}={getattr(value, f.name)!r}" for f in fields(value) if getattr(value, f.name) != _default(f))
    return f"{value.name}({inner})" if inner else value.name


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _but(part: Part, other: Part) -> str:
    """In what a part differs from another one of its kind."""
    found = [f"{f.name}={getattr(part, f.name)!r}" for f in fields(part) if getattr(part, f.name) != getattr(other, f.name)]
    return f" but {', '.join(found)}" if found else ""


def _wrap(indent: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "    ", break_long_words=False, break_on_hyphens=False
    )


def _kinds(value: Any) -> Any:
    """Which parts a slot holds, without their settings."""
    return tuple(type(p) for p in value) if isinstance(value, tuple) else type(value)


def _filled(method: Method) -> Iterator[tuple[str, Any]]:
    for path, leaf in method_leaves(method).items():
        if isinstance(leaf.type, Slot) and leaf.value:
            yield path, leaf.value


def _names(value: Any) -> str:
    return " + ".join(p.name for p in value) if isinstance(value, tuple) else value.name


def _describe(value: Any) -> str:
    if isinstance(value, Part):
        return value.describe()
    if isinstance(value, tuple) and all(isinstance(p, Part) for p in value):
        return " + ".join(p.describe() for p in value) or "none"
    return _show(value)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _heading(method: Method) -> str:
    title = f": {method.title}" if method.title else ""
    return f"{method.name}{title}{_reference(method)}"


def _reference(method: Method) -> str:
    paper = f"arXiv {method.paper}" if method.paper[:4].isdigit() and "." in method.paper else method.paper
    known = [str(x) for x in (paper, method.year) if x]
    return f" ({', '.join(known)})" if known else ""


def _about(part: Part) -> list[str]:
    """The part's equation and the first sentence of its docstring."""
    doc = inspect.cleandoc(type(part).__doc__ or "").split("\n\n")[0]
    own = "" if doc.startswith(f"{type(part).__name__}(") else " ".join(doc.split())
    return [line for line in (own, part.equation) if line]
