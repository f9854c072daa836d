"""Tables in README.md and docs/ that are computed from the code: `python tests/docs/tables.py` rewrites them.

A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n" for line in lines)


def _paper(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if re.fullmatch(r"\d{4}\.\d{5}", paper) else paper


def methods() -> str:
    """Name, parent, what it changes first, paper."""
    import polopt

    rows = []
    for name, m in polopt.methods().items():
        if m.parent is not None and m.parent.name not in polopt.methods():
            continue
        rows.append((f"`{name}`", m.title, f"`{m.parent.name}`" if m.parent else "", _paper(m.paper)))
    return _table(("name", "method", "a change of", "paper"), rows)


def warnings() -> str:
    """Title, what it means, what to do."""
    from polopt.evidence.watch.rules import RULES

    return _table(("warning", "why it matters", "what to do"), [(r.title, r.why, r.remedy) for r in RULES])


def parts() -> str:
    """Slot, name, first line of the part's description."""
    from polopt.part import KINDS, make_part, part_names

    rows = []
    for kind in KINDS:
        for name in part_names(kind):
            part = make_part(kind, name)
            rows.append((kind, f"`{name}`", next(iter(inspect.cleandoc(type(part).__doc__ or "").splitlines()), "")))
    return _table(("slot", "part", "what it does"), rows)


def neutral() -> str:
    """Method, parent, slot, what is equal."""
    import polopt
    from polopt.evidence.proof.difference import identity
    from polopt.evidence.proof.sides import called, loss_parts

    rows = []
    for name, m in polopt.methods().items():
        if m.parent is None or (m.parent.name not in polopt.methods()):
            continue
        mine, theirs = loss_parts(m), loss_parts(m.parent)
        for slot, value in m.neutral.items():
            what = identity(called(mine.get(slot)), called(theirs.get(slot)), value) if value else "none exists"
            rows.append((f"`{name}`", f"`{m.parent.name}`", f"`{slot}`", what))
    return _table(("method", "parent", "slot", "no difference"), rows)


def conditions() -> str:
    """Name, meaning."""
    from polopt.evidence.proof.batches import CONDITIONS

    return _table(
        ("condition", "batches"),
        [(f"`{n}`", " ".join(inspect.cleandoc(c.apply.__doc__ or c.words).split())) for n, c in CONDITIONS.items()],
    )


def data_options() -> str:
    """Options of data tasks with defaults."""
    from polopt.tasks.data import DataTask

    options = DataTask("data:prompts/", {"reward": "exact"}).option_fields()
    return _table(
        ("option", "default", "meaning"),
        [(f"`{n}`", f"`{d!r}`" if d not in ("", None) else "", h) for n, (d, h) in options.items()],
    )


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (methods, warnings, parts, data_options, neutral, conditions)}


def filled(text: str) -> str:
    """The page with all its tables computed anew."""
    return MARK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (after := filled(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"rewrote {page.relative_to(ROOT)}")
