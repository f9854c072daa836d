"""`text:<name>`: any task of reasoning-gym, with its own generator and verifier; train and held-out questions are disjoint."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, overload

import numpy as np
from numpy.typing import NDArray

from polopt.errors import CallError, PoloptError, unknown
from polopt.part import Range, check_fields
from polopt.tasks.text_presets import text_preset
from polopt.tasks.text_protocol import TEXT_OFFERS, Item, Split

#: How many indices are tried to find one more question that is not held out (or not yet held out).
_TRIES = 1000
_TAG = re.compile(r"<answer>\s?(.*?)\s?</answer>", re.DOTALL)


@dataclass(frozen=True)
class TextOptions:
    """Options of every reasoning-gym task; the task's own difficulty settings come on top of these."""

    render: Annotated[str, "prompt template; fields: {question} and the names in the item's metadata"] = "{question}"
    system: Annotated[str, "system message in front of every prompt; empty: none"] = ""
    answer: Annotated[str, "what is judged: auto (last <answer>...</answer>, else everything) or a regular expression"] = "auto"
    reward: Annotated[Literal["score", "exact"], "the verifier's score with its partial credit, or 1 only for score 1"] = "score"
    seed: Annotated[int, Range(ge=0), "of the item generator"] = 0
    train_items: Annotated[int, Range(ge=1), "items to train on"] = 10_000
    eval_items: Annotated[int, Range(ge=1), "held-out items"] = 256

    def __post_init__(self) -> None:
        check_fields(self, "options")
        if self.reward not in ("score", "exact"):
            raise unknown("value of options.reward", str(self.reward), ("score", "exact"))
        try:
            re.compile(self.answer)
        except re.error as error:
            raise CallError(f"options.answer = {self.answer!r} is not a regular expression: {error}") from error


