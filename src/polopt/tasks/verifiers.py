"""Rewards that come with the library: plain functions with the signature of TRL's reward functions.

This file imports nothing but the standard library and, when first used, math-verify: it is also loaded by the reward process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import signal
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

#: Columns that may hold the right answer, in this order, where the option `answer_column` does not name one.
ANSWER_COLUMNS = ("answer", "solution")

Completion = str | list[dict[str, str]]


def text_of(completion: Completion) -> str:
    """The text of a completion, which for conversational prompts is a list of messages."""
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)


def exact(completions: Sequence[Completion], *, column: str, **columns: Any) -> list[float | None]:
    """1 where the completion equals the answer after `normalise`, else 0; None where the answer is missing."""
    return [
        None if a is None else float(normalise(text_of(c)) == normalise(str(a)))
        for c, a in zip(completions, columns[column], strict=True)
    ]


def normalise(text: str) -> str:
    """Text in Unicode's compatible form, without case, outer white space, a final full stop, and runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def matches(completions: Sequence[Completion], *, pattern: str, **columns: Any) -> list[float | None]:
    """1 where the regular expression is found in the completion, else 0; `.` also matches line ends, \\A and \\Z anchor it."""
    found = re.compile(pattern, re.DOTALL)
    return [float(found.search(text_of(c)) is not None) for c in completions]


def short(completion_ids: Sequence[Sequence[int]], *, limit: int, **columns: Any) -> list[float | None]:
    """0 up to `limit` tokens, then falling linearly, to -1 at twice the limit and beyond."""
    return [-min(max(len(ids) - limit, 0) / limit, 1.0) for ids in completion_ids]


def math(completions: Sequence[Completion], *, column: str, **columns: Any) -> list[float | None]:
    """1 where the completion's final answer is mathematically equal to the reference (by math-verify), else 0.

    References may be plain numbers, LaTeX with or without delimiters, or texts that end in `#### answer`. None where a
    reference is missing or cannot be read. A completion that takes too long to judge is wrong; the limit is in processor
    time, so that a busy machine changes no verdict. Needs the main thread of its process (it works by a signal).
    """
    _quiet()
    out: list[float | None] = []
    late = 0
    for answer, completion in zip(columns[column], completions, strict=True):
        gold = () if answer is None else _reference(str(answer))
        try:
            # a batch full of expressions that take forever must still be judged in reasonable time
            with _processor_time(2.0 if late < 8 else 0.1):
                out.append(_equal(gold, text_of(completion)) if gold else None)
        except _TooLong:
            late += 1
            out.append(0.0)
    return out


@functools.cache
def _quiet() -> None:
    """Import what is slow to import, outside any limit, and silence warnings that there is no limit."""
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    verify(parse("$1$", parsing_timeout=None), parse(r"\boxed{1}", parsing_timeout=None), timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def _equal(gold: tuple[Any, ...], text: str) -> float:
    from math_verify import parse, verify

    return float(verify(list(gold), parse(text, parsing_timeout=None), timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def _reference(reference: str) -> tuple[Any, ...]:
    from math_verify import parse

    answer = reference.rpartition("####")[2].strip()
    if not answer:
        return ()
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    return tuple(parse(answer if marked else f"${answer}$", parsing_timeout=None) or parse(answer, parsing_timeout=None))


class _TooLong(BaseException):
    """Not an Exception: the libraries that it passes through catch those."""


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """Raise `_TooLong` inside after so many seconds of this process's processor time."""

    def stop(number: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
