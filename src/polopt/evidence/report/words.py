"""The verdict of a run in words, and the facts beside it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from polopt.evidence.report.history import History
from polopt.evidence.watch.diagnostics import number
from polopt.evidence.watch.pulse import finite


def duration(seconds: float) -> str:
    """`48 s`, `2 min 14 s`, `3 h 05 min`."""
    if not finite(seconds):
        return "unknown time"
    if seconds < 10:
        return f"{seconds:.2g} s"
    s = round(seconds)
    if s < 120:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s // 60 % 60:02d} min"


def size(n: float) -> str:
    """Bytes for people."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= step:
            return f"{n / step:.3g} {unit}"
    return f"{n:.0f} bytes"


def total(history: History, key: str) -> float:
    """A total of the run, from the summary or else the last line of metrics."""
    given = history.summary.get(key)
    return float(given) if finite(given) else history.last(key)


def scores(history: History) -> tuple[float, float]:
    """Held-out score at the start and at the end, NaN where unknown."""
    column = history.columns.get("eval_score")
    seen = column[~(column != column)] if column is not None else []
    first, last = history.summary.get("eval_score_initial"), history.summary.get("eval_score")
    start = float(first) if finite(first) else float(seen[0]) if len(seen) > 1 else math.nan
    end = float(last) if finite(last) else float(seen[-1]) if len(seen) else math.nan
    return start, end


def verdict(history: History) -> list[str]:
    """Sentences: what was trained, how it ended, what came of it, what went wrong."""
    method, task = str(history.fact("method") or "A method"), str(history.fact("task") or "an unknown task")
    updates = history.summary.get("updates")
    n = int(updates) if finite(updates) else history.updates
    seconds, decisions = total(history, "seconds"), total(history, "decisions")
    if n == 0:
        first = f"{method} was to be trained on {task}; no update was recorded."
    else:
        size_ = f" ({decisions:,.0f} decisions)" if finite(decisions) else ""
        time_ = f" in {duration(seconds)}" if finite(seconds) else ""
        first = f"{method} was trained on {task} for {n:,} update{'s' if n != 1 else ''}{size_}{time_}."
    return [f"{first} {_outcome(history)}", *_ending(history), _wrong(history)]


def _outcome(history: History) -> str:
    start, end = scores(history)
    if finite(start) and finite(end):
        gain = end - start
        if abs(gain) <= 0.02 * abs(start):
            return f"The held-out score stayed about where it was: {number(start)} before, {number(end)} after."
        return f"The held-out score {'rose' if gain > 0 else 'fell'} from {number(start)} to {number(end)}."
    if finite(end):
        return f"The held-out score at the end is {number(end)}; there is none from the start to compare it with."
    for key, name in (
        ("accuracy", "Training accuracy"),
        ("episode_return", "The training return"),
        ("reward", "The training reward"),
    ):
        column = history.columns.get(key)
        if column is not None and (good := column[column == column]).size >= 2:
            k = max(len(good) // 20, 1)
            before, after = number(float(good[:k].mean())), number(float(good[-k:].mean()))
            return f"{name} went from {before} to {after}; there is no held-out score."
    return "There is no held-out score."


def _ending(history: History) -> list[str]:
    folder = shlex.quote(str(history.folder))
    error = history.fact("error") or history.error
    if history.status == "done":
        return []
    if history.status == "failed":
        said = f"The run failed: {error}" if error else "The run failed before its budget was used."
        return [said if said.endswith((".", "!", "?")) else said + "."]
    if history.status == "interrupted":
        return [f"It was interrupted and saved before its budget was used; continue with: polopt resume {folder}"]
    if history.status == "running":
        return ["It was still going on, or had just been stopped, when this page was made."]
    return [
        f"No end was recorded: it was killed, or is still going on. Continue from the last checkpoint with: polopt resume {folder}"
    ]


def _wrong(history: History) -> str:
    serious = [f for f in history.findings if f.level != "note"]
    if not history.columns:
        return "There are no metrics to judge it by."
    if not serious:
        return "None of the known failures showed."
    if len(serious) == 1:
        return f"One thing to look at: {serious[0].title[0].lower()}{serious[0].title[1:]}."
    return f"{len(serious)} things to look at, first of all: {serious[0].title[0].lower()}{serious[0].title[1:]}."


def tiles(history: History) -> list[tuple[str, str]]:
    """Facts for the head of the page."""
    start, end = scores(history)
    out: list[tuple[str, str]] = []
    if finite(end):
        out.append(("held-out score", f"{number(start)} → {number(end)}" if finite(start) else number(end)))
    seconds, decisions, tokens = (total(history, k) for k in ("seconds", "decisions", "tokens"))
    out += [("updates", f"{int(total(history, 'updates')) if finite(total(history, 'updates')) else history.updates:,}")]
    if finite(decisions):
        out.append(("decisions", f"{decisions:,.0f}"))
    if finite(tokens) and tokens > 0:
        out.append(("tokens", f"{tokens:,.0f}"))
    if finite(seconds):
        out.append(("time", duration(seconds)))
    if finite(seconds) and finite(decisions) and seconds > 0:
        out.append(("decisions per second", f"{decisions / seconds:,.0f}"))
    rss = history.summary.get("peak_rss")
    if finite(rss):
        out.append(("peak memory", size(float(rss))))
    return out


def command(history: History) -> str:
    """What repeats the run: the recorded command, or one made from the resolved configuration in the folder."""
    given = history.fact("command", "argv")
    if isinstance(given, list):
        return shlex.join(str(x) for x in given)
    if isinstance(given, str):
        return given
    words = ["polopt", "train"]
    if history.config_text:
        words += ["--config", str(history.folder / "config.yaml")]
    else:
        words += [str(history.fact("method") or "METHOD"), str(history.fact("task") or "TASK")]
        words += [x for key in ("budget", "seed") if history.fact(key) is not None for x in (f"--{key}", str(history.fact(key)))]
    return shlex.join([*words, "--out", f"{history.folder}-again"])


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted paths and values of a configuration."""
    if isinstance(tree, Mapping):
        if not tree:
            return [(prefix, "{}")] if prefix else []
        return [pair for k, v in tree.items() for pair in flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(tree, list) and any(isinstance(x, Mapping) for x in tree):
        return [pair for i, v in enumerate(tree) for pair in flatten(v, f"{prefix}.{i}")]
    return [(prefix, str(tree))]
