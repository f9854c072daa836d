"""The progress display: what it says in a terminal, in a pipe, and how seldom it draws."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console

from polopt.evidence.watch import progress as module
from polopt.evidence.watch.progress import Progress, clock, count, spark
from polopt.interfaces import Event

INFO = {"method": "grpo", "task": "text:spell_backward", "seed": 3, "parameters": 512_000, "updates": 0, "fraction": 0.0}
SUMMARY = {"status": "done", "updates": 40, "decisions": 81_920, "seconds": 75.0, "eval_score_initial": 0.41, "eval_score": 0.87}


def line(update: int, **more: Any) -> dict[str, Any]:
    return {"update": update, "decisions": update * 2048, "accuracy": 0.62, "reward": 0.6, "entropy": 0.31, "kl_old": 0.002, **more}


def plain_run(progress: Progress, updates: int = 40, **more: Any) -> None:
    progress.start(INFO)
    for i in range(1, updates + 1):
        score = {"eval_score": 0.8} if i == updates else {}
        progress.event(Event(i, line(i, **score, **more), i * 0.1, i / updates, evaluated=bool(score)))
    progress.end(SUMMARY)


def pipe() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=80), out


def terminal(**more: Any) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=80, height=24, color_system=None, legacy_windows=False, **more), out


class FakeTime:
    """A clock that moves only when told."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(module, "time", fake)
    return fake


def test_a_pipe_gets_few_plain_lines_without_control_characters(fake_time: FakeTime) -> None:
    console, out = pipe()
    progress = Progress(console=console, every=10.0)
    progress.start(INFO)
    for i in range(1, 3001):  # 30 seconds at 100 updates a second
        fake_time.now += 0.01
        progress.event(Event(i, line(i), i * 0.01, i / 3000))
    progress.end(SUMMARY)
    text = out.getvalue()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "grpo · text:spell_backward · seed 3 · 512k parameters"
    assert len(lines) == 6  # head, after 2, 12 and 22 s, the last update, the end
    assert re.search(r" 40%  update 1,20\d  accuracy 0.62  reward 0.6  entropy 0.31  KL 0.002", lines[2])
    assert "205k decisions/s" in lines[2]
    assert lines[2].endswith("0:18 left")
    assert lines[-1] == "done · held-out 0.41 → 0.87 · 40 updates · 81.9k decisions · 1:15"


def test_quiet_shows_nothing_and_does_nothing() -> None:
    console, out = pipe()
    plain_run(Progress(console=console, quiet=True))
    assert out.getvalue() == ""


def test_a_terminal_shows_everything_that_matters_in_80_columns() -> None:
    console, out = terminal()
    plain_run(Progress(console=console))
    text = out.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.rsplit("\x1b[2K", 1)[1]).splitlines()
    assert max(len(row) for row in last) <= 80
    shown = "\n".join(last)
    for piece in ("grpo · text:spell_backward · seed 3", "100%", "accuracy 0.62", "reward 0.6", "entropy 0.31", "KL 0.002", "done"):
        assert piece in shown
    assert "0.41 → 0.87" in shown


def test_the_display_redraws_at_most_four_times_a_second_and_less_if_drawing_is_slow(fake_time: FakeTime) -> None:
    console, _ = terminal()
    progress = Progress(console=console, share=0.01)
    drawn: list[float] = []
    cost = 0.0
    original = progress._picture

    def picture(*args: Any) -> Any:
        drawn.append(fake_time.now)
        fake_time.now += cost
        return original(*args)

    progress._picture = picture  # type: ignore[method-assign]
    progress.start(INFO)
    for i in range(1, 1001):  # 10 seconds
        fake_time.now += 0.01
        progress.event(Event(i, line(i), 0.0, i / 1000))
    assert 35 <= len(drawn) <= 42
    drawn.clear()
    cost = 0.02  # 1% of 2 seconds
    for i in range(1, 1001):
        fake_time.now += 0.01
        progress.event(Event(i, line(i), 0.0, i / 1000))
    progress.end({})
    assert 5 <= len(drawn) <= 7


def test_between_looks_an_update_costs_next_to_nothing() -> None:
    console, _ = pipe()
    progress = Progress(console=console, every=1e9)
    progress.start(INFO)
    event = Event(1, line(1), 0.1, 0.5)
    progress.event(event)
    n, start = 20_000, time.process_time()
    for _ in range(n):
        progress.event(event)
    assert (time.process_time() - start) / n < 50e-6  # 0.3 µs when idle, and a look of 20 µs every 50 ms


def test_a_warning_appears_when_it_becomes_certain(fake_time: FakeTime) -> None:
    console, out = pipe()
    progress = Progress(console=console, every=1.0)
    progress.start(INFO)
    for i in range(1, 41):
        fake_time.now += 0.2
        progress.event(Event(i, line(i, kl_old=0.5 if i > 10 else 0.002), 0.0, i / 40))
    text = out.getvalue()
    assert text.count("warning: The policy moves too far per update: at update 15") == 1

    console, out = terminal()
    plain_run_with_bad_kl(console, fake_time)
    assert "▲ The policy moves too far per update" in out.getvalue()


def plain_run_with_bad_kl(console: Console, fake_time: FakeTime) -> None:
    progress = Progress(console=console)
    progress.start(INFO)
    for i in range(1, 41):
        fake_time.now += 0.3
        progress.event(Event(i, line(i, kl_old=0.5), 0.0, i / 40))
    progress.end(SUMMARY)


def test_text_from_the_user_is_not_read_as_markup() -> None:
    for console, out in (pipe(), terminal()):
        progress = Progress(console=console)
        progress.start(INFO | {"task": "data:[red]x[/red].jsonl"})
        progress.end(SUMMARY)
        assert "data:[red]x[/red].jsonl" in out.getvalue()


def test_a_terminal_without_unicode_gets_ascii() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    console = Console(file=out, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    plain_run(Progress(console=console))
    shown = raw.getvalue().decode("ascii")
    assert "####" in shown
    assert "0.41 -> 0.87" in shown


def test_a_pipe_without_unicode_gets_ascii() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), width=80)
    plain_run(Progress(console=console))
    assert "0.41 -> 0.87" in raw.getvalue().decode("ascii")


def test_ending_twice_or_without_a_start_is_harmless() -> None:
    console, out = pipe()
    progress = Progress(console=console)
    progress.end(SUMMARY)
    progress.start(INFO)
    progress.end(SUMMARY)
    before = out.getvalue()
    progress.end(SUMMARY)
    assert out.getvalue() == before


def test_a_resumed_run_starts_where_it_was(fake_time: FakeTime) -> None:
    console, out = terminal()
    progress = Progress(console=console)
    progress.start(INFO | {"updates": 20, "fraction": 0.5, "eval_score": 0.66})
    assert " 50%" in out.getvalue()
    fake_time.now += 1
    progress.event(Event(21, line(21), 0.0, 0.52))
    assert "held-out 0.66 (update 20)" in out.getvalue()
    progress.end({"status": "interrupted"})
    assert "interrupted" in out.getvalue()


def test_numbers_for_people() -> None:
    assert [clock(s) for s in (0, 7.4, 754, 11_045, float("nan"))] == ["0:00", "0:07", "12:34", "3:04:05", "?"]
    assert [count(x) for x in (3.14159, 950, 12_345, 999_900, 4_560_000)] == ["3.1", "950", "12.3k", "1M", "4.56M"]
    assert spark([]) == ""
    assert spark([2.0, 2.0]) == "▄▄"
    assert spark([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert len(spark([float(i) for i in range(100)])) == 12
