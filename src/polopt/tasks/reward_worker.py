"""The process in which reward functions run: started as a script, it imports neither polopt nor PyTorch.

It reads pickled messages from the socket whose number is its first argument: ("load", what, timeout), where what is
("file", path, name, settings) or ("pickle", bytes, sys.path), and ("call", data, timeout). It answers ("ok", rewards, metrics),
("raised", text, trace) or ("wrong", text, ""); rewards are floats and None, so that nothing of the user's own has to be
unpickled by the run. The trace of a call that takes too long goes to the file descriptor given as second argument.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import importlib.util
import inspect
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

#: Arguments that TRL offers besides the columns; here they are passed only to functions that name them.
EXTRAS = ("trainer_state", "log_extra", "log_metric", "environments")


class WrongAnswer(Exception):
    """A reward function returned something that is not a list of numbers and None."""


def load_file(path: str, name: str, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The function `name` of the Python file `path` (whose folder becomes importable) with these settings filled in."""
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module_name = "_polopt_reward_" + "".join(c if c.isalnum() else "_" for c in os.path.abspath(path))
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    found = getattr(module, name)
    if not callable(found):
        raise TypeError(f"{name} is {type(found).__name__}, expected a function")
    return functools.partial(found, **settings) if settings else found


def select(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that `function` takes: all data for **kwargs, otherwise what it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in C: it has to take everything
        return {k: v for k, v in offered.items() if k not in EXTRAS}
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {k: v for k, v in offered.items() if k in named or (open_ended and k not in EXTRAS)}


def apply(function: Callable[..., Any], data: Mapping[str, Any]) -> tuple[list[float | None], dict[str, float]]:
    """Rewards of one call with data["completions"], as floats and None, and what it logged by `log_metric`.

    Coroutines are run to their end. Raises `WrongAnswer` when the result is no list of numbers or has another length.
    """
    metrics: dict[str, float] = {}
    extras = {
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: metrics.__setitem__(str(name), float(value)),
    }
    result = function(**select(function, {**data, **extras}))
    if inspect.isawaitable(result):
        result = asyncio.run(_finish(result))
    return plain(result, len(data["completions"])), metrics


async def _finish(awaitable: Any) -> Any:
    return await awaitable


def plain(result: Any, n: int) -> list[float | None]:
    """A list of n floats and None from lists, tuples, arrays or tensors of numbers; raises `WrongAnswer`."""
    expected = f"expected a list of {n} numbers (or None), one per completion"
    if hasattr(result, "tolist"):  # arrays and tensors
        result = result.tolist()
    if not isinstance(result, list | tuple):
        raise WrongAnswer(f"returned {_describe(result)}, {expected}")
    if len(result) != n:
        raise WrongAnswer(f"returned {len(result)} rewards, {expected}")
    return [_number(x, i, expected) for i, x in enumerate(result)]


def _number(x: Any, i: int, expected: str) -> float | None:
    if x is None:
        return None
    if isinstance(x, str | bytes | list | tuple | dict):
        raise WrongAnswer(f"returned {_describe(x)} for completion {i}, {expected}")
    try:
        return float(x)  # also NumPy numbers and tensors with one element
    except (TypeError, ValueError) as error:
        raise WrongAnswer(f"returned {_describe(x)} for completion {i}, {expected}") from error


def _describe(x: Any) -> str:
    text = repr(x)
    return "None" if x is None else f"{type(x).__name__} {text if len(text) <= 40 else text[:40] + '...'}"


def failure(error: BaseException) -> tuple[str, str, str]:
    """("raised", "Type: message, at file:line in function", trace) of an exception, or ("wrong", message, "")."""
    if isinstance(error, WrongAnswer):
        return "wrong", str(error), ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__]
    where = f", at {os.path.basename(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}" if own else ""
    return "raised", f"{type(error).__name__}: {error}{where}", "".join(traceback.format_exception(error))


def serve(link: Connection, trace: int) -> None:
    """Answer messages until the other side is gone."""
    parent = os.getppid()
    function: Callable[..., Any] | None = None
    while True:
        # a fork of the other side may hold the socket open after its death: look for the parent too
        while not link.poll(2.0):
            if os.getppid() != parent:
                return
        kind, payload, timeout = link.recv()
        # this watch needs no interpreter lock: it also ends a process that is stuck in C code or has lost its parent
        faulthandler.dump_traceback_later(timeout, exit=True, file=trace)
        answer: tuple[Any, ...]
        try:
            if kind == "load":
                function = _load(payload)
                answer = ("ok", [], {})
            else:
                assert function is not None
                answer = ("ok", *apply(function, payload))
        except BaseException as error:  # a reward function may even call sys.exit
            answer = failure(error)
        faulthandler.cancel_dump_traceback_later()
        link.send(answer)


def _load(what: tuple[Any, ...]) -> Callable[..., Any]:
    if what[0] == "file":
        return load_file(*what[1:])
    sys.path[:] = what[2]
    return pickle.loads(what[1])  # type: ignore[no-any-return]


def main() -> None:
    """Serve the socket and trace descriptors given as arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides what an interrupt means
    with contextlib.suppress(EOFError, OSError):  # the run has ended
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
    os._exit(0)  # threads that a reward function left behind must not keep the process


if __name__ == "__main__":
    main()
