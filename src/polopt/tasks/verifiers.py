"""Rewards that come with the library: plain functions with the signature of TRL's reward functions.

This file imports nothing but the standard library and, when first used, math-verify: it is also loaded by the reward process.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
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
    reference is missing or cannot be read. Needs the main thread of its process (math-verify limits its time by signals).
    """
    return [None if a is None else _equal(str(a), text_of(c)) for c, a in zip(completions, columns[column], strict=True)]


@functools.lru_cache(maxsize=4096)
def _equal(reference: str, text: str) -> float | None:
    from math_verify import parse, verify

    gold = _reference(reference)
    if not gold:
        return None
    return float(verify(list(gold), parse(text, parsing_timeout=2), timeout_seconds=2))


@functools.lru_cache(maxsize=4096)
def _reference(reference: str) -> tuple[Any, ...]:
    from math_verify import parse

    answer = reference.rpartition("####")[2].strip()
    if not answer:
        return ()
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    return tuple(parse(answer if marked else f"${answer}$", parsing_timeout=2) or parse(answer, parsing_timeout=2))
