"""Known failures of policy optimization, recognised from a run's metrics and said in plain words.

`Watch` reads one line of metrics at a time with constant cost and memory, so a live display and a report use the same code;
`diagnose` runs it over a whole history. The rules themselves are in `rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from polopt.evidence.watch.pulse import Pulse, finite
from polopt.evidence.watch.rules import RULES, Level, Reading, Rule, Thresholds

LEVELS: tuple[Level, ...] = ("note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One warning. update, decisions: where it was first certain; last_update: where it was last seen."""

    code: str
    title: str
    level: Level
    text: str  # what, with numbers and when
    why: str  # why it matters
    remedy: str  # what to try
    update: int
    decisions: int
    last_update: int
    active: bool  # still so at the end of what was seen
    value: float  # the number that made it certain
    worst: float

    @property
    def line(self) -> str:
        """One short line for a terminal."""
        return f"{self.title}: {self.text}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a value that is not finite becomes text."""
        return {k: v if not isinstance(v, float) or finite(v) else str(v) for k, v in asdict(self).items()}


class _Alarm:
    """How often a rule held in a row, and what it read when it became certain."""

    __slots__ = ("decisions", "holding", "last", "level", "raised", "streak", "total", "update", "worst")

    def __init__(self) -> None:
        self.streak = self.total = 0
        self.raised: Reading | None = None
        self.holding = False
        self.update = self.decisions = self.last = 0
        self.level: Level = "note"
        self.worst = 0.0


class Watch:
    """Reads metrics update by update and remembers which rules became certain.

    domain: "control" or "text"; None guesses from the metrics (`episode_return` means control). Lines may be left out (a
    display looks at some only): no rule counts on seeing every update. initial_score: the held-out score before training,
    where it is not among the lines.
    """

    def __init__(self, limits: Thresholds | None = None, *, domain: str | None = None, initial_score: Any = None) -> None:
        self.limits = Thresholds() if limits is None else limits
        self.pulse = Pulse(domain=domain)
        if finite(initial_score):
            self.pulse.scores.add(float(initial_score), 0)
        self._alarms = {rule.code: _Alarm() for rule in RULES}
        self.newest: Finding | None = None

    def see(self, metrics: Mapping[str, Any]) -> list[Finding]:
        """Take in one line of metrics; returns the warnings that became certain with it (mostly none)."""
        self.pulse.see(metrics)
        new: list[Finding] = []
        for rule in RULES:
            reading = rule.check(self.pulse, self.limits)
            if reading is None:
                continue
            alarm = self._alarms[rule.code]
            alarm.holding = reading.bad
            if not reading.bad:
                alarm.streak = 0
                continue
            alarm.streak += 1
            alarm.total += 1
            alarm.last = self.pulse.update
            count = alarm.total if rule.cumulative else alarm.streak
            if alarm.raised is None and (reading.certain or count >= rule.patience(self.limits)):
                self._raise(alarm, reading)
                new.append(self._finding(rule, alarm))
            elif alarm.raised is not None and rule.worse(reading.value, alarm.worst):
                alarm.worst = reading.value
        if new:
            self.newest = max(new, key=lambda f: LEVELS.index(f.level))
        return new

    def findings(self) -> list[Finding]:
        """Everything that became certain so far, errors first, then in the order of appearance."""
        found = [self._finding(rule, self._alarms[rule.code]) for rule in RULES if self._alarms[rule.code].raised is not None]
        return sorted(found, key=lambda f: (-LEVELS.index(f.level), f.update))

    def _raise(self, alarm: _Alarm, reading: Reading) -> None:
        alarm.raised = reading
        alarm.update, alarm.decisions = self.pulse.update, self.pulse.decisions
        alarm.level, alarm.worst = reading.level, reading.value

    def _finding(self, rule: Rule, alarm: _Alarm) -> Finding:
        reading = alarm.raised
        assert reading is not None
        when = f"at update {alarm.update:,}" + (f" ({alarm.decisions:,} decisions)" if alarm.decisions else "")
        text = f"{when} {rule.say(reading, self.limits)}"
        if rule.extreme and rule.worse(alarm.worst, reading.value):
            text += f"; {rule.extreme} {number(alarm.worst)}"
        if alarm.last > alarm.update and not rule.cumulative:
            text += "; still so at the end" if alarm.holding else f"; last seen at update {alarm.last:,}"
        return Finding(
            rule.code, rule.title, alarm.level, text + ".", rule.why, rule.remedy, alarm.update, alarm.decisions,
            alarm.last, alarm.holding, reading.value, alarm.worst,
        )  # fmt: skip


def number(x: float) -> str:
    """Three significant digits, thousands separated."""
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e7 else f"{x:.3g}"


def diagnose(
    history: Iterable[Mapping[str, Any]],
    *,
    limits: Thresholds | None = None,
    domain: str | None = None,
    initial_score: float | None = None,
) -> list[Finding]:
    """Warnings about a whole history of metrics (one mapping per update, in order)."""
    watch = Watch(limits, domain=domain, initial_score=initial_score)
    for metrics in history:
        watch.see(metrics)
    return watch.findings()


__all__ = ["Finding", "Thresholds", "Watch", "diagnose", "number"]
