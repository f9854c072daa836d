"""The page of a comparison: one HTML file that opens without a network, the same numbers as JSON, and the main plot as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polopt.evidence.compare import sections
from polopt.evidence.compare.numbers import numbers, record
from polopt.evidence.compare.plots import Curve, Picture, Strip, draw_curves, draw_strips, save_curves, swatch, thin
from polopt.evidence.compare.results import Comparison
from polopt.evidence.compare.tables import number_or_dash
from polopt.evidence.markup import escape, strict, write
from polopt.evidence.watch.diagnostics import number

if TYPE_CHECKING:
    from polopt.evidence.compare.analysis import Analysis

Tree = Mapping[str, Any]
SENTENCES = 5  # of the verdict before the rest is folded, so that the plot is near
WIDE, NARROW = (1100, 400), (400, 300)  # pixels: pictures for windows and for phones, so that labels keep their size


def make_page(comparison: Comparison, analysis: Analysis, out: Path) -> Path:
    """Write `index.html`, `comparison.json`, `curves.png` and `curves.svg` into `out` and return the path of the page.

    Links to run folders are relative to `out`. Works whatever finished: one contestant, one seed, no finished run at all.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found = numbers(comparison, analysis, out)
    kept = json.dumps(record(comparison, analysis, out), allow_nan=False, separators=(",", ":"))
    write(out / "comparison.json", f"{kept}\n".encode())
    axes = {axis: _curves(found, axis) for axis in ("budget", "seconds")}
    note = (
        "Interquartile mean over seeds; bands are 95 % intervals" if any(np.isfinite(c.low).any() for c in axes["budget"]) else ""
    )
    save_curves(out / "curves.png", out / "curves.svg", axes["budget"], found["title"], found["unit"], found["metric"], note)
    page = out / "index.html"
    write(page, _page(found, axes).encode())
    return page


def _curves(found: Tree, axis: str) -> list[Curve]:
    out = []
    for c in found["contestants"]:
        curve = c["curves"].get(axis)
        if curve and curve["x"]:
            x, mid, low, high = (
                np.array([np.nan if v is None else v for v in curve[k]], float) for k in ("x", "mid", "low", "high")
            )
            marks = np.array(curve["marks"], float) if "marks" in curve else None
            out.append(thin(Curve(c["name"], c["place"], x, mid, low, high, marks)))
    return out


# ---------------------------------------------------------------------------------------------------------------- page
def _page(found: Tree, axes: Mapping[str, list[Curve]]) -> str:
    assets = files("polopt") / "assets"
    style = "".join((assets / name).read_text(encoding="utf-8") for name in ("report.css", "compare.css"))
    script = (assets / "compare.js").read_text(encoding="utf-8")
    figure, data = _learning(found, axes)
    body = [
        _top(found),
        _warnings(found),
        figure,
        sections.results(found),
        _strips(found),
        sections.pairs(found),
        sections.cost(found),
        sections.runs(found),
        sections.repeat(found),
        '<footer>Made by polopt. The same numbers: <a href="comparison.json">comparison.json</a>; the main plot: '
        '<a href="curves.png">curves.png</a>, <a href="curves.svg">curves.svg</a>.</footer>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'  # keeps browsers from asking for one
        f"<title>{escape(found['title'])}</title>\n<style>\n{style}</style>\n"
        "<noscript><style>.scripted { display: none !important; }</style></noscript></head>\n<body><main>\n"
        + "\n".join(body)
        + f'\n</main>\n<script type="application/json" id="data">{_embedded(data)}</script>\n'
        + f"<script>\n{script}</script>\n</body></html>\n"
    )


