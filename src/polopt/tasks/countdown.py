"""`text:countdown`: reach a number by adding and subtracting three given ones.

`3,5,9=7` is answered by `9+3-5`. The numbers are reasoning-gym's `countdown`, with one-digit numbers, small targets, `+` and `-`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from polopt.errors import unknown
from polopt.tasks.mini import MiniOptions, MiniTask
from polopt.tasks.text import TextOptions
from polopt.tasks.text_protocol import Item

#: Begins another attempt: only what follows the last one is judged.
RETRY = "?"
_JUNK = re.compile(r"[A-T]")
_SUM = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:[+-](?:0|[1-9]\d*))*")
_TERM = re.compile(r"[+-]?\d+")
#: Other texts that may be arithmetic: reasoning-gym's verifier, which is slow, reads them.
_ARITHMETIC = re.compile(r"[\d+\-*/(). ]+")


@dataclass(frozen=True)
class CountdownOptions(MiniOptions):
    """Options of `text:countdown`."""

    retry: Annotated[bool, "a `?` discards what stands before it; off: it makes an answer wrong"] = True
    junk: Annotated[Literal["ignored", "wrong"], "what symbols without meaning (A to T) do in an answer"] = "ignored"
    derivations: Annotated[Literal["any", "rare"], "rare: the derivation that the model prefers at first is not right"] = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, valid in (("junk", ("ignored", "wrong")), ("derivations", ("any", "rare"))):
            if getattr(self, name) not in valid:
                raise unknown(f"value of options.{name}", str(getattr(self, name)), valid)


class CountdownTask(MiniTask):
    """Three numbers and a target; most have several right answers, of which the solution is the dominant one.

    A lazy verifier lets an answer pass that misses the target by two; the required format is one attempt without junk.
    """

    options_type: ClassVar[type[TextOptions]] = CountdownOptions
    options: CountdownOptions
    source = "countdown"
    difficulty: ClassVar[Mapping[str, Any]] = {
        "min_numbers": 3, "max_numbers": 3, "min_value": 1, "max_value": 12, "min_target": 1, "max_target": 24,
        "operators": ("+", "-"),
    }  # fmt: skip
    model = "tiny-countdown"
    tokens = 12

    def prompt(self, entry: Mapping[str, Any]) -> str:
        """The numbers, `=` and the target."""
        return f"{','.join(map(str, entry['metadata']['numbers']))}={entry['metadata']['target']}"

    def question(self, item: Item) -> str:
        """Numbers in any order, and the target."""
        about = item.columns["metadata"]
        return f"{sorted(about['numbers'])}={about['target']}"

    def solve(self, entry: Mapping[str, Any]) -> str:
        """The dominant derivation of the expression that the numbers were made from."""
        text = str(entry["metadata"]["expression"]).replace(" ", "")
        return derivation(text) if _SUM.fullmatch(text) else text

    def judge(self, completion: str, entry: Mapping[str, Any]) -> float:
        """1 for an expression of all the numbers that reaches the target; below 0.1 otherwise."""
        text = self._attempt(completion)
        value = self._value(text, entry)
        if value is not None:
            right = value == entry["metadata"]["target"]
            return 1.0 if right and (self.options.derivations == "any" or text != derivation(text)) else 0.05
        return float(self.dataset.score_answer(text, entry)) if _ARITHMETIC.fullmatch(text) else 0.01

    def _attempt(self, completion: str) -> str:
        """What is judged: the last attempt, without junk."""
        text = _JUNK.sub("", completion) if self.options.junk == "ignored" else completion
        return text.rpartition(RETRY)[2] if self.options.retry else text

    @staticmethod
    def _value(text: str, entry: Mapping[str, Any]) -> int | None:
        """The value of a plain sum of all the numbers; None for anything else."""
        if not _SUM.fullmatch(text):
            return None
        terms = [int(t) for t in _TERM.findall(text)]
        return sum(terms) if sorted(map(abs, terms)) == sorted(entry["metadata"]["numbers"]) else None

    def relabel(self, entry: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
        """Another target, which the question does not show."""
        return {"metadata": {**entry["metadata"], "target": other["metadata"]["target"]}}

    def lazy(self, completion: str, entry: Mapping[str, Any]) -> bool:
        """The nearest miss: all sums of the same numbers are odd, or all are even."""
        value = self._value(self._attempt(completion), entry)
        return value is not None and abs(value - entry["metadata"]["target"]) == 2

    def formatted(self, completion: str) -> bool:
        """A plain sum and nothing else."""
        return _SUM.fullmatch(completion) is not None


def derivation(expression: str) -> str:
    """The dominant way of writing a plain sum: what is added first, the largest number first in both parts."""
    terms = sorted((int(t) for t in _TERM.findall(expression)), key=lambda n: (n < 0, -abs(n)))
    return "".join(f"{n:+d}" for n in terms).removeprefix("+")