@functools.cache
def _table() -> dict[str, tuple[str, str]]:
    """Name -> (module, config class) of every reasoning-gym task, read from its files: importing it all takes a second."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise PoloptError("reasoning-gym is not installed: pip install reasoning-gym")
    root = Path(next(iter(spec.submodule_search_locations)))
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(root.glob("*/**/*.py")):
        source = path.read_text(encoding="utf-8")
        call = re.search(r"^register_dataset\(\s*DATASET_NAME,\s*\w+,\s*(\w+)", source, re.MULTILINE)
        name = re.search(r'^DATASET_NAME\s*=\s*"([^"]+)"', source, re.MULTILINE)
        if call and name:
            found[name[1]] = (".".join(["reasoning_gym", *path.relative_to(root).with_suffix("").parts]), call[1])
    return found


def text_names() -> list[str]:
    """Names of all reasoning-gym tasks, without importing them."""
    return sorted(_table())


class TextTask:
    """A reasoning-gym task: question in, text out, judged by the task's own verifier (1 is correct, partial credit below)."""

    domain = "text"
    offers = TEXT_OFFERS
    #: For tasks that are written as a difference from this one: options, reasoning-gym's name, other difficulty settings.
    options_type: ClassVar[type[TextOptions]] = TextOptions
    source: ClassVar[str] = ""
    difficulty: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, name: str, options: Mapping[str, Any] | None = None) -> None:
        """`name` is "text:<task>"; `options` are `TextOptions` and fields of the task's config.

        Raises `CallError` for an unknown task, an unknown option, or a value that the task's own check refuses.
        """
        self.name = name
        self.dataset_name = self.source or name.removeprefix("text:")
        self._settings()
        own = {f.name for f in fields(self.options_type)}
        given = dict(options or {})
        self.options = self.options_type(**{k: v for k, v in given.items() if k in own})
        settings = {k: v for k, v in given.items() if k not in own}
        self.config = {**self.difficulty, **settings}
        if settings:
            self._make_dataset()  # only a task with difficulty settings of the user's is imported to be checked
        self.channels: tuple[str, ...] = (self.options.reward,)

    def preset(self, method: Any) -> Mapping[str, Any]:
        """Settings under which a small model learns a short task."""
        return text_preset(method)

    def option_fields(self) -> dict[str, tuple[Any, str]]:
        """Every option by name: (default, help)."""
        mine = {f.name: (f.default, _help(self.options_type, f.name)) for f in fields(self.options_type)}
        theirs = {
            k: (self.difficulty.get(k, v), f"of {self.dataset_name}")
            for k, v in self._settings().items()
            if k not in ("seed", "size")
        }
        return {**mine, **theirs}

    def _settings(self) -> Mapping[str, Any]:
        """Names and defaults of the difficulty settings; raises `CallError` for a task that does not exist."""
        if self.dataset_name not in _table():
            raise unknown("text task", self.dataset_name, _table())
        return _config_defaults(self.dataset_name)

    # ---------------------------------------------------------------- items
    @functools.cached_property
    def dataset(self) -> Any:
        """The reasoning-gym generator; item `i` depends on seed and `i` alone."""
        return self._make_dataset()

    def _check_names(self) -> None:
        """Refuse options that the task does not have, or of another type, without importing the task."""
        valid = self._settings()
        for key, value in self.config.items():
            if key == "size":
                raise CallError("option 'size' is set by train_items and eval_items")
            if key not in valid:
                raise unknown(f"option of {self.name}", key, {f.name for f in fields(self.options_type)} | (set(valid) - {"size"}))
            _check_type(self.name, key, value, valid[key])

    def _make_dataset(self) -> Any:
        self._check_names()
        module, _ = _table()[self.dataset_name]
        try:
            factory = importlib.import_module("reasoning_gym.factory")
            importlib.import_module(module)
            return factory.create_dataset(self.dataset_name, **self.config, seed=self.options.seed, size=2**31 - 1)
        except (AssertionError, TypeError, ValueError) as error:
            shown = ", ".join(f"{k}={v!r}" for k, v in self.config.items())
            raise CallError(f"{self.name} refuses its options ({shown}): {error}") from error

    @functools.cached_property
    def _held_out(self) -> tuple[list[Item], frozenset[str], int]:
        """Held-out items, their questions, and the first index that they do not use."""
        items: list[Item] = []
        questions: set[str] = set()
        index = 0
        while len(items) < self.options.eval_items:
            if index >= _TRIES + 20 * self.options.eval_items:
                raise CallError(
                    f"{self.name} has too few distinct questions ({len(items)}): "
                    f"lower options.eval_items = {self.options.eval_items}"
                )
            item = self._item(index)
            index += 1
            if (question := self.question(item)) not in questions:
                questions.add(question)
                items.append(item)
        return items, frozenset(questions), index

    def items(self, split: Split) -> Sequence[Item]:
        """Held-out items, or the training items (generated when indexed; those that repeat a held-out question are replaced)."""
        if split == "eval":
            return self._held_out[0]
        return _TrainItems(self)

    def _item(self, index: int) -> Item:
        entry = self.dataset[index]
        try:
            text = self.options.render.format_map({**entry.get("metadata", {}), "question": entry["question"]})
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            known = ["question", *entry.get("metadata", {})]
            raise CallError(
                f"options.render = {self.options.render!r} does not fit {self.name} ({error!r}); fields: {', '.join(known)}"
            ) from error
        system = self.options.system
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": text}] if system else text
        return Item(prompt=prompt, columns=entry)

    def question(self, item: Item) -> str:
        """What two items have in common when one gives away the answer of the other: such items are never in both splits."""
        return str(item.columns["question"]).strip()

    def trained(self, item: Item) -> Item:
        """A training item as it is trained on; held-out items never pass through here."""
        return item

    @functools.lru_cache(maxsize=100_000)  # noqa: B019  a task lives as long as its run
    def train_item(self, i: int) -> Item:
        """Training item `i`: the first of the indices first+i, first+i+n, first+i+2n, ... whose question is not held out."""
        _, held_out, first = self._held_out
        for attempt in range(_TRIES):
            item = self._item(first + i + attempt * self.options.train_items)
            if self.question(item) not in held_out:
                return self.trained(item)
        raise CallError(f"{self.name} has too few distinct questions: lower options.eval_items = {self.options.eval_items}")

    # ---------------------------------------------------------------- judging
    def score(
        self, items: Sequence[Item], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *, timeout: float = 60.0
    ) -> NDArray[np.float64]:
        """The verifier's score of each completion [n, 1]; an answer on which the verifier itself fails scores 0."""
        judge = self.dataset.score_answer
        out = np.zeros((len(items), 1))
        for row, (item, text) in enumerate(zip(items, completions, strict=True)):
            try:
                out[row, 0] = judge(self.extract(text), item.columns)
            except Exception:  # verifiers parse free text: an answer that breaks the parser is a wrong answer
                out[row, 0] = 0.0
        return (out >= 1.0).astype(np.float64) if self.options.reward == "exact" else out

    def extract(self, completion: str) -> str:
        """The part of a completion that is judged."""
        if self.options.answer == "auto":
            found = _TAG.findall(completion)
            return cast(str, found[-1]).strip() if found else completion.strip()
        matches = list(re.finditer(self.options.answer, completion, re.DOTALL))
        if not matches:
            return ""
        return (matches[-1][1] if matches[-1].re.groups else matches[-1][0]) or ""

    def correct(self, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Verifier score 1."""
        return scores[:, 0] >= 1.0


class _TrainItems(Sequence[Item]):
    def __init__(self, task: TextTask) -> None:
        self._task = task

    def __len__(self) -> int:
        return self._task.options.train_items

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self._task.train_item(i) for i in range(*index.indices(len(self)))]
        return self._task.train_item(range(len(self))[index])

    def __iter__(self) -> Iterator[Item]:
        return (self._task.train_item(i) for i in range(len(self)))


@functools.cache
def _config_defaults(name: str) -> dict[str, Any]:
    """Fields of a task's config class and their defaults (None where they are not literals), read from its file."""
    module, config = _table()[name]
    spec = importlib.util.find_spec("reasoning_gym")
    assert spec is not None  # _table found it
    root = Path(next(iter(spec.submodule_search_locations or ())))
    tree = ast.parse(root.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == config):
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                found[line.target.id] = line.value.value if isinstance(line.value, ast.Constant) else None
    return found


def _help(cls: type, name: str) -> str:
    from polopt.part import hints

    return next((m for m in getattr(hints(cls)[name], "__metadata__", ()) if isinstance(m, str)), "")


def _check_type(task: str, key: str, value: Any, default: Any) -> None:
    """Raise `CallError` when `value` is not of the kind of the default."""
    kinds: tuple[type, ...] = (int,) if type(default) is int else (int, float) if type(default) is float else (type(default),)
    if not isinstance(default, bool | int | float | str):
        return
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise CallError(f"option {key} = {value!r} of {task} must be {kinds[-1].__name__} (default {default!r})")
