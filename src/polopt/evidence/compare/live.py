"""What a person sees while runs go on: one table in a terminal, or a line for each run that ended."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polopt.evidence.compare.schedule import Job
from polopt.evidence.watch.diagnostics import number
from polopt.evidence.watch.progress import clock, count

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live


@dataclass
class Tail:
    """The growing end of a metrics.jsonl: only new bytes are read."""

    path: Path
    offset: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    score: float = math.nan

    def read(self, metric: str) -> None:
        """Take in what was written since the last call."""
        try:
            size = self.path.stat().st_size
            if size < self.offset:  # a resumed run forgets what it wrote after its checkpoint
                self.offset = 0
            if size == self.offset:
                return
            with self.path.open("rb") as f:
                f.seek(self.offset)
                data = f.read()
        except OSError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        lines = whole.splitlines()
        for i, line in enumerate(lines):
            if i == len(lines) - 1 or metric.encode() in line:
                try:
                    self.last = json.loads(line)
                except ValueError:
                    continue
                value = self.last.get(metric)
                if isinstance(value, int | float):
                    self.score = float(value)


class Table:
    """Watches jobs. It draws at most twice a second, and less often when drawing is slow."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        budget: float,
        key: str,
        metric: str,
        title: str,
        quiet: bool = False,
        console: Console | None = None,
        clock_start: float | None = None,
    ) -> None:
        self.jobs, self.budget, self.key, self.metric, self.title, self.quiet = list(jobs), budget, key, metric, title, quiet
        self._console = console
        self._live: Live | None = None
        self._tails = {id(j): Tail(j.folder / "metrics.jsonl") for j in self.jobs if j.state == "done"}
        self._told = False
        self._next = 0.0
        self._start = clock_start or time.monotonic()
        self._share0 = self._share()
        for tail in self._tails.values() if not quiet else ():
            tail.read(metric)

    # ------------------------------------------------------------------------------------------------- the scheduler's
    def started(self, job: Job) -> None:
        """Begin to follow a job."""
        self._tails[id(job)] = Tail(job.folder / "metrics.jsonl")
        if self._live is None and not self.quiet:
            self._open()

    def ended(self, job: Job) -> None:
        """Say how a job ended, where there is no table."""
        tail = self._tails.setdefault(id(job), Tail(job.folder / "metrics.jsonl"))
        tail.read(self.metric)
        if self.quiet:
            return
        if self._live is None:
            self._say(self._line(job, tail))
        self._next = 0.0

    def tick(self) -> None:
        """Look and draw, if it is time."""
        now = time.monotonic()
        if self.quiet or self._live is None or now < self._next:
            return
        for job in self.jobs:
            if job.state == "running" and id(job) in self._tails:
                self._tails[id(job)].read(self.metric)
        self._live.update(self.picture(), refresh=True)
        self._next = now + max(0.5, 100 * (time.monotonic() - now))

    def close(self) -> None:
        """Draw the last state and give the terminal back."""
        if self._live is not None:
            self._live.update(self.picture(), refresh=True)
            self._live.stop()
            self._live = None

    # ------------------------------------------------------------------------------------------------------- drawing
    def _open(self) -> None:
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            if not self._told:
                self._say(self.title)
            self._told = True
        else:
            from rich.live import Live

            self._live = Live(
                self.picture(), console=self._console, auto_refresh=False, transient=False, redirect_stderr=sys.stderr.isatty()
            )
            self._live.start(refresh=True)

    def _say(self, text: str) -> None:
        assert self._console is not None
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _line(self, job: Job, tail: Tail) -> str:
        ended = sum(j.state in ("done", "failed") for j in self.jobs)
        parts = [
            f"{ended}/{len(self.jobs)}",
            f"{job.contestant}{f' trial {job.trial}' if job.trial else ''} seed {job.seed}",
            job.state,
        ]
        if job.state == "done" and not math.isnan(tail.score):
            parts.append(f"{self.metric} {number(tail.score)}")
        if job.error:
            parts.append(job.error)
        parts.append(clock(time.monotonic() - job.began))
        return "  ".join(parts)

    def _fraction(self, job: Job) -> float:
        if job.state in ("done", "failed"):
            return 1.0
        spent = self._tails[id(job)].last.get(self.key) if id(job) in self._tails else None
        return min(float(spent) / self.budget, 1.0) if isinstance(spent, int | float) else 0.0

    def _share(self) -> float:
        return sum(map(self._fraction, self.jobs)) / max(len(self.jobs), 1)

    def picture(self) -> RenderableType:
        """The table and the line below it."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(box=None, pad_edge=False, header_style="dim")
        for name, right in (
            ("contestant", False), ("runs", False), ("budget", False), ("", True), (self.metric, True), ("decisions/s", True),
        ):  # fmt: skip
            grid.add_column(name, justify="right" if right else "left", no_wrap=True)
        for name in dict.fromkeys(j.contestant for j in self.jobs):
            mine = [j for j in self.jobs if j.contestant == name]
            share = sum(map(self._fraction, mine)) / len(mine)
            scores = [s for j in mine if (t := self._tails.get(id(j))) is not None and not math.isnan(s := t.score)]
            mean = number(sum(scores) / len(scores)) if scores else ""
            rates = [r for j in mine if j.state == "running" and (r := self._rate(j))]
            bar = ProgressBar(total=1.0, completed=share, width=20)
            rate = count(sum(rates) / len(rates)) if rates else ""
            grid.add_row(Text(name), self._counts(mine), bar, f"{100 * share:.0f}%", mean, rate)
        return Group(Text(self.title, style="bold"), grid, Text(self._below(), style="dim"))

    def _counts(self, jobs: Sequence[Job]) -> Any:
        from rich.text import Text

        counts: Mapping[str, int] = {s: sum(j.state == s for j in jobs) for s in ("done", "running", "failed", "unfinished")}
        text = Text(f"{counts['done']}/{len(jobs)} done")
        if counts["running"]:
            text.append(f", {counts['running']} running", "cyan")
        if counts["failed"]:
            text.append(f", {counts['failed']} failed", "red")
        return text

    def _rate(self, job: Job) -> float:
        last = self._tails[id(job)].last if id(job) in self._tails else {}
        decisions, seconds = last.get("decisions"), last.get("seconds")
        return float(decisions) / float(seconds) if decisions and seconds else 0.0

    def _below(self) -> str:
        share, elapsed = self._share(), time.monotonic() - self._start
        done = sum(j.state in ("done", "failed") for j in self.jobs)
        text = f"{done} of {len(self.jobs)} runs, {100 * share:.0f}%, {clock(elapsed)} elapsed"
        if share - self._share0 > 0 and share < 1:
            text += f", {clock(elapsed * (1 - share) / (share - self._share0))} left"
        return text


__all__ = ["Table", "Tail"]
