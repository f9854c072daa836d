"""Commands that only show something: explain, diff, methods, tasks, parts, report."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator, Sequence
from typing import Any

from polopt.errors import unknown


def explain(args: argparse.Namespace) -> int:
    """`polopt explain METHOD`."""
    from polopt import api

    print(api.explain(args.method))
    return 0


def diff(args: argparse.Namespace) -> int:
    """`polopt diff A B [--json]`; status 1 if a proof that nothing else differs fails."""
    from polopt import api
    from polopt.evidence.proof.difference import difference

    found = difference(api.method(args.a), api.method(args.b))
    print(json.dumps(found.json(), indent=2) if args.json else found.text())
    return 0 if found.holds else 1


def methods(args: argparse.Namespace) -> int:
    """`polopt methods [--json]`."""
    from polopt import api
    from polopt.evidence.proof import stored

    found = api.methods()
    if args.json:
        print(json.dumps([_as_json(m) | stored.summary(m) for m in found.values()], indent=2))
        return 0
    children: dict[str | None, list[str]] = {}
    for name, m in found.items():
        children.setdefault(m.parent.name if m.parent and m.parent.name in found else None, []).append(name)

    def rows(name: str, depth: int) -> Iterator[tuple[str, ...]]:
        m = found[name]
        about = m.title or next(iter(inspect.cleandoc(m.doc).splitlines()), "")
        yield ("  " * depth + name, m.family, about, ", ".join(str(x) for x in (m.paper, m.year) if x), *stored.words(m))
        for child in children.get(name, []):
            yield from rows(child, depth + 1)

    print(
        columns(
            [
                ("method", "family", "what it is", "paper", "evidence", "certificate"),
                *(r for c in children.get(None, []) for r in rows(c, 0)),
            ]
        )
    )
    return 0


def columns(rows: Sequence[tuple[str, ...]], most: int = 132) -> str:
    """Rows in aligned columns, at most `most` wide: the widest column but the first is cut where that is needed."""
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(width) + 2 * (len(width) - 1) > most:
        width[max(range(1, len(width)), key=lambda i: width[i])] -= 1

    def cell(text: str, n: int) -> str:
        return text.ljust(n) if len(text) <= n else f"{text[: n - 1]}…"

    return "\n".join("  ".join(map(cell, row, width)).rstrip() for row in rows)


def _as_json(method: Any) -> dict[str, Any]:
    from polopt.paths import Slot, method_leaves

    settings = {}
    for path, leaf in method_leaves(method).items():
        if isinstance(leaf.type, Slot):
            value = leaf.value
            settings[path] = [p.name for p in value] if isinstance(value, tuple) else value.name if value is not None else None
        else:
            settings[path] = leaf.value if isinstance(leaf.value, int | float | str | None) else str(leaf.value)
    return {
        "name": method.name,
        "card": method.card,
        "parent": method.parent.name if method.parent else None,
        "title": method.title,
        "paper": method.paper,
        "year": method.year,
        "family": method.family,
        "builds_on": list(method.builds_on),
        "claim": method.claim,
        "requires": sorted(method.requires()),
        "settings": settings,
    }


def tasks(args: argparse.Namespace) -> int:
    """`polopt tasks [TASK]`."""
    from polopt.tasks import make, task_names

    if args.name is None:
        for name, about in task_names().items():
            print(f"{name:<10} {about}")
        from polopt.tasks.mini import MINIATURES
        from polopt.tasks.text import text_names

        print("\nsmall text tasks, each with a model that begins half-way: " + ", ".join(MINIATURES))
        print("text tasks: " + ", ".join(text_names()))
        print("'polopt tasks TASK' shows the options of one.")
        return 0
    task = make(args.name)
    known: dict[str, Any] = getattr(task, "option_fields", dict)()
    print(f"{task.name} ({task.domain}){'' if known else ': no options'}")
    for name, (default, about) in known.items():
        print(f"  --options.{name:<28} {about} [{default!r}]")
    return 0


def parts(args: argparse.Namespace) -> int:
    """`polopt parts [SLOT]`."""
    from polopt.part import KINDS, make_part, part_names

    if args.kind is not None and args.kind not in KINDS:
        raise unknown("slot", args.kind, KINDS)
    for kind in KINDS if args.kind is None else (args.kind,):
        names = part_names(kind)
        print(f"{kind}:{'' if names else ' (none yet)'}")
        for name in names:
            try:
                part = make_part(kind, name)
            except TypeError:  # settings without a default
                print(f"  {name}")
                continue
            about = next(iter(inspect.cleandoc(type(part).__doc__ or "").splitlines()), "")
            print(f"  {name:<24} {about}")
            print(f"  {'':<24} {part.describe()}")
    return 0


def report(args: argparse.Namespace) -> int:
    """`polopt report RUN`."""
    from polopt.evidence.report.page import make_report
    from polopt.run import RunFolder

    print(make_report(RunFolder.open(args.run).path))
    return 0
