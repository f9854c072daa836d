"""Tables of the comparison page, as HTML that reads well without a script; the script sorts and filters them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polopt.evidence.compare.plots import frame, swatch
from polopt.evidence.markup import attribute, escape
from polopt.evidence.report.words import duration, size
from polopt.evidence.watch.diagnostics import number

Tree = Mapping[str, Any]
NONE = '<span class="missing">–</span>'


@dataclass(frozen=True)
class Head:
    """A column. first: the order that the first click gives; empty: not sortable; num: aligned to the right."""

    title: str
    first: str = "ascending"
    num: bool = True
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """html: what is shown; v: what it sorts by (None: unknown, last; empty text: sorts by what is shown)."""

    html: str
    v: float | str | None = ""
    mark: str = ""
    head: bool = False


def number_or_dash(x: float | None) -> str:
    """A number for people, or a dash."""
    return NONE if x is None or not math.isfinite(x) else number(x)


def numeric(x: float | None, kind: str = "") -> Cell:
    """A cell with a number. kind: seconds, bytes, percent, p, or plain."""
    if x is None or not math.isfinite(x):
        return Cell(NONE, None)
    kinds = {"seconds": duration, "bytes": size, "percent": "{:.0%}".format, "p": _p}
    return Cell(escape(kinds.get(kind, number)(x)), float(x))


def _p(x: float) -> str:
    return "<0.0001" if x < 1e-4 else f"{x:.4f}" if x < 1e-3 else f"{x:.3f}"


def table(heads: Sequence[Head], rows: Iterable[tuple[Mapping[str, str], Sequence[Cell]]], name: str) -> str:
    """A sortable table in a box that scrolls on its own. rows: attributes of the row (data-...), and its cells."""
    top = "".join(_head(h) for h in heads)
    body = "".join(
        f"<tr{''.join(attribute(f'data-{k}', v) for k, v in data.items())}>"
        + "".join(_cell(cell, head) for cell, head in zip(cells, heads, strict=True))
        + "</tr>"
        for data, cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<table class="sortable" id="{_id(name)}">'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _head(h: Head) -> str:
    about = attribute("title", h.about)
    inside = f'<button type="button"{about}>{escape(h.title)}</button>' if h.first else f"<span{about}>{escape(h.title)}</span>"
    given = attribute("class", "num" if h.num else "") + attribute("data-first", "descending" if h.first == "descending" else "")
    return f'<th scope="col"{given}>{inside}</th>'


def _cell(cell: Cell, head: Head) -> str:
    given = attribute("class", " ".join(x for x in ("num" if head.num else "", cell.mark) if x))
    given += ' data-v=""' if cell.v is None else attribute("data-v", cell.v)  # empty: unknown; none: its text
    return f'<th scope="row"{given}>{cell.html}</th>' if cell.head else f"<td{given}>{cell.html}</td>"


def _id(name: str) -> str:
    return "table-" + "".join(c if c.isalnum() else "-" for c in name.lower())


def tools(name: str, fields: Sequence[str]) -> str:
    """Filters over a table; shown only where there is a script."""
    return f'<div class="tools scripted" data-for="{_id(name)}">{"".join(fields)}<output aria-live="polite"></output></div>'


def text_filter(label: str, key: str) -> str:
    """A box that filters rows by a part of a text."""
    return f'<label>{escape(label)} <input type="search" data-key="{key}" autocomplete="off" spellcheck="false"></label>'


def choice_filter(label: str, key: str, values: Sequence[str]) -> str:
    """A list that filters rows by one value."""
    options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
    return f'<label>{escape(label)} <select data-key="{key}"><option value="">all</option>{options}</select></label>'


def who(name: str, place: int, sub: str = "") -> Cell:
    """Name of a contestant with its look in the plots."""
    below = f'<span class="sub" title="{escape(sub)}">{escape(sub)}</span>' if sub else ""
    inside = f'<div class="who">{swatch(place)}<span title="{escape(name)}">{escape(name)}{below}</span></div>'
    return Cell(inside, "", head=True)


def estimate(e: Tree | None, scale: tuple[float, float], place: int, *, digits: int = 2, zero: bool = False) -> Cell:
    """A number with its interval, with so many decimals and as a bar on the column's scale; zero: with a line at nought."""
    if e is None or e["value"] is None:
        return Cell(NONE, None)
    middle, low, high = (e[k] for k in ("value", "low", "high"))

    def at(x: float) -> float:
        span = scale[1] - scale[0]
        return 100 * min(max((x - scale[0]) / span, 0.0), 1.0) if span > 0 else 50.0

    words = inside = ""
    if low is not None and high is not None:
        words = f"[{fixed(low, digits)}, {fixed(high, digits)}]"
        inside = f'<i style="left:{at(low):.1f}%;right:{100 - at(high):.1f}%"></i>'
    nought = f'<u style="left:{at(0.0):.1f}%"></u>' if zero else ""
    bar = f'{nought}{inside}<b style="left:{at(middle):.1f}%"></b>'
    html = (
        f'<div class="est"><span class="value">{fixed(middle, digits)}</span><span class="range">{words}</span>'
        f'<span class="bar" aria-hidden="true" style="color:var(--c{place % 6 + 1})">{bar}</span></div>'
    )
    return Cell(html, float(middle))


def scale_of(estimates: Iterable[Tree | None], *, zero: bool = False) -> tuple[float, float]:
    """Ends of the bars of a column: all numbers, with as much of their intervals as leaves the numbers apart."""
    known = [e for e in estimates if e and e["value"] is not None]
    values = [e["value"] for e in known] + [0.0] * zero
    return frame(values, [e[k] for e in known for k in ("low", "high") if e[k] is not None])


def decimals(estimates: Iterable[Tree | None]) -> int:
    """Decimals of a column: three digits of the largest number, two of how far all are apart, at most two of an interval."""
    known = [e for e in estimates if e and e["value"] is not None]
    values = [float(e["value"]) for e in known]
    widths = [w for e in known if e["low"] is not None and (w := float(e["high"]) - float(e["low"])) > 0]
    largest = 3 - _digits(max(map(abs, values), default=0.0))
    apart = 2 - _digits(max(values) - min(values)) if len(values) > 1 else largest
    finest = 2 - _digits(min(widths)) if widths else largest + 3
    return min(max(0, min(max(largest, min(apart, largest + 3)), finest)), 9)


def _digits(x: float) -> int:
    """Digits before the point: 3 for 250, -1 for 0.025."""
    return math.floor(math.log10(x)) + 1 if x > 0 else 3


def fixed(x: float, digits: int, *, sign: bool = False) -> str:
    """A number with so many decimals, with powers of ten where it is huge."""
    text = f"{x:,.{digits}f}" if abs(x) < 1e7 else f"{x:.2e}"
    if not x or (abs(x) < 1e7 and not float(f"{x:.{digits}f}")):
        return text.removeprefix("-")
    return ("+" if sign and x > 0 else "") + text.replace("-", "−")


def badge(word: str, text: str | None = None) -> str:
    """A coloured word."""
    css = "".join(c for c in word if c.isalnum())
    return f'<span class="badge {css}">{escape(word if text is None else text)}</span>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns: what, and its value."""
    body = "".join(f'<tr><td>{escape(k)}</td><td class="value">{escape(v)}</td></tr>' for k, v in rows)
    return f'<table class="facts">{body}</table>'


__all__ = [
    "NONE", "Cell", "Head", "badge", "choice_filter", "decimals", "estimate", "facts", "fixed", "number_or_dash", "numeric",
    "scale_of", "table", "text_filter", "tools", "who",
]  # fmt: skip
