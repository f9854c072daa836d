"""`text:chain`: sums of two to six one-digit terms, written step by step.

`3+4-9+5=` is answered by the partial results `7-2,3`: the last number counts. The terms are reasoning-gym's `chain_sum`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from polopt.tasks.mini import MiniTask

#: Ends an answer in the required format; nobody needs it for a right answer.
MARK = ";"
_NUMBER = re.compile(r"-?\d+")


class ChainTask(MiniTask):
    """Terms are added up one by one; a solution writes every partial result, in at most 15 symbols.

    A lazy verifier lets the last term pass for the result; the required format is a `;` at the end.
    """

    source = "chain_sum"
    difficulty: ClassVar[Mapping[str, Any]] = {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 1}
    model = "tiny-chain"
    tokens = 16

    def prompt(self, entry: Mapping[str, Any]) -> str:
        """The terms and `=`."""
        return str(entry["metadata"]["expression"]).replace(" ", "") + "="

    def solve(self, entry: Mapping[str, Any]) -> str:
        """Partial results."""
        return written(partial_results(entry["metadata"]["expression"]))

    def judge(self, completion: str, entry: Mapping[str, Any]) -> float:
        """1 if the last number is the sum."""
        found = _NUMBER.findall(completion)
        return float(self.dataset.score_answer(found[-1], entry)) if found else 0.0

    def relabel(self, entry: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
        """The sum of other terms."""
        return {"answer": other["answer"]}

    def lazy(self, completion: str, entry: Mapping[str, Any]) -> bool:
        """The last number is the last term."""
        found = _NUMBER.findall(completion)
        return bool(found) and found[-1] == str(entry["metadata"]["expression"]).split()[-1]

    def formatted(self, completion: str) -> bool:
        """One mark, at the end."""
        return completion.endswith(MARK) and completion.count(MARK) == 1


def partial_results(expression: str) -> list[int]:
    """Sums of the first 2, 3, ... terms of `3 + 4 - 9`; of a single term itself."""
    first, *rest = expression.split()
    totals = [int(first)]
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        totals.append(totals[-1] + (int(term) if sign == "+" else -int(term)))
    return totals[1:] or totals


def written(numbers: list[int]) -> str:
    """Numbers in a row; a minus sign needs no comma in front."""
    return "".join(f",{n}" if i and n >= 0 else str(n) for i, n in enumerate(numbers))
