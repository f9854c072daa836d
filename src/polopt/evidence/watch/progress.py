"""What a person sees while a run goes on: a calm live display in a terminal, or a plain line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polopt.evidence.watch.diagnostics import Finding, Watch, number
from polopt.evidence.watch.pulse import domain_of, finite
from polopt.interfaces import Event

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

BARS = "▁▂▃▄▅▆▇█"
#: Metrics shown, in this order, where a run has them. The first of the first group that exists leads.
LEADING = (("accuracy", "accuracy"), ("episode_return", "return"))
SHOWN = (("reward", "reward"), ("entropy", "entropy"), ("kl_ref", "KL ref"), ("kl_old", "KL"))


class Progress:
    """Observer that shows method, task, share of the budget, scores, speed and time left.

    It looks at the clock first and does nothing most of the time: at most 20 looks at the metrics and `per_second` redraws
    per second, fewer if drawing is slow, so that it stays below `share` of the run's time.

    quiet: show nothing. console: where to draw (default: standard output). every: seconds between plain lines when the
    output is not a terminal.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        every: float = 10.0,
        per_second: float = 4.0,
        share: float = 0.004,
    ) -> None:
        self.quiet, self.every, self.share = quiet, every, share
        self._gap = 1.0 / max(min(per_second, 4.0), 1e-3)
        self._console = console
        self._live: Live | None = None
        self._look_at = self._draw_at = math.inf
        self._watch = Watch()
        self._warning: Finding | None = None
        self._untold: list[Finding] = []  # warnings that no plain line has told yet
        self._info: Mapping[str, Any] = {}
        self._event: Event | None = None
        self._printed = -1  # the update of the last plain line
        self._marks: deque[tuple[float, float, float]] = deque(maxlen=40)  # (clock, fraction, decisions)
        self._trace: list[float] = []  # the leading metric, one value per look, thinned
        self._stride = self._skip = 1
        self._score = self._score_first = math.nan
        self._score_update = 0

    # ------------------------------------------------------------------------------------------------------- observer
    def start(self, info: Mapping[str, Any]) -> None:
        """info: `method`, `task`, `seed`, `parameters`; for a resumed run its `updates`, `fraction` and last `eval_score`."""
        if self.quiet:
            return
        self._info = info
        self._watch = Watch(domain=domain_of(str(info.get("task") or ""), info.get("domain")))
        self._initial_score(info.get("eval_score_initial"))
        self._remember_score(info.get("eval_score"), int(info.get("updates") or 0))
        self._look_at = 0.0
        console = self._open()
        now = time.perf_counter()
        if console.is_terminal and not console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(
                self._picture(), console=console, auto_refresh=False, transient=False, redirect_stderr=sys.stderr.isatty()
            )
            self._live.start(refresh=True)
            self._draw_at = now
        else:
            self._say(self._headline())
            self._draw_at = now + min(self.every, 2.0)

    def event(self, event: Event) -> None:
        """After each update: mostly one look at the clock."""
        now = time.perf_counter()
        if now < self._look_at and not event.evaluated:
            return
        if self.quiet:
            return
        self._look_at = now + 0.05
        self._event = event
        self._read(event)
        if now < self._draw_at:
            return
        self._mark(now, event)
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            cost = time.perf_counter() - now
            self._draw_at = now + max(self._gap, cost / self.share)
        else:
            self._say(self._plain())
            self._printed = event.update
            self._draw_at = now + self.every

    def end(self, summary: Mapping[str, Any]) -> None:
        """Draw the last state and give the terminal back. Safe to call twice, or without `start`."""
        if self.quiet or math.isinf(self._look_at):
            return
        self._look_at = self._draw_at = math.inf
        if finite(summary.get("eval_score_initial")):
            self._score_first = float(summary["eval_score_initial"])
        if finite(summary.get("eval_score")):
            self._score = float(summary["eval_score"])
            self._score_update = int(summary.get("updates") or self._score_update)
        if self._live is not None:
            self._live.update(self._picture(summary), refresh=True)
            self._live.stop()
            self._live = None
        else:
            if self._event is not None and (self._event.update != self._printed or self._untold):
                self._say(self._plain())
            self._say(self._ending(summary))

    # -------------------------------------------------------------------------------------------------------- reading
    def _open(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        return self._console

    def _say(self, text: str) -> None:
        console = self._open()
        shown = _ascii(text) if console.options.ascii_only else text
        console.print(shown, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _read(self, event: Event) -> None:
        self._initial_score(event.extra.get("eval_score_initial"))
        if new := self._watch.see(event.metrics):
            self._warning = self._watch.newest
            self._untold += new
        if event.evaluated:
            self._remember_score(event.metrics.get("eval_score"), event.update)
        self._skip -= 1
        if self._skip > 0:
            return
        self._skip = self._stride
        lead = next((event.metrics[k] for k, _ in (*LEADING, *SHOWN) if finite(event.metrics.get(k))), None)
        if lead is not None:
            self._trace.append(float(lead))
            if len(self._trace) >= 256:  # keep every second value: bounded memory, whole run
                self._trace = self._trace[::2]
                self._stride *= 2

    def _initial_score(self, score: Any) -> None:
        """The held-out score before training, told once at the start or with the first event."""
        if finite(score) and self._watch.pulse.scores.n == 0:
            self._watch.pulse.scores.add(float(score), 0)
            self._remember_score(score, 0)

    def _remember_score(self, score: Any, update: int) -> None:
        if finite(score):
            self._score, self._score_update = float(score), update
            if update == 0:
                self._score_first = float(score)

    def _mark(self, now: float, event: Event) -> None:
        decisions = event.metrics.get("decisions")
        if not self._marks or now - self._marks[-1][0] >= 0.2:
            self._marks.append((now, event.fraction, float(decisions or 0)))

    def _rates(self) -> tuple[float, float]:
        """Recent decisions per second and seconds left (NaN when unknown)."""
        if len(self._marks) < 2 or self._event is None:
            return math.nan, math.nan
        (t0, f0, d0), (t1, f1, d1) = self._marks[0], self._marks[-1]
        pace = (f1 - f0) / (t1 - t0)
        left = (1.0 - min(self._event.fraction, 1.0)) / pace if pace > 0 else math.nan
        return (d1 - d0) / (t1 - t0), left

    # --------------------------------------------------------------------------------------------------------- drawing
    def _headline(self) -> str:
        parts = [str(self._info.get("method", "")), str(self._info.get("task", "")), f"seed {self._info.get('seed', '?')}"]
        size = self._info.get("parameters")
        if finite(size):
            parts.append(f"{count(float(size))} parameters")
        return " · ".join(p for p in parts if p)

    def _facts(self) -> list[tuple[str, str]]:
        metrics: Mapping[str, Any] = {} if self._event is None else self._event.metrics
        rows = [(label, number(float(metrics[key]))) for key, label in (*LEADING, *SHOWN) if finite(metrics.get(key))]
        return rows[:5]

    def _held_out(self) -> str:
        if math.isnan(self._score):
            return ""
        if self._score_update == 0:
            return f"held-out {number(self._score)}"
        if math.isnan(self._score_first):
            return f"held-out {number(self._score)} (update {self._score_update:,})"
        return f"held-out {number(self._score_first)} → {number(self._score)} (update {self._score_update:,})"

    def _plain(self) -> str:
        event = self._event
        assert event is not None
        rate, left = self._rates()
        parts = [f"{100 * min(event.fraction, 1):3.0f}%", f"update {event.update:,}", *(f"{k} {v}" for k, v in self._facts())]
        if not math.isnan(rate):
            parts.append(f"{count(rate)} decisions/s")
        parts += [self._held_out(), f"{clock(left)} left" if finite(left) and event.fraction < 1 else ""]
        line = "  ".join(p for p in parts if p)
        line += "".join(f"\n      {finding.level}: {finding.line}" for finding in self._untold)
        self._untold = []
        return line

    def _ending(self, summary: Mapping[str, Any]) -> str:
        parts = [str(summary.get("status", "ended")), self._held_out().partition(" (")[0]]
        if finite(summary.get("updates")):
            parts.append(f"{int(summary['updates']):,} updates")
        if finite(summary.get("decisions")):
            parts.append(f"{count(float(summary['decisions']))} decisions")
        if finite(summary.get("seconds")):
            parts.append(clock(float(summary["seconds"])))
        return " · ".join(p for p in parts if p)

    def _picture(self, summary: Mapping[str, Any] | None = None) -> RenderableType:
        from rich.text import Text

        console = self._open()
        ascii_only, width = console.options.ascii_only, min(console.width, 100)
        done = float(self._info.get("fraction") or 0.0) if self._event is None else self._event.fraction
        fraction = min(max(done, 0.0), 1.0)
        rate, left = self._rates()
        lines = [Text(self._headline(), style="bold")]
        right = f" {100 * fraction:3.0f}%  " + (f"{clock(left)} left" if finite(left) and summary is None else "")
        right = right.ljust(17)
        lines.append(Text.assemble(*_bar(width - len(right), fraction, ascii_only), (right, "default")))
        facts = Text("waiting for the first update" if summary is None else "", style="dim")
        if self._event is not None:
            facts = Text()
            for i, (label, value) in enumerate(self._facts()):
                facts.append(("   " if i else "") + label + " ", "dim")
                facts.append(value, "bold" if i == 0 else "default")
                if i == 0 and not ascii_only:
                    facts.append(" " + spark(self._trace), "cyan")
        lines.append(facts)
        if summary is None and self._event is not None:
            pace = "" if math.isnan(rate) else f"   {count(rate)} decisions/s"
            held = self._held_out()
            lines.append(Text(f"update {self._event.update:,}{pace}" + (f"   {held}" if held else ""), style="dim"))
        elif summary is not None:
            status = str(summary.get("status", ""))
            style = {"done": "green", "failed": "red"}.get(status, "yellow")
            ending = Text(self._ending(summary))
            ending.stylize(style, 0, len(status))
            lines.append(ending)
        if self._warning is not None:
            style = "red" if self._warning.level == "error" else "yellow" if self._warning.level == "warning" else "cyan"
            more = len(self._watch.findings()) - 1 if summary is not None else 0
            line = ("! " if ascii_only else "▲ ") + self._warning.line + (f" (+ {more} more, see the report)" if more > 0 else "")
            lines.append(Text(line, style=style, overflow="fold"))
        text = Text("\n").join(lines)
        if ascii_only:
            text = Text(_ascii(text.plain))
        return text


def _ascii(text: str) -> str:
    return text.replace(" · ", " | ").replace("→", "->").encode("ascii", "replace").decode()


def _bar(width: int, fraction: float, ascii_only: bool) -> list[tuple[str, str]]:
    filled = round(width * fraction)
    full, rest = ("#", "-") if ascii_only else ("━", "━")
    return [(full * filled, "green"), (rest * (width - filled), "bright_black")]


def spark(values: list[float], width: int = 12) -> str:
    """A curve of at most `width` characters; equal values give a flat line in the middle."""
    if not values:
        return ""
    n = min(width, len(values))
    means = [sum(part) / len(part) for i in range(n) if (part := values[i * len(values) // n : (i + 1) * len(values) // n])]
    low, high = min(means), max(means)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        return BARS[3] * len(means)
    return "".join(BARS[min(int((m - low) / (high - low) * 8), 7)] for m in means)


def clock(seconds: float) -> str:
    """`0:07`, `12:34` or `3:04:05`."""
    if not math.isfinite(seconds):
        return "?"
    s = max(round(seconds), 0)
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


def count(x: float) -> str:
    """`950`, `12.3k`, `4.56M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size * 0.9995:
            return f"{x / size:.3g}{unit}"
    return f"{x:.0f}" if abs(x) >= 10 else f"{x:.2g}"