def _embedded(data: Any) -> str:
    """JSON inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(strict(data), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _top(found: Tree) -> str:
    counts = [(word, sum(r["status"] == word for r in found["runs"])) for word in ("done", "failed", "unfinished")]
    marks = "".join(f'<span class="status {word}">{n} {word}</span>' for word, n in counts if n)
    budget = "" if found["budget"] is None else f"<span>{number(found['budget'])} {escape(found['unit'])} each</span>"
    seeds = len(found["seeds"])
    said = [f"<p>{escape(s)}</p>" for s in found["verdict"]]
    if len(said) > SENTENCES + 1:
        rest = "".join(said[SENTENCES:])
        said[SENTENCES:] = [f"<details><summary>{len(said) - SENTENCES} more sentences</summary>{rest}</details>"]
    return (
        f'<div class="brow"><span>polopt compare</span>{budget}<span>{seeds} seed{"" if seeds == 1 else "s"}</span>{marks}</div>'
        f"<h1>{escape(found['title'])}</h1>"
        f'<section class="verdict" aria-label="Verdict">{"".join(said)}</section>'
    )


def _warnings(found: Tree) -> str:
    items = "".join(f'<li class="finding"><p class="what">{escape(w)}</p></li>' for w in found["warnings"])
    items += "".join(f'<li class="finding note"><p class="what">{escape(w)}</p></li>' for w in found["notes"])
    return sections.section("Caveats", f'<ul class="findings plain">{items}</ul>' if items else "")


# ---------------------------------------------------------------------------------------------------------------- plots
def _learning(found: Tree, axes: Mapping[str, list[Curve]]) -> tuple[str, dict[str, Any]]:
    """The main figure, and what the script needs to answer to hover."""
    shown = {axis: curves for axis, curves in axes.items() if curves}
    if "budget" not in shown:
        return '<section><h2>Learning curves</h2><p class="quiet">No run has a score to draw.</p></section>', {"axes": {}}
    labels = {"budget": found["unit"], "seconds": "training seconds"}
    if found["unit"] == "seconds":  # the budget is time: one axis says it all
        shown.pop("seconds", None)
    plots, data = "", {"axes": {}, "curves": {}}  # type: tuple[str, dict[str, Any]]
    for axis, curves in shown.items():
        pictures: dict[str, Picture] = {
            f"{axis}-{name}": draw_curves(curves, labels[axis], found["metric"], width=w, height=h, key=f"{axis}-{name}")
            for name, (w, h) in (("wide", WIDE), ("narrow", NARROW))
        }
        inside = "".join(f'<div class="{n.split("-")[1]}" data-picture="{n}">{p.svg}</div>' for n, p in pictures.items())
        plots += f'<div data-axis-of="{axis}"{"" if axis == "budget" else " hidden"}>{inside}</div>'
        data["axes"][axis] = {
            "label": labels[axis],
            "rest": _rest(axis, found),
            "grid": _grid(curves),
            "pictures": {n: {"box": p.box, "xlim": p.x, "ylim": p.y} for n, p in pictures.items()},
        }
        data["curves"][axis] = [
            {"place": c.place} | {k: _digits(getattr(c, k)) for k in ("x", "mid", "low", "high")} for c in curves
        ]
    switch = ""
    if len(shown) > 1:
        buttons = "".join(
            f'<button type="button" data-axis="{axis}" aria-pressed="{str(axis == "budget").lower()}">{escape(labels[axis])}'
            "</button>"
            for axis in shown
        )
        switch = f'<div class="switch scripted" role="group" aria-label="Horizontal axis">{buttons}</div>'
    return (
        f'<section><h2>Learning curves</h2><figure class="panel hero curves"><div class="head"><h3>{escape(found["metric"])} '
        f'on {escape(found["task"])}</h3>{switch}</div><div class="plots">{plots}</div>'
        f'<p class="at" aria-live="off">{escape(_rest("budget", found))}</p>{_keys(found)}'
        f"<figcaption>{escape(_caption(found, shown['budget']))}</figcaption></figure></section>",
        data,
    )


def _rest(axis: str, found: Tree) -> str:
    return "At the end of each curve:" if axis == "budget" else "At the end of each curve, in training seconds:"


def _caption(found: Tree, curves: Sequence[Curve]) -> str:
    bands = any(np.isfinite(c.low).any() for c in curves)
    text = "Lines are interquartile means over seeds" + (", bands their 95 % intervals at each point." if bands else ".")
    return text + (" There is one seed only, so no interval." if len(found["seeds"]) == 1 else "")


def _grid(curves: Sequence[Curve]) -> list[float]:
    """Where the crosshair stops: the points of all curves, at most about 400."""
    x = np.unique(np.concatenate([c.x[np.isfinite(c.mid)] for c in curves]))
    return _digits(x if len(x) <= 400 else x[np.unique(np.linspace(0, len(x) - 1, 400).round().astype(int))])


def _digits(x: Any) -> list[Any]:
    """Six digits: more than a plot shows, and a third of the size."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in x.tolist()]


def _keys(found: Tree) -> str:
    """The legend: switches with the numbers at the crosshair."""
    items = ""
    for c in found["contestants"]:
        curve = c["curves"].get("budget")
        mid, low, high = (curve[k][-1] if curve else None for k in ("mid", "low", "high"))
        span = "" if low is None or high is None else f"[{number(low)}, {number(high)}]"
        name = escape(c["name"])
        items += (
            f'<li><button type="button" aria-pressed="true" title="Show or hide {name}"'
            f' data-place="{c["place"]}" data-name="{name}">'
            f'{swatch(c["place"])}<span class="name">{name}</span><span class="value">{number_or_dash(mid)}</span>'
            f'<span class="range">{span}</span></button></li>'
        )
    return f'<ul class="keys">{items}</ul>'


def _strips(found: Tree) -> str:
    """Final scores by seed."""
    strips = []
    for c in found["contestants"]:
        e = c["final"] or {}
        mid, low, high = (np.nan if e.get(k) is None else e[k] for k in ("value", "low", "high"))
        dots, failed = (np.array([s["final"] for s in c["seeds"] if s["failed"] is bad], float) for bad in (False, True))
        strips.append(Strip(c["name"], c["place"], dots, failed, mid, low, high))
    if not any(len(s.dots) for s in strips):
        return ""
    label = f"final {found['metric']}"
    wide, narrow = (draw_strips(strips, label, width=w, key=f"strips-{w}") for w in (WIDE[0], NARROW[0]))
    figure = f'<figure class="panel hero"><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'
    return sections.section(
        "Final scores by seed",
        figure,
        "Each mark is one seed (a red cross: a failed run, with the score it counts as); the upright line is the interquartile "
        "mean, the bar its 95 % interval.",
    )


__all__ = ["make_page"]
