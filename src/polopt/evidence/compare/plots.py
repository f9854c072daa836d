"""Pictures of a comparison: learning curves with bands, and final scores by seed; for the page (themed SVG), as PNG and as SVG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from polopt.evidence.markup import plain, ruled, themed, write
from polopt.evidence.report.curves import tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Column = Float64[np.ndarray, " n"]

# Six colours that stay apart in the common kinds of colour blindness, four dashes and twelve markers: the first twelve contestants
# differ in colour or dash, and all of them in their marker; 24 differ in colour or dash, and 72 in colour or marker (see `look`).
PRINT = ("#0060c0", "#d55e00", "#0a9f78", "#cc79a7", "#2b2f36", "#6e5500")
DASHES: tuple[Any, ...] = ("solid", (0, (6, 2.5)), (0, (1.5, 1.8)), (0, (7, 2, 1.5, 2)))
MARKERS = "os^DvPX*<>ph"
SIZES = {"*": 8.5, "P": 6.5, "X": 6.5, "p": 6.5, "h": 6.5}  # so that all look equally large; others 5.5
# Stand-ins that become CSS variables on the page
_STAND = tuple(f"#aa000{i}" for i in range(1, 7))
_INK, _GRID, _BAD = "#aa0010", "#aa0020", "#aa0030"
_VARIABLES = {c: f"var(--c{i})" for i, c in enumerate(_STAND, 1)} | {_INK: "var(--muted)", _GRID: "var(--grid)", _BAD: "var(--bad)"}


@dataclass(frozen=True)
class Curve:
    """A contestant's curve. x, mid, low, high: [n], NaN where there is no number; place: its number, which gives its look.

    marks: where its own runs were evaluated, and so where its markers may be; None where that is not the same for its runs.
    """

    name: str
    place: int
    x: Column
    mid: Column
    low: Column
    high: Column
    marks: Column | None = None


@dataclass(frozen=True)
class Strip:
    """A contestant's final scores: one dot per seed, the middle and its interval (NaN where there is none).

    failed: [n], scores that failed runs count as.
    """

    name: str
    place: int
    dots: Column
    failed: Column
    mid: float
    low: float
    high: float


@dataclass(frozen=True)
class Picture:
    """An SVG element with what is needed to find a value in it: box is left, top, width, height of the axes in its units."""

    svg: str
    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]


def look(place: int) -> tuple[int, Any, str]:
    """Number of the colour (from 0), dash and marker of a contestant."""
    turned = place + place // len(MARKERS)  # one further with each dozen, or the combinations of the first one would come again
    return place % len(PRINT), DASHES[turned % len(DASHES)], MARKERS[turned % len(MARKERS)]


def thin(curve: Curve, points: int = 200) -> Curve:
    """The curve with at most `points` points, evenly spread over its own, first and last kept."""
    n = len(curve.x)
    if n <= points:
        return curve
    keep = np.unique(np.linspace(0, n - 1, points).round().astype(int))
    return replace(curve, x=curve.x[keep], mid=curve.mid[keep], low=curve.low[keep], high=curve.high[keep])


# ------------------------------------------------------------------------------------------------------- learning curves
def draw_curves(curves: Sequence[Curve], xlabel: str, ylabel: str, *, width: int, height: int, key: str) -> Picture:
    """Learning curves for the page; pixels are user units, it scales with its container. key: names this picture's ids."""
    left, right, top, bottom = 50, 16, 12, 44
    box = (float(left), float(top), float(width - left - right), float(height - top - bottom))
    with _style():
        figure = _figure(width, height)
        axes = figure.add_axes((left / width, bottom / height, box[2] / width, box[3] / height))
        _plot(axes, curves, _STAND, _INK, _GRID, named=True)
        axes.set_xlabel(xlabel, color=_INK, fontsize=12, labelpad=6)
        x, y = axes.get_xlim(), axes.get_ylim()
        label = f"{ylabel} against {xlabel} for {len(curves)} contestant{'s' if len(curves) != 1 else ''}, as in the table below"
        return Picture(themed(_svg(figure), _VARIABLES, label, key), box, (x[0], x[1]), (y[0], y[1]))


