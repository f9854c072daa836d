"""What a text task offers: items with prompts, and a verifier; and how prompts become tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from polopt.errors import CallError, PoloptError
from polopt.part import Can

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
Split = Literal["train", "eval"]

#: What language models and tasks of text offer to the parts of a method.
TEXT_OFFERS = frozenset({
    Can.SCORE, Can.ENUMERATE, Can.IMITATE, Can.VALUE, Can.REFERENCE, Can.GROUPS, Can.EPISODES, Can.REFILL, Can.ITEMS,
    Can.SOLUTIONS,
})  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question: a plain text or a list of chat messages, and whatever the verifier needs to judge an answer."""

    prompt: Prompt
    columns: Mapping[str, Any] = field(default_factory=dict)


class TextTask(Protocol):
    """A task of text: `Task` with items and a verifier. Constructing and checking one loads nothing heavy."""

    name: str
    domain: str  # "text"
    offers: frozenset[Can]
    channels: tuple[str, ...]  # names of the K reward channels; rewards are added up unless a method treats them apart

    def preset(self, method: Any) -> Mapping[str, Any]:
        """Settings that suit this task, as dotted paths."""
        ...

    def items(self, split: Split) -> Sequence[Item]:
        """The items of a split (may be computed when indexed). No training question is among the held-out ones."""
        ...

    def score(
        self, items: Sequence[Item], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *, timeout: float
    ) -> NDArray[np.float64]:
        """Rewards [n, K] of n completions, each of its own item; finite. A verifier may use `timeout` seconds in all."""
        ...

    def correct(self, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which rows of `scores` [n, K] count as solved: their share is the held-out score."""
        ...


#: Columns that may hold an item's reference solution, in this order.
SOLUTION_COLUMNS = ("solution", "answer")


def solution_of(task: TextTask, item: Item) -> str | None:
    """An item's reference solution: of the column that the task's options name, else of `solution`, `answer`. None: it has none."""
    named = getattr(getattr(task, "options", None), "answer_column", "")
    found = next((item.columns[c] for c in (named, *SOLUTION_COLUMNS) if c and item.columns.get(c) is not None), None)
    return str(found) if found is not None and str(found) else None


def refuse_unsolved(task: TextTask, items: Sequence[Item], method: str) -> None:
    """Raise `CallError` when none of the first items has a reference solution."""
    some = [items[i] for i in range(min(len(items), 100))]
    if all(solution_of(task, item) is None for item in some):
        has = ", ".join(some[0].columns) or "none"
        raise CallError(
            f"{method} needs reference solutions, but items of {task.name} have none in a column called "
            f"{' or '.join(SOLUTION_COLUMNS)} (columns: {has}); name theirs with options.answer_column"
        )


def with_text(prompt: Prompt, text: str) -> Prompt:
    """The prompt with `text` behind it: behind the last message of a chat."""
    if isinstance(prompt, str):
        return prompt + text
    *before, last = prompt
    return [*before, {**last, "content": last["content"] + text}]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, without padding.

    With a chat template a plain text becomes a user message and the assistant's turn is opened; without one, messages are
    joined by newlines and the text is encoded as it stands, with the special tokens that the tokenizer itself adds.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
        ids = tokenizer(text)["input_ids"]
    if not ids:
        raise PoloptError(f"the prompt {prompt!r} has no tokens; a language model needs at least one")
    return [int(i) for i in ids]


def check_scores(scores: Any, n: int, channels: Sequence[str], task: str) -> NDArray[np.float64]:
    """`scores` as float64 [n, K]; raises `PoloptError` naming task, channel and row when shape or numbers are wrong."""
    try:
        table = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PoloptError(f"{task}: rewards are not numbers: {error}") from error
    if table.shape != (n, len(channels)):
        raise PoloptError(f"{task}: rewards have shape {table.shape}, expected ({n}, {len(channels)}): {', '.join(channels)}")
    bad = np.argwhere(~np.isfinite(table))
    if bad.size:
        row, k = (int(i) for i in bad[0])
        raise PoloptError(f"{task}: reward '{channels[k]}' of completion {row} is {table[row, k]}; rewards must be finite")
    return table


def refuse_empty(items: Sequence[Item], split: str, task: str) -> None:
    """Raise `CallError` when a split has no items."""
    if len(items) == 0:
        raise CallError(f"{task}: the {split} split has no items")
