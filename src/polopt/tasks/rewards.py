"""Rewards of text tasks: names, functions of the user's files and callables, weighted, checked and isolated.

A reward function has the signature of TRL's: `fn(prompts, completions, completion_ids, **columns) -> list[float | None]`, one
number per completion, None where the reward does not apply; it may be `async`. Every argument is a list with one entry per
completion; for conversational prompts a completion is `[{"role": "assistant", "content": text}]`. A function that does not
take `**kwargs` receives the arguments that it names. `trainer_state` is passed as None, `log_extra` does nothing, and
`log_metric(name, value)` adds a number to the task's report, each only to functions that name them.
"""

from __future__ import annotations

import ast
import difflib
import functools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from polopt.errors import CallError, PoloptError, nearest, unknown
from polopt.tasks import verifiers
from polopt.tasks.isolation import Answer, DirectHost, Host, ProcessHost, RewardFailure, host_for

OnError = Literal["raise", "zero", "mean"]
Data = Mapping[str, list[Any]]

#: name: (function in verifiers, needs an answer column, what follows the colon, runs in a process of its own)
BUILT_IN: dict[str, tuple[str, bool, str, bool]] = {
    "exact": ("exact", True, "", False),
    "math": ("math", True, "", True),
    "regex": ("matches", False, "pattern", True),
    "length": ("short", False, "limit", False),
}
_HELP = "known: exact, math, regex:PATTERN, length:TOKENS, or a function as path/to/file.py:NAME"


@dataclass(frozen=True)
class Reward:
    """One checked reward: its channel name, its weight, where it comes from, and how to get it running."""

    name: str
    weight: float
    origin: str
    needs_answer: bool
    open: Callable[[str], Host]  # takes the answer column


class RewardError(Exception):
    """The trace of a failed reward function, as the cause of the `PoloptError` that reports it."""


def parse_rewards(reward: Any, weights: Any = None) -> tuple[Reward, ...]:
    """Check the options `reward` (a name, a callable, or a list of them) and `weights`; imports and runs nothing.

    Raises `CallError` for unknown names (nearest one offered), missing files and functions, and unfitting weights.
    """
    specs = _listed(reward)
    if not specs or any(s is None or s == "" for s in specs):
        raise CallError(f"a data task needs a reward: set the option reward; {_HELP}")
    numbers = [1.0] * len(specs) if weights is None else _listed(weights)
    if len(numbers) != len(specs):
        raise CallError(f"weights = {weights!r} has {len(numbers)} numbers for {len(specs)} rewards; expected one for each")
    names: dict[str, int] = {}
    made = []
    for spec, given in zip(specs, numbers, strict=True):
        weight = _weight(given)
        if not math.isfinite(weight) or weight == 0:
            raise CallError(
                f"weights: {given!r} must be a finite number other than 0 (leave a reward out instead of weighting it by 0)"
            )
        name, origin, needs_answer, opener = _named(spec) if isinstance(spec, str) else _callable(spec)
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}-{names[name]}"
        made.append(Reward(unique, weight, origin, needs_answer, opener))
    return tuple(made)


def _listed(value: Any) -> list[Any]:
    """A list from a list, or from a text with commas (which a pattern may contain)."""
    if isinstance(value, str) and not value.strip().startswith("regex:"):
        value = value.split(",")
    return [v.strip() if isinstance(v, str) else v for v in (value if isinstance(value, list | tuple) else [value])]