def save_curves(png: Path, svg: Path, curves: Sequence[Curve], title: str, xlabel: str, ylabel: str, note: str) -> None:
    """The main plot on white with a legend, as a picture for a paper draft or a message."""
    with _style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        columns = 1 if len(curves) <= 3 else 2 if len(curves) <= 6 else 3
        lines = -(-len(curves) // columns)
        figure = _figure(760, 440 + 20 * lines, dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _plot(axes, curves, PRINT, "#3d444d", "#e3e5e8", named=False)
        axes.set_title(plain(_short(title, 80)), loc="left", fontsize=13)
        axes.set_xlabel(f"{plain(xlabel)}\n{plain(note)}" if note else plain(xlabel), fontsize=11)
        axes.set_ylabel(plain(_short(ylabel, 40)), fontsize=11)
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=11, handlelength=3.4)
        for path, kind, dpi in ((png, "png", 160), (svg, "svg", 72)):
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=dpi, facecolor="white", metadata={"Date": None} if kind == "svg" else None)
            write(path, out.getvalue())


def _plot(axes: Axes, curves: Sequence[Curve], colours: Sequence[str], ink: str, grid: str, *, named: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for curve in curves:
        place, dash, marker = look(curve.place)
        colour, gid = colours[place], f"series:{curve.place}" if named else None
        good = np.isfinite(curve.mid) & np.isfinite(curve.x)
        if not good.any():
            continue
        x, mid, low, high = (v[good] for v in (curve.x, curve.mid, curve.low, curve.high))
        if np.isfinite(low).any():
            axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0, gid=gid)
        x, mid, marked = _marked(x, mid, curve)
        axes.plot(
            x, mid, color=colour, linewidth=1.9, linestyle=dash, marker=marker, markersize=SIZES.get(marker, 5.5),
            markevery=marked, markeredgewidth=0, label=plain(_short(curve.name, 34)), gid=gid, clip_on=False,
        )  # fmt: skip
    _limits(axes, curves)
    axes.xaxis.set_major_locator(MaxNLocator(6 if axes.bbox.width > 500 else 4))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(tick))
    ruled(axes, ink, grid, "y")


