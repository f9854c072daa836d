"""Tables in README.md and docs/ that are computed from the code: `python tests/docs/tables.py` rewrites them.

A table, or what a command printed, stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n" for line in lines)


def _paper(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if re.fullmatch(r"\d{4}\.\d{5}", paper) else paper


def methods() -> str:
    """Name, parent, family, paper; families one after the other, parents before children."""
    import polopt

    listed = {n: m for n, m in polopt.methods().items() if m.parent is None or m.parent.name in polopt.methods()}
    families = ("onpolicy", "language", "preference", "generative", "offpolicy", "offline")
    ranked = sorted(listed, key=lambda n: families.index(f) if (f := listed[n].family) in families else len(families))
    rows = [
        (f"`{n}`", listed[n].title, listed[n].family, f"`{p.name}`" if (p := listed[n].parent) else "", _paper(listed[n].paper))
        for n in ranked
    ]
    return _table(("name", "method", "family", "a change of", "paper"), rows)


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


def papers() -> str:
    """Every method with what is stored about it: identities tested, evidence, certificate."""
    import polopt
    from polopt.evidence.proof import stored

    rows = []
    for name, m in polopt.methods().items():
        known = stored.summary(m)
        proof = known["certificate"]
        word = stored.words(m)[1]
        certified = "-" if proof is None else f"{word} {_day(proof)}"
        link = f"[`{name}`](#{name})"
        parent = f"`{m.parent.name}`" if m.parent else ""
        paper = ", ".join(x for x in (_paper(m.paper), str(m.year or "")) if x)
        rows.append((link, paper, parent, str(len(known["identities"])), _evidence(m, known["evidence"]), certified))
    return _table(("method", "paper", "a change of", "identities", "evidence", "certificate"), rows)


def claims() -> str:
    """A section for each method: the paper's claim, its miniature, what came out, what is certified."""
    import polopt
    from polopt.evidence.proof import stored

    sections = []
    for name, m in polopt.methods().items():
        known = stored.summary(m)
        found, proof, mini = known["evidence"], known["certificate"], m.miniature
        lines = [f"## {name}", f"{m.title}, {_paper(m.paper)}. *The paper's claim:* {' '.join(m.claim.split())}"]
        if mini is not None:
            other = mini.baseline or (m.parent.name if m.parent else "itself before training")
            seeds = f"seeds {mini.runs[0]} to {mini.runs[-1]}"
            tested = found["tested"] if found else mini.claim
            lines.append(f"*In small:* {tested} (`{mini.task}`, {mini.budget}, {seeds}, against {other})")
        lines.append(f"*Evidence:* {found['sentence']} ({_day(found)})" if found else "*Evidence:* none yet.")
        lines.append(f"*Certificate:* {proof['line']} ({_day(proof)})" if proof else "*Certificate:* none yet.")
        if known["identities"]:
            lines.append("*Identities tested:*\n\n" + "\n".join(f"- {t['text']}" for t in known["identities"]))
        sections.append("\n\n".join(lines))
    return "\n" + "\n\n".join(sections) + "\n\n"


def _day(entry: dict[str, Any]) -> str:
    return str(entry["date"] or "")[:10]


def _evidence(method: Any, found: dict[str, Any] | None) -> str:
    from polopt.evidence.proof import miniature

    if found is None:
        return "-"
    gap = found["difference"] or {}
    interval = "" if gap.get("low") is None else f" [{gap['low']:.3g}, {gap['high']:.3g}]"
    number = f"{gap['mean']:+.3g}{interval}" if gap.get("mean") is not None else ""
    m = miniature.miniature_of(method)
    return f"{found['result']}: {miniature.metric_name(m)} {number} against `{found['baseline']}` ({miniature.goal(m)} expected)"


def certificate() -> str:
    """What certifying PPO printed."""
    return _printed("polopt certify ppo", "certificate", "line")


def experiment() -> str:
    """What the experiment of Dr. GRPO gave."""
    return _printed("polopt evidence dr-grpo --again", "evidence", "sentence", "result")


def _printed(command: str, kind: str, text: str, word: str = "") -> str:
    import polopt
    from polopt.evidence.proof import stored

    name = command.split()[2]
    found = stored.summary(polopt.method(name))[kind]
    shown = "nothing is stored yet" if found is None else f"{name}: {found[word]}: {found[text]}" if word else found[text]
    lines = textwrap.wrap(shown, 116, break_long_words=False, break_on_hyphens=False)
    return "\n" + "".join(f"    {line}\n" for line in (f"$ {command}", *lines)) + "\n"


FUNCTIONS = (methods, warnings, parts, data_options, neutral, conditions, papers, claims, certificate, experiment)
TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in FUNCTIONS}


def filled(text: str) -> str:
    """The page with all its tables computed anew."""
    return MARK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (after := filled(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"rewrote {page.relative_to(ROOT)}")