def _weight(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _callable(function: Any) -> tuple[str, str, bool, Callable[[str], Host]]:
    if not callable(function):
        raise CallError(f"reward = {function!r} is {type(function).__name__}, expected a name or a callable; {_HELP}")
    name = getattr(function, "__name__", None) or type(function).__name__
    name = "reward" if name == "<lambda>" else str(name)
    return name, f"{getattr(function, '__module__', '')}.{name}".lstrip("."), False, lambda column: host_for(function)


def _named(spec: str) -> tuple[str, str, bool, Callable[[str], Host]]:
    if ".py:" in spec and not spec.startswith("regex:"):
        path, name = _file_function(spec)
        return name, str(path), False, lambda column: ProcessHost(("file", str(path), name, {}))
    head, _, argument = spec.partition(":")
    if head not in BUILT_IN:
        close = difflib.get_close_matches(head, BUILT_IN, n=1)
        guess = f", did you mean '{close[0]}'?" if close else ";"
        raise CallError(f"unknown reward '{spec}'{guess} {_HELP}")
    target, needs_answer, parameter, isolated = BUILT_IN[head]
    settings = _parameter(spec, head, parameter, argument)

    def opener(column: str) -> Host:
        full = {**settings, **({"column": column} if needs_answer else {})}
        if isolated:
            return ProcessHost(("file", verifiers.__file__, target, full))
        return DirectHost(functools.partial(getattr(verifiers, target), **full))

    return head, "built in", needs_answer, opener


def _parameter(spec: str, head: str, parameter: str, argument: str) -> dict[str, Any]:
    if not parameter:
        if argument:
            raise CallError(f"reward '{spec}': {head} takes nothing after a colon")
        return {}
    if parameter == "limit":
        if not argument.isdigit() or int(argument) == 0:
            raise CallError(f"reward '{spec}' needs a number of tokens after the colon, e.g. {head}:200")
        return {"limit": int(argument)}
    try:
        re.compile(argument)
    except re.error as error:
        raise CallError(f"reward '{spec}': '{argument}' is not a regular expression: {error}") from error
    if not argument:
        raise CallError(f"reward '{spec}' needs a pattern after the colon, e.g. {head}:<answer>.*</answer>")
    return {"pattern": argument}


def _file_function(spec: str) -> tuple[Path, str]:
    """Path and name of `file.py:NAME`, found in the source without running it."""
    text, _, name = spec.rpartition(":")
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise CallError(f"reward '{spec}': there is no file {path}")
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise CallError(f"reward '{spec}': {path} is not valid Python: {error}") from error
    defined: set[str] = set()
    functions: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(a.asname or a.name).partition(".")[0] for a in node.names}
    if name not in functions | defined and "*" not in defined:
        raise CallError(f"reward '{spec}': {path} has no '{name}'{nearest(name, functions or defined)}")
    return path, name