def _marked(x: Column, mid: Column, curve: Curve) -> tuple[Column, Column, list[int]]:
    """The line with its markers' points among its own, and which these are: about nine of the contestant's evaluations."""
    at = x if curve.marks is None else curve.marks[(curve.marks >= x[0]) & (curve.marks <= x[-1])]
    every = max(len(at) // 9, 1)
    first = (curve.place * max(every // 4, 1)) % every  # markers of several curves do not fall on each other
    marks = at[first::every]
    points = np.union1d(x, marks)
    return points, np.interp(points, x, mid), np.searchsorted(points, marks).tolist()


def _limits(axes: Axes, curves: Sequence[Curve]) -> None:
    x = np.concatenate([c.x[np.isfinite(c.mid)] for c in curves] or [np.zeros(0)])
    y = np.concatenate([c.mid for c in curves] or [np.zeros(0)])
    bands = np.concatenate([v for c in curves for v in (c.low, c.high)] or [np.zeros(0)])
    x, y = x[np.isfinite(x)], y[np.isfinite(y)]
    if not len(x) or not len(y):
        axes.set(xlim=(0, 1), ylim=(0, 1))
        return
    end = float(x.max())
    start = 0.0 if float(x.min()) <= 0.2 * end else float(x.min())
    axes.set_xlim(*((start, end) if end > start else (start - 0.5, start + 0.5)))
    axes.set_ylim(*_room(*frame(y.tolist(), bands[np.isfinite(bands)].tolist())))


def frame(values: Sequence[float], bounds: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis: all values, and of their bounds as much as leaves the values apart.

    Bounds have half as much room on either side as the values take, or twice as much as is usual for them: one interval that is a
    hundred times as wide as the others does not flatten everything else.
    """
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    outside = sorted(max(low - b, b - high, 0.0) for b in bounds)
    usual = outside[(len(outside) - 1) // 2] if outside else 0.0
    room = max(0.5 * (high - low), 2 * usual)
    return max(min([low, *bounds]), low - room), min(max([high, *bounds]), high + room)


def _room(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low)
    if not room > 1e-12 * abs(high):
        room = 0.1 * abs(high) or 1.0
    return (0.0 if low == 0 else low - room), high + room


# --------------------------------------------------------------------------------------------------------- final scores
def draw_strips(strips: Sequence[Strip], xlabel: str, *, width: int, key: str) -> str:
    """A row per contestant: marks are seeds (crosses failed ones), the bar is the interval, the upright line its middle."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    names = [_short(s.name, 30 if width > 600 else 15) for s in strips]
    left = min(max((len(n) for n in names), default=4) * 6.7 + 20, 0.42 * width)
    height = 34 * len(strips) + 56
    with _style():
        figure = _figure(width, height)
        axes = figure.add_axes((left / width, 46 / height, (width - left - 18) / width, (height - 54) / height))
        shown, bounds = [], []
        for row, strip in enumerate(strips):
            place, _, marker = look(strip.place)
            colour, gid = _STAND[place], f"series:{strip.place}"
            dots, failed = strip.dots[np.isfinite(strip.dots)], strip.failed[np.isfinite(strip.failed)]
            shown += [*dots.tolist(), *failed.tolist(), *([strip.mid] if math.isfinite(strip.mid) else [])]
            bounds += [v for v in (strip.low, strip.high) if math.isfinite(v)]
            if math.isfinite(strip.low) and math.isfinite(strip.high):
                axes.plot(
                    [strip.low, strip.high], [row, row], color=colour, linewidth=9, alpha=0.25, solid_capstyle="butt", gid=gid
                )
            axes.plot(
                dots, np.full(len(dots), row), linestyle="none", marker=marker, markersize=SIZES.get(marker, 5.5), color=colour,
                alpha=0.65, markeredgewidth=0, gid=gid,
            )  # fmt: skip
            axes.plot(
                failed, np.full(len(failed), row), linestyle="none", marker="x", markersize=6, markeredgewidth=1.6, color=_BAD
            )
            if math.isfinite(strip.mid):
                axes.plot([strip.mid, strip.mid], [row - 0.34, row + 0.34], color=colour, linewidth=2.6, gid=gid)
            else:
                axes.text(0.0, row, " no finished run", transform=axes.get_yaxis_transform(), va="center", color=_INK, fontsize=11)
        axes.set_xlim(*_room(*frame(shown, bounds)))
        axes.set_ylim(len(strips) - 0.5, -0.5)
        axes.set_yticks(range(len(strips)), [plain(n) for n in names])
        axes.xaxis.set_major_locator(MaxNLocator(6 if width > 600 else 4))
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
        ruled(axes, _INK, _GRID, "x")
        axes.tick_params(axis="y", labelsize=12)
        axes.set_xlabel(xlabel, color=_INK, fontsize=12, labelpad=6)
        return themed(_svg(figure), _VARIABLES, f"{xlabel} by seed, as in the list of runs below", key)


def swatch(place: int) -> str:
    """A contestant's line and marker, for legends and tables."""
    from matplotlib.markers import MarkerStyle
    from matplotlib.path import Path as Outline

    number, dash, marker = look(place)
    style = MarkerStyle(marker)
    outline = style.get_path().transformed(style.get_transform())
    letters = {
        int(Outline.MOVETO): "M", int(Outline.LINETO): "L", int(Outline.CURVE3): "Q", int(Outline.CURVE4): "C",
        int(Outline.CLOSEPOLY): "Z",
    }  # fmt: skip
    d = "".join(
        letters[int(code)]
        + ("" if code == Outline.CLOSEPOLY else " ".join(f"{v:.1f}" for v in _place(points, 1.5 * SIZES.get(marker, 5.5))))
        for points, code in outline.iter_segments(curves=True, simplify=False)
    )
    dashes = "" if dash == "solid" else f' stroke-dasharray="{" ".join(f"{v * 1.4:g}" for v in dash[1])}"'
    return (
        f'<svg class="swatch" viewBox="0 0 34 14" width="34" height="14" aria-hidden="true" style="color:var(--c{number + 1})">'
        f'<path d="M1 7H33" stroke="currentColor" stroke-width="2"{dashes}/><path d="{d}" fill="currentColor"/></svg>'
    )


def _place(points: Any, size: float) -> list[float]:
    """Unit coordinates (y up) to the middle of the swatch."""
    return [17 + size * float(v) if i % 2 == 0 else 7 - size * float(v) for i, v in enumerate(points)]


# ------------------------------------------------------------------------------------------------------------- utensils
@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in the page, the browser's fonts have them
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "polopt", "path.simplify_threshold": 0.3}):
            yield


def _figure(width: float, height: float, **settings: Any) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), **({"dpi": 72} | settings))


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return out.getvalue()


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


__all__ = ["Curve", "Picture", "Strip", "draw_curves", "draw_strips", "frame", "look", "save_curves", "swatch", "thin"]
