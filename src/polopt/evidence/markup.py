"""What all pages share: escaping, strict JSON, files replaced in one step, and pictures whose colours follow the theme."""

from __future__ import annotations

import html
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def escape(x: object) -> str:
    """Text for HTML, inside elements and inside quoted attributes."""
    return html.escape(str(x), quote=True)


def attribute(name: str, value: object) -> str:
    """An HTML attribute with a space before it; nothing where the value is None or empty text."""
    return "" if value is None or value == "" else f' {name}="{escape(value)}"'


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def strict(x: Any) -> Any:
    """The same tree as strict JSON: numbers that are not finite become null, arrays lists, unknown types text."""
    if isinstance(x, Mapping):
        return {str(k): strict(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [strict(v) for v in x]
    if x is None or isinstance(x, str | bool | int):
        return x
    if isinstance(x, float):
        return float(x) if math.isfinite(x) else None
    if hasattr(x, "tolist"):  # arrays and numbers of NumPy
        return strict(x.tolist())
    return str(x)


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader never sees half a page."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def themed(svg: str, colours: Mapping[str, str], label: str, prefix: str) -> str:
    """The <svg> element alone of a picture drawn by matplotlib.

    colours: stand-ins (`#aa00..`) -> CSS values, so that one picture serves light and dark; label: its name for screen
    readers; prefix: makes its ids unlike those of all other pictures on the page. Coordinates are cut to a tenth of a pixel.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"#aa00[0-9a-f]{2}", lambda m: colours.get(m[0], m[0]), svg)
    svg = re.sub(r'(?<= )(?:d|x|y|transform)="[^"]*"', lambda m: _SHORT.sub(_shorten, m[0]), svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = _own_ids(svg, prefix)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    opening = re.search(r'viewBox="([^"]*)"', svg)
    box = opening[1] if opening else "0 0 400 200"
    body = svg[svg.index(">") + 1 :]
    head = f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"\s*\n\s*", "\n", head + body)


def _own_ids(svg: str, prefix: str) -> str:
    """Keep only ids that something refers to, under names of this picture's own; `series:3` becomes a class."""
    used = {name: f"{prefix}-{i}" for i, name in enumerate(dict.fromkeys(re.findall(r'(?:href="|url\()#([^")]+)', svg)))}
    svg = re.sub(r' id="series:(\d+)"', r' class="series s\1"', svg)
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{used[m[1]]}"' if m[1] in used else "", svg)
    return re.sub(r'((?:href="|url\()#)([^")]+)', lambda m: m[1] + used[m[2]], svg)


_SHORT = re.compile(r"-?\d+\.\d{2,}")


def _shorten(m: re.Match[str]) -> str:
    return f"{float(m[0]):.1f}".removesuffix(".0")


def ruled(axes: Axes, ink: str, grid: str, lines: Literal["x", "y"]) -> None:
    """Give axes of a picture lines in one direction, a line below, and no background."""
    axes.grid(axis=lines, color=grid, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=ink, labelsize=11, pad=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(grid)
    axes.patch.set_visible(False)


__all__ = ["attribute", "escape", "plain", "ruled", "strict", "themed", "write"]