class RewardSet:
    """The rewards of a task: scores completions in all of them at once, and decides what a failing one means.

    on_error: "raise" ends the run with the function's name, the exception and the prompt; "zero" gives affected completions
    0 in that reward; "mean" gives them the mean of that reward over the prompt's other completions, so that they do not
    push. When a function raises on a batch it is called again on parts of it, to find the completions that it fails on.
    A call that hangs or crashes affects all of its completions. Failures are counted in `report()`.
    """

    def __init__(self, rewards: Sequence[Reward], *, on_error: str = "raise") -> None:
        if on_error not in get_args(OnError):
            raise unknown("value of on_error", on_error, get_args(OnError))
        self.rewards = tuple(rewards)
        self.on_error = on_error
        self._timeout = 60.0
        self._hosts: list[Host] = []
        self._report: dict[str, list[float]] = {}
        self._failures = 0

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the rewards, in the order of the columns of `score`."""
        return tuple(r.name for r in self.rewards)

    def open(self, answer_column: str) -> None:
        """Start processes without waiting for them. answer_column: where `exact` and `math` find the right answer."""
        if not self._hosts:
            self._hosts = [r.open(answer_column) for r in self.rewards]
            for host in self._hosts:
                host.warm()

    def score(self, data: Data, same: Sequence[Any], *, timeout: float = 60.0) -> Float[np.ndarray, "n K"]:
        """Weighted rewards of n completions, one column per reward; None counts as 0.

        data: prompts, completions, completion_ids and columns, n entries each. same: a hashable per completion, equal for
        completions of one prompt. timeout: seconds for each function; they run at the same time. Raises `PoloptError`
        unless `on_error` says otherwise.
        """
        self._timeout = timeout
        if not data["completions"]:
            return np.zeros((0, len(self.rewards)))
        assert self._hosts, "open() comes first"
        try:
            for host in self._hosts:
                host.submit({k: list(v) for k, v in data.items()}, timeout)
            raw = np.stack([self._collect(i, data) for i in range(len(self._hosts))], axis=1)
        except BaseException:
            for host in self._hosts:  # no late answer may be taken for that of the next call
                host.close()
            raise
        lost, missing = np.isinf(raw), np.isnan(raw)
        nowhere = missing.all(axis=1)
        if nowhere.any():
            row = int(nowhere.argmax())
            self._refuse(
                f"no reward applies to {_completion(data, row)}: every function returned None; expected at least one number"
            )
            lost[nowhere] = True
        self._failures += int(lost.any(axis=1).sum())
        filled = np.where(lost | missing, 0.0, raw)
        if self.on_error == "mean" and lost.any():
            filled = _fill_with_mean(filled, lost, missing, same)
        weighted: np.ndarray = filled * np.array([r.weight for r in self.rewards])
        return weighted

    def _collect(self, i: int, data: Data) -> Float[np.ndarray, " n"]:
        """Rewards of function i; NaN where it does not apply, inf where it failed and `on_error` lets that pass."""
        n = len(data["completions"])
        try:
            answer = self._hosts[i].collect()
        except RewardFailure as failure:
            if failure.kind == "load":
                raise self._error(i, failure, "") from RewardError(failure.trace)
            if self.on_error == "raise":
                place = self._blame(i, data) if failure.kind == "raised" else _blamed(failure.text, data)
                raise self._error(i, failure, place) from RewardError(failure.trace)
            return self._salvage(i, data, time.monotonic() + self._timeout) if failure.kind == "raised" else np.full(n, np.inf)
        return self._accept(i, answer, data)

    def _accept(self, i: int, answer: Answer, data: Data) -> Float[np.ndarray, " n"]:
        rewards, metrics = answer
        for name, value in metrics.items():
            self._report.setdefault(name, []).append(value)
        for row, x in enumerate(rewards):
            if x is not None and not math.isfinite(x):
                who = f"reward '{self.rewards[i].name}' ({self.rewards[i].origin})"
                self._refuse(f"{who} returned {x} for {_completion(data, row)}; expected a finite number, or None")
        return np.array([math.nan if x is None else x if math.isfinite(x) else math.inf for x in rewards])

    def _refuse(self, message: str) -> None:
        if self.on_error == "raise":
            raise PoloptError(message)

    def _error(self, i: int, failure: RewardFailure, place: str) -> PoloptError:
        verb = "raised " if failure.kind == "raised" else ""
        return PoloptError(f"reward '{self.rewards[i].name}' ({self.rewards[i].origin}) {verb}{failure.text}{place}")

    def _again(self, i: int, data: Data, rows: range) -> Answer:
        self._hosts[i].submit({k: v[rows.start : rows.stop] for k, v in data.items()}, self._timeout)
        return self._hosts[i].collect()

    def _blame(self, i: int, data: Data) -> str:
        """Where it raised, by halving: one completion on which it raises alone, or the whole batch."""
        rows = range(len(data["completions"]))
        while len(rows) > 1:
            middle = rows.start + len(rows) // 2
            for half in (range(rows.start, middle), range(middle, rows.stop)):
                try:
                    self._again(i, data, half)
                except RewardFailure:
                    rows = half
                    break
            else:
                return f", on {len(rows)} completions together, starting with {_completion(data, rows.start)}"
        return f", on {_completion(data, rows.start)}"

    def _salvage(self, i: int, data: Data, deadline: float) -> Float[np.ndarray, " n"]:
        """Rewards of the parts on which it does not raise; inf elsewhere and for what is not tried before the deadline."""
        out = np.full(len(data["completions"]), np.inf)
        waiting = [range(len(out))]
        while waiting:
            rows = waiting.pop()
            middle = rows.start + len(rows) // 2
            for half in (range(rows.start, middle), range(middle, rows.stop)):
                if len(half) == 0 or len(rows) == 1 or time.monotonic() > deadline:
                    continue
                try:
                    out[half.start : half.stop] = self._accept(i, self._again(i, data, half), data)
                except RewardFailure as failure:
                    if failure.kind == "raised":
                        waiting.append(half)
        return out

    def report(self) -> dict[str, float]:
        """`reward_failures` (completions) and means of logged metrics since the last call."""
        out = {name: float(np.mean(values)) for name, values in self._report.items()}
        if self.on_error != "raise":
            out["reward_failures"] = float(self._failures)
        self._report, self._failures = {}, 0
        return out

    def close(self) -> None:
        """End all processes; the next `open` starts them again."""
        for host in self._hosts:
            host.close()
        self._hosts = []


def _fill_with_mean(filled: np.ndarray, lost: np.ndarray, missing: np.ndarray, same: Sequence[Any]) -> np.ndarray:
    """Lost entries become the mean of the healthy ones of the same prompt and reward (0 without any)."""
    index = {key: i for i, key in enumerate(dict.fromkeys(same))}
    unit = np.array([index[key] for key in same])
    out = filled.copy()
    for k in range(filled.shape[1]):
        healthy = ~lost[:, k] & ~missing[:, k]
        count = np.bincount(unit[healthy], minlength=len(index))
        total = np.bincount(unit[healthy], weights=filled[healthy, k], minlength=len(index))
        out[lost[:, k], k] = (total / np.maximum(count, 1))[unit[lost[:, k]]]
    return out


def _completion(data: Data, row: int) -> str:
    n, prompt, completion = len(data["completions"]), data["prompts"][row], data["completions"][row]
    return f"completion {row} of {n} (prompt {shorten(prompt)}, completion {shorten(completion)})"


def _blamed(text: str, data: Data) -> str:
    """The prompt of the completion that a message about a wrong answer names, or of the first one."""
    found = re.search(r"for completion (\d+)", text)
    if found:
        return f"; that was {_completion(data, int(found[1]))}"
    return f", on {len(data['completions'])} completions, starting with {_completion(data, 0)}" if data["completions"] else ""


def shorten(value: Any, length: int = 60) -> str:
    """A prompt or completion in quotes, cut to `length` characters."""
    text = value if isinstance(value, str) else " / ".join(str(m.get("content", "")) for m in value)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


__all__ = ["BUILT_IN", "Reward", "RewardSet", "parse_rewards", "shorten"]
