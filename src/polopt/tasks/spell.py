"""`text:spell`: write a string of eight symbols backward, or sorted: long ones are out of reach without a hint.

`bdacc>` is answered by `ccadb`. A prompt may go on with the beginning of its solution, which the model was taught to use.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from polopt.errors import CallError, unknown
from polopt.part import Range
from polopt.tasks.mini import MiniOptions, MiniTask
from polopt.tasks.text import TextOptions

SYMBOLS = "abcdefgh"
#: Longest string: its solution and the end token fill a completion.
LONGEST = 13


@dataclass(frozen=True)
class SpellOptions(MiniOptions):
    """Options of `text:spell`."""

    kind: Annotated[Literal["reverse", "sort"], "what is asked for; the shipped model knows how to reverse"] = "reverse"
    min_length: Annotated[int, Range(ge=2, le=LONGEST), "symbols of the shortest string"] = 4
    max_length: Annotated[int, Range(ge=2, le=LONGEST), "symbols of the longest string"] = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("reverse", "sort"):
            raise unknown("value of options.kind", str(self.kind), ("reverse", "sort"))
        if self.max_length < self.min_length:
            raise CallError(f"options.max_length = {self.max_length} must be >= options.min_length = {self.min_length}")


@dataclass(frozen=True)
class Strings:
    """Random strings; entry `i` depends on seed and `i` alone."""

    options: SpellOptions

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"{self.options.seed}/{index}")
        word = "".join(rng.choices(SYMBOLS, k=rng.randint(self.options.min_length, self.options.max_length)))
        answer = word[::-1] if self.options.kind == "reverse" else "".join(sorted(word))
        return {"question": f"{word}>", "answer": answer, "metadata": {"word": word, "word_len": len(word)}}


class SpellTask(MiniTask):
    """Strings of 4 to 12 symbols. The verifier's score is the share of the solution that an answer begins with.

    A lazy verifier lets the string pass as it stands, with or without a `=` in front. The required format is symbols of strings
    and nothing else.
    """

    options_type: ClassVar[type[TextOptions]] = SpellOptions
    options: SpellOptions
    source = "spell"
    model = "tiny-spell"
    tokens = LONGEST + 1

    def _settings(self) -> Mapping[str, Any]:
        return {}

    def _make_dataset(self) -> Strings:
        self._check_names()
        return Strings(self.options)

    def prompt(self, entry: Mapping[str, Any]) -> str:
        """The string and `>`."""
        return str(entry["question"])

    def solve(self, entry: Mapping[str, Any]) -> str:
        """The right string."""
        return str(entry["answer"])

    def judge(self, completion: str, entry: Mapping[str, Any]) -> float:
        """Symbols from the left that are right, of as many as the longer of both texts has."""
        answer = str(entry["answer"])
        right = next(
            (i for i, (a, b) in enumerate(zip(completion, answer, strict=False)) if a != b), min(len(completion), len(answer))
        )
        return right / max(len(completion), len(answer), 1)

    def relabel(self, entry: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
        """The solution of another string."""
        return {"answer": other["answer"]}

    def lazy(self, completion: str, entry: Mapping[str, Any]) -> bool:
        """The string as it stands."""
        return completion.removeprefix("=") == str(entry["metadata"]["word"])

    def formatted(self, completion: str) -> bool:
        """Only symbols of strings."""
        return bool(completion) and set(completion) <= set(SYMBOLS)
