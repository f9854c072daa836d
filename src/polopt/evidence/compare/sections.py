"""Sections of the comparison page: results, pairs, cost, runs, and how to repeat it; all from one tree of numbers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from polopt.evidence.compare.plots import swatch
from polopt.evidence.compare.statistics import MOST_SEEDS
from polopt.evidence.compare.tables import (
    NONE,
    Cell,
    Head,
    badge,
    choice_filter,
    decimals,
    estimate,
    facts,
    fixed,
    numeric,
    scale_of,
    table,
    text_filter,
    tools,
    who,
)
from polopt.evidence.markup import escape
from polopt.evidence.report.words import flatten

Tree = Mapping[str, Any]
MANY_PAIRS, MANY_RUNS = 15, 30  # from which their lists are folded


def section(title: str, body: str, quiet: str = "") -> str:
    """A heading, one line that says how to read it, and its body; nothing where there is no body."""
    if not body:
        return ""
    about = f'<p class="quiet">{escape(quiet)}</p>' if quiet else ""
    return f"<section><h2>{escape(title)}</h2>{about}{body}</section>"


# ------------------------------------------------------------------------------------------------------------- results
def results(found: Tree) -> str:
    """One row per contestant: final score and area under the curve with intervals, and how many runs count."""
    rows = found["contestants"]
    finals, areas = scale_of(c["final"] for c in rows), scale_of(c["area"] for c in rows)
    digits = [decimals(c[k] for c in rows) for k in ("final", "area")]
    best = "descending" if found["higher_is_better"] else "ascending"
    heads = [
        Head("Contestant", num=False),
        Head("Final score", best, about="Interquartile mean over seeds of the last evaluation, with its 95 % interval"),
        Head("Mean over training", best, about="Interquartile mean over seeds of the area under the curve, per unit of budget"),
        Head("Runs", "descending", num=False, about="Runs that count, of all runs"),
    ]
    cells = [
        (
            {"name": c["name"]},
            [
                who(c["name"], c["place"], _sub(c)),
                estimate(c["final"], finals, c["place"], digits=digits[0]),
                estimate(c["area"], areas, c["place"], digits=digits[1]),
                _counts(c),
            ],
        )
        for c in rows
    ]
    filters = tools("Results", [text_filter("Contestant", "name")]) if len(rows) > 3 else ""
    return section(
        "Results",
        filters + table(heads, cells, "Results"),
        f"Interquartile means over seeds with 95 % intervals; {'higher' if found['higher_is_better'] else 'lower'} is better. "
        "Bars of a column share one scale.",
    )


def _sub(c: Tree) -> str:
    parts = [c["title"] if c["title"] and c["title"] != c["name"] else "", "external program" if c["command"] else ""]
    if c["settings"]:
        parts.append(", ".join(f"{k}={v}" for k, v in flatten(c["settings"])))
    if c["tuned"]:
        parts.append("tuned")
    return "; ".join(p for p in parts if p)


def _counts(c: Tree) -> Cell:
    total = c["done"] + c["failed"] + c["unfinished"]
    parts = [f"{c['done']} of {total}"]
    parts += [badge("failed", f"{c['failed']} failed")] if c["failed"] else []
    parts += [badge("unfinished", f"{c['unfinished']} unfinished")] if c["unfinished"] else []
    return Cell(" ".join(parts), float(c["done"]))


# --------------------------------------------------------------------------------------------------------------- pairs
def pairs(found: Tree) -> str:
    """Differences of final scores: a matrix for a glance, and lists with every number."""
    every = found["pairs"]
    if not every:
        return ""
    body = _matrix(found, every) if len(found["contestants"]) > 2 and found["baseline"] is None else ""
    final, auc = _pair_table(found, every, "final", "Pairs"), _pair_table(found, every, "auc", "Pairs over training")
    count = "The pair" if len(every) == 1 else f"All {len(every)} pairs"
    shown = "" if body and len(every) > MANY_PAIRS else " open"
    body += f"<details{shown}><summary>{count} in final scores, with intervals and p values</summary>{final}</details>"
    body += f"<details><summary>{count} in mean scores over training</summary>{auc}</details>"
    return section(
        "Pairs",
        body,
        "Differences are paired by seed; intervals and p values are corrected for the number of comparisons, so that an interval "
        "leaves out 0 exactly where the pair is decided. P(better) is the probability that a run of the first is better than one "
        "of the second.",
    )


def _pair_table(found: Tree, every: Sequence[Tree], measure: str, name: str) -> str:
    places = {c["name"]: c["place"] for c in found["contestants"]}
    outcomes = [p[measure] for p in every]
    scale = scale_of((o["corrected"] for o in outcomes), zero=True)
    digits = decimals(o["corrected"] for o in outcomes)
    heads = [
        Head("First", num=False),
        Head("Second", num=False),
        Head("First is", num=False, about="Decided where the corrected interval leaves out 0"),
        Head("Difference", "descending", about="First minus second, with its corrected interval"),
        Head("P(better)", "descending", about="Probability that the first is better than the second, with its interval"),
        Head("p", about="Two-sided, not corrected"),
        Head("p, corrected", about="Corrected for the number of comparisons"),
        Head("Seeds", about="Seeds that count for both"),
        Head(
            "Seeds needed",
            about="Of undecided pairs: about how many seeds in all would tell, if the true difference were the one seen",
        ),
    ]
    rows = []
    for p, o in zip(every, outcomes, strict=True):
        cells = [
            who(p["a"], places[p["a"]]),
            Cell(who(p["b"], places[p["b"]]).html),
            Cell(badge(o["decision"])),
            estimate(o["corrected"], scale, places[p["a"]], digits=digits, zero=True),
            _chance(o["improvement"]),
            numeric(o["difference"]["p"], "p"),
            numeric(o["p_adjusted"], "p"),
            numeric(p["seeds"]),
            _needed(o["seeds_needed"] if o["decision"] == "undecided" else None),
        ]
        rows.append(({"name": f"{p['a']} {p['b']}", "decision": o["decision"]}, cells))
    filters = ""
    if len(every) > 5:
        words = sorted({o["decision"] for o in outcomes})
        filters = tools(name, [text_filter("Contestant", "name"), choice_filter("First is", "decision", words)])
    return filters + table(heads, rows, name)


def _chance(e: Tree) -> Cell:
    span = "" if e["low"] is None else f'<span class="range">[{e["low"]:.2f}, {e["high"]:.2f}]</span>'
    return Cell(f'<div class="chance"><span class="value">{e["value"]:.2f}</span>{span}</div>', float(e["value"]))


def _needed(n: int | None) -> Cell:
    if n is None:
        return numeric(None)
    return Cell(f"over {MOST_SEEDS:,}" if n > MOST_SEEDS else f"{n:,}", float(n))


def _matrix(found: Tree, every: Sequence[Tree]) -> str:
    """Row minus column."""
    names = [c["name"] for c in found["contestants"]]
    known = {(p["a"], p["b"]): p for p in every}
    head = "".join(
        f'<th scope="col">{swatch(c["place"])}<br><span title="{escape(c["name"])}">{escape(c["name"])}</span></th>'
        for c in found["contestants"]
    )
    body, digits = "", decimals(p["final"]["corrected"] for p in every)
    for c in found["contestants"]:
        cells = "".join(_matrix_cell(known, c["name"], other, digits) for other in names)
        body += f"<tr>{_row_head(c)}{cells}</tr>"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Matrix of pairs"><table class="matrix"><thead><tr>'
        f'<th scope="col">row minus column</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _row_head(c: Tree) -> str:
    return f'<th scope="row">{who(c["name"], c["place"]).html}</th>'


def _matrix_cell(known: Mapping[tuple[str, str], Tree], a: str, b: str, digits: int) -> str:
    if a == b:
        return '<td class="self">·</td>'
    p, sign = (known[a, b], 1.0) if (a, b) in known else (known.get((b, a)), -1.0)
    if p is None:
        return f"<td>{NONE}</td>"
    o = p["final"]
    turned = {"better": "worse", "worse": "better"}
    decision = o["decision"] if sign > 0 else turned.get(o["decision"], o["decision"])
    difference, chance = sign * o["difference"]["value"], o["improvement"]["value"]
    mark = {"better": "▲ ", "worse": "▼ "}.get(decision, "")
    text = f"{mark}{fixed(difference, digits, sign=True)}"
    below = f"P {chance if sign > 0 else 1 - chance:.2f}"
    return f'<td class="{escape(decision)}" title="{escape(decision)}">{text}<span class="sub">{below}</span></td>'


# ---------------------------------------------------------------------------------------------------------------- cost
def cost(found: Tree) -> str:
    """Sample and wall-clock efficiency, and memory."""
    columns = found["cost"]
    heads = [Head("Contestant", num=False)] + [Head(c["title"], c["first"]) for c in columns]
    rows = []
    for c in found["contestants"]:
        cells = [who(c["name"], c["place"])]
        for column in columns:
            cells.append(numeric(c["cost"].get(column["key"]), column["kind"]))
        rows.append(({"name": c["name"]}, cells))
    if not any(cell.v is not None for _, cells in rows for cell in cells[1:]):
        return ""
    return section("Efficiency", table(heads, rows, "Efficiency"), found["cost_note"])


# ---------------------------------------------------------------------------------------------------------------- runs
def runs(found: Tree) -> str:
    """Every run with its status, score and folder."""
    every = found["runs"]
    if not every:
        return ""
    places = {c["name"]: c["place"] for c in found["contestants"]}
    best = "descending" if found["higher_is_better"] else "ascending"
    heads = [
        Head("Contestant", num=False), Head("Seed"), Head("Status", num=False), Head("Score", best), Head("Training time"),
        Head("Wall time"), Head("Folder", num=False), Head("Error", "", num=False),
    ]  # fmt: skip
    rows = []
    for run in every:
        link = f'<a href="{escape(quote(run["folder"]))}/">{escape(run["folder"])}</a>' if run["folder"] else NONE
        cells = [
            who(run["contestant"], places.get(run["contestant"], 0)),
            Cell(str(run["seed"]), float(run["seed"])),
            Cell(badge(run["status"])),
            numeric(run["score"]),
            numeric(run["seconds"], "seconds"),
            numeric(run["wall_seconds"], "seconds"),
            Cell(link),
            Cell(escape(run["error"]), mark="error"),
        ]
        rows.append(({"name": run["contestant"], "status": run["status"]}, cells))
    names = [c["name"] for c in found["contestants"]]
    filters = [
        choice_filter("Contestant", "name", names),
        choice_filter("Status", "status", sorted({r["status"] for r in every})),
    ]
    body = tools("Runs", filters) + table(heads, rows, "Runs")
    bad = sum(r["status"] != "done" for r in every)
    label = f"{len(every)} runs" + (f", {bad} of them failed or unfinished" if bad else ", all done")
    shown = "" if len(every) > MANY_RUNS else " open"
    return section("Runs", f"<details{shown}><summary>{label}</summary>{body}</details>")


# --------------------------------------------------------------------------------------------------------------- repeat
def repeat(found: Tree) -> str:
    """The command, what was set, with which versions on which machine, and how the numbers came about."""
    given = [
        ("task", found["task"]),
        ("budget", f"{found['budget']:,g} {found['unit']}" if found["budget"] is not None else "unknown"),
        ("metric", f"{found['metric']} ({'higher' if found['higher_is_better'] else 'lower'} is better)"),
        ("seeds", f"{len(found['seeds'])}: {', '.join(map(str, found['seeds'][:40]))}{' …' if len(found['seeds']) > 40 else ''}"),
        *([("episodes per evaluation", str(found["episodes"]))] if found["episodes"] else []),
        *([("runs side by side", str(found["jobs"]))] if found["jobs"] else []),
        *([("compared with", found["baseline"])] if found["baseline"] else []),
        *flatten(found["settings"]),
    ]
    body = f"<pre>{escape(found['command'])}</pre>" if found["command"] else '<p class="quiet">The command was not recorded.</p>'
    body += '<div class="pair"><div><h3>Settings of all contestants</h3>' + facts(given) + "</div>"
    body += "<div><h3>Versions and machine</h3>" + _versions(found["versions"]) + "</div></div>"
    own = [(f"{c['name']}: {k}", text) for c in found["contestants"] for k, text in _own(c)]
    if own:
        shown = " open" if len(own) <= 12 else ""
        body += f"<details{shown}><summary>Settings of single contestants ({len(own)})</summary>{facts(own)}</details>"
    how = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in found["how"])
    return section("Repeat it", body) + section("How the numbers are computed", f'<dl class="how">{how}</dl>')


def _own(c: Tree) -> list[tuple[str, str]]:
    out = [("method", c["method"])] if c["method"] and c["method"] != c["name"] else []
    out += [("command", c["command"] if isinstance(c["command"], str) else shlex.join(c["command"]))] if c["command"] else []
    out += [("tuned", "the preset stays")] if c["trials"] and not c["tuned"] else []
    return out + flatten(c["settings"]) + [(k, f"{v} (tuned)") for k, v in flatten(c["tuned"])]


def _versions(groups: Sequence[Tree]) -> str:
    if not groups:
        return facts([("unknown", "not recorded")])
    out = ""
    for group in groups:
        if len(groups) > 1:
            out += f'<p class="quiet">{escape(group["of"])}</p>'
        out += facts([(k, v) for k, v in flatten(group["versions"]) if v != "None"])
    return out


__all__ = ["cost", "pairs", "repeat", "results", "runs", "section"]
