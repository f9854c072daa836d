"""Small text tasks for experiments: short prompts, a shipped model that begins half-way, dials for what goes wrong in practice."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from polopt.errors import unknown
from polopt.part import Range
from polopt.tasks.text import TextOptions, TextTask
from polopt.tasks.text_presets import text_preset
from polopt.tasks.text_protocol import Item

#: name -> (module, class): what `text:NAME` means before a task of reasoning-gym is looked for
MINIATURES = {
    "chain": ("polopt.tasks.chain", "ChainTask"),
    "countdown": ("polopt.tasks.countdown", "CountdownTask"),
    "spell": ("polopt.tasks.spell", "SpellTask"),
}

Second = Literal["none", "format", "length"]


def text_task(name: str, options: Mapping[str, Any] | None = None) -> TextTask:
    """The task called `text:<name>`: a small one of this library, else the task of reasoning-gym."""
    module, cls = MINIATURES.get(name.removeprefix("text:"), ("polopt.tasks.text", "TextTask"))
    made: TextTask = getattr(import_module(module), cls)(name, options)
    return made


@dataclass(frozen=True)
class MiniOptions(TextOptions):
    """Options of every small text task. Dials act on training items only: held-out answers are judged as they are."""

    render: Annotated[str, "prompt template as of other text tasks; empty: the short form that the shipped model knows"] = ""
    reward: Annotated[Literal["score", "exact"], "the verifier's score with its partial credit, or 1 only for score 1"] = "exact"
    flips: Annotated[float, Range(ge=0, le=1), "chance that a verdict is turned round (1 - reward)"] = 0.0
    random_labels: Annotated[float, Range(ge=0, le=1), "share of items that are judged by the answer to another question"] = 0.0
    shortcut: Annotated[float, Range(ge=0, le=1), "paid for a wrong answer of the kind that a lazy verifier lets pass"] = 0.0
    second: Annotated[Second, "a second reward channel: format, or length"] = "none"
    length: Annotated[int, Range(ge=1), "symbols that the second channel `length` allows"] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.second not in ("none", "format", "length"):
            raise unknown("value of options.second", str(self.second), ("none", "format", "length"))


class MiniTask(TextTask):
    """A small text task. Its items carry the reference solution, as the policy could write it, in the column `solution`.

    A task says what a prompt and a solution look like, and judges completions; this class adds the dials.
    """

    options_type: ClassVar[type[TextOptions]] = MiniOptions
    options: MiniOptions
    model: ClassVar[str]  # the shipped model that begins half-way
    tokens: ClassVar[int]  # the longest completion
    #: Column of an item with its reference solution: what hints are cut from.
    solution: ClassVar[str] = "solution"

    def __init__(self, name: str, options: Mapping[str, Any] | None = None) -> None:
        """As `TextTask`; a second reward is a channel of its own."""
        super().__init__(name, options)
        if self.options.second != "none":
            self.channels = (self.options.reward, self.options.second)

    def preset(self, method: Any) -> Mapping[str, Any]:
        """Settings under which the task's own model learns."""
        chosen = {
            **text_preset(method, completions=128, rate=3e-4), "policy.model": self.model, "optim.micro": 128,
            "collect.max_new_tokens": self.tokens, "evaluate.greedy": False,
        }  # fmt: skip
        if hasattr(method.sampler, "connector"):
            chosen["sampler.connector"] = ""  # the model was shown pieces of solutions right behind the prompt
        return chosen

    # ---------------------------------------------------------------- what a task says
    def prompt(self, entry: Mapping[str, Any]) -> str:
        """The question in few symbols."""
        raise NotImplementedError

    def solve(self, entry: Mapping[str, Any]) -> str:
        """The reference solution, as the policy could write it."""
        raise NotImplementedError

    def judge(self, completion: str, entry: Mapping[str, Any]) -> float:
        """The verifier's score: 1 is correct."""
        raise NotImplementedError

    def relabel(self, entry: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
        """`entry`, judged as if its right answer were that of `other`."""
        raise NotImplementedError

    def lazy(self, completion: str, entry: Mapping[str, Any]) -> bool:
        """Whether a wrong completion is one that a lazy verifier lets pass."""
        raise NotImplementedError

    def formatted(self, completion: str) -> bool:
        """Whether the second channel `format` is paid."""
        raise NotImplementedError

    # ---------------------------------------------------------------- items
    def _item(self, index: int) -> Item:
        if self.options.render:
            item = super()._item(index)
        else:
            entry = self.dataset[index]
            text, system = self.prompt(entry), self.options.system
            item = Item([{"role": "system", "content": system}, {"role": "user", "content": text}] if system else text, entry)
        return Item(item.prompt, {**item.columns, self.solution: self.solve(item.columns), "train": False})

    def trained(self, item: Item) -> Item:
        """A training item, perhaps judged by the answer to another question."""
        columns = {**item.columns, "train": True}
        luck = _uniform(self.options.seed, "label", self.question(item))
        if luck < self.options.random_labels:
            other = self.dataset[int(_uniform(self.options.seed, "other", self.question(item)) * 2**30)]
            columns |= self.relabel(item.columns, other)
        return Item(item.prompt, columns)

    # ---------------------------------------------------------------- judging
    def score(
        self, items: Sequence[Item], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *, timeout: float = 60.0
    ) -> NDArray[np.float64]:
        """Rewards [n, K]: the verdict, and the second channel where one is asked for.

        A verdict is turned round by the luck of question, completion and how often that completion was seen in this call, so
        that equal answers may be judged differently and a resumed run still meets the same verdicts.
        """
        o = self.options
        out = np.zeros((len(items), len(self.channels)))
        seen: Counter[tuple[str, str]] = Counter()
        for row, (item, text) in enumerate(zip(items, completions, strict=True)):
            found = self.judge(self.extract(text) if o.answer != "auto" else text.strip(), item.columns)
            found = float(found >= 1.0) if o.reward == "exact" else found
            if item.columns["train"]:
                if o.shortcut and found < 1.0 and self.lazy(text, item.columns):
                    found = max(found, o.shortcut)
                if o.flips:
                    key = (self.question(item), text)
                    seen[key] += 1
                    found = 1.0 - found if _uniform(o.seed, "flip", *key, str(seen[key])) < o.flips else found
            out[row, 0] = found
            if o.second == "format":
                out[row, 1] = self.formatted(text)
            elif o.second == "length":
                out[row, 1] = len(text) <= o.length
        return out


def _uniform(seed: int, *what: str) -> float:
    """A number in [0,1) that depends on its arguments alone."""
    digest = hashlib.blake2b("\0".join((str(seed), *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


__all__ = ["MINIATURES", "MiniOptions", "MiniTask", "text_task"]
