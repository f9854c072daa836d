"""Calling reward functions so that one that raises, hangs or crashes can neither stop nor block the run."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import IO, Any, Protocol

from polopt.errors import CallError
from polopt.tasks import reward_worker

Data = Mapping[str, Any]  # prompts, completions, completion_ids and columns, each a list with one entry per completion
Answer = tuple[list[float | None], dict[str, float]]  # rewards, logged metrics

#: Seconds that importing a reward function's file may take, unless the timeout of its calls is longer.
LOAD_SECONDS = 120.0
_GRACE = 2.0  # a worker ends itself at the timeout; only one that is stopped by the system has to be waited out


class RewardFailure(Exception):
    """A call of a reward function failed. kind: "raised", "wrong" (its answer), "timeout", "died" or "load"."""

    def __init__(self, kind: str, text: str, trace: str = "") -> None:
        super().__init__(text)
        self.kind, self.text, self.trace = kind, text, trace


class Host(Protocol):
    """Where one reward function runs. `submit` starts a call, `collect` waits for its answer or raises `RewardFailure`."""

    def warm(self) -> None:
        """Start what takes time, without waiting."""
        ...

    def submit(self, data: Data, timeout: float) -> None: ...

    def collect(self) -> Answer: ...

    def close(self) -> None: ...


def _seconds(x: float) -> str:
    return f"{x:g} s"


class DirectHost:
    """Calls a function of this library that is known to be quick and total, in this thread."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._data: Data = {}

    def warm(self) -> None: ...

    def submit(self, data: Data, timeout: float) -> None:
        self._data = data

    def collect(self) -> Answer:
        return _unpack(_answer(self._function, self._data))

    def close(self) -> None: ...


class ThreadHost:
    """Calls a function in a daemon thread: for lambdas, closures and notebook cells, which no other process can import.

    A call that exceeds its timeout is given up, but Python cannot end its thread: it goes on in the background until it
    returns or the program ends, and one that never releases the interpreter lock cannot be given up at all.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._answers: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._timeout, self._deadline = 0.0, 0.0

    def warm(self) -> None: ...

    def submit(self, data: Data, timeout: float) -> None:
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        answers: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()  # a late answer of an earlier call goes nowhere
        self._answers = answers
        threading.Thread(target=lambda: answers.put(_answer(self._function, data)), name="reward", daemon=True).start()

    def collect(self) -> Answer:
        try:
            answer = self._answers.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            raise RewardFailure("timeout", f"did not answer within {_seconds(self._timeout)}") from None
        return _unpack(answer)

    def close(self) -> None: ...


def _answer(function: Callable[..., Any], data: Data) -> tuple[Any, ...]:
    try:
        return ("ok", *reward_worker.apply(function, data))
    except BaseException as error:  # also SystemExit: it must not silently end the thread
        return reward_worker.failure(error)


def _unpack(answer: tuple[Any, ...]) -> Answer:
    if answer[0] == "ok":
        return answer[1], answer[2]
    raise RewardFailure(*answer)


class ProcessHost:
    """Calls a function in a process of its own, which lasts from call to call and is started anew after it had to be killed.

    what: ("file", path, name, settings) or ("pickle", bytes, sys.path), see `reward_worker`. The process leads its own
    session, so that Ctrl-C does not reach it and whatever the function itself started is killed with it; it ends by itself
    when the run is gone, even while the function hangs.
    """

    def __init__(self, what: tuple[Any, ...]) -> None:
        self._what = what
        self._worker: _Worker | None = None
        self._problem: RewardFailure | None = None

    def warm(self) -> None:
        if self._worker is None:
            self._worker = _Worker(self._what)

    def submit(self, data: Data, timeout: float) -> None:
        self._problem = None
        self.warm()
        assert self._worker is not None
        try:
            self._worker.loaded(timeout)
            self._worker.send("call", data, timeout)
        except RewardFailure as failure:
            self._problem = failure
            self.close()

    def collect(self) -> Answer:
        if self._problem is not None:
            raise self._problem
        assert self._worker is not None
        try:
            return _unpack(self._worker.receive())
        except RewardFailure as failure:
            if failure.kind in ("timeout", "died"):
                self.close()
            raise

    def close(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None


class _Worker:
    """One running process and the socket to it."""

    def __init__(self, what: tuple[Any, ...]) -> None:
        ours, theirs = socket.socketpair()
        self._trace: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process
        fds = (theirs.fileno(), self._trace.fileno())
        command = [sys.executable, "-P", reward_worker.__file__, *map(str, fds)]  # -P: this folder's names must not be importable
        self._process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        self._socket = ours
        self._link = Connection(os.dup(ours.fileno()))
        self.end = weakref.finalize(self, _kill, self._process, self._link, ours, self._trace, os.getpid())
        self._loading = True
        self._timeout, self._deadline = 0.0, 0.0
        with contextlib.suppress(RewardFailure):  # if it died at once, `loaded` will say so
            self.send("load", what, LOAD_SECONDS)

    def send(self, kind: str, payload: Any, timeout: float) -> None:
        """Start a call; never blocks for longer than the timeout."""
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        try:
            message = pickle.dumps((kind, payload, timeout))
        except Exception as error:
            raise CallError(f"the data of a reward call cannot be sent to its process: {type(error).__name__}: {error}") from error
        patience = struct.pack("ll", int(timeout + _GRACE) + 1, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        try:
            self._link.send_bytes(message)
        except OSError as error:
            raise self._gone() from error

    def receive(self) -> tuple[Any, ...]:
        """The answer to the last message."""
        try:
            if not self._link.poll(max(0.0, self._deadline + _GRACE - time.monotonic())):
                raise RewardFailure("timeout", f"did not answer within {_seconds(self._timeout)}")
            answer = self._link.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        return tuple(answer)

    def loaded(self, timeout: float) -> None:
        """Wait until the function is imported."""
        if not self._loading:
            return
        try:
            _unpack(self.receive())
        except RewardFailure as failure:
            raise RewardFailure("load", f"could not be loaded: {failure.text}", failure.trace) from failure
        self._loading = False

    def _gone(self) -> RewardFailure:
        """Why the process is gone: it ended itself at the timeout and left a trace, or it crashed."""
        code = _exit_code(self._process.pid)
        self._trace.seek(0)
        trace = self._trace.read().decode(errors="replace")
        if trace:
            own = (m for m in re.finditer(r'File "([^"]+)", line (\d+) in (\S+)', trace))
            where = next((m for m in own if _is_own(m[1])), None)
            place = f"; it was at {os.path.basename(where[1])}:{where[2]} in {where[3]}" if where else ""
            return RewardFailure("timeout", f"did not answer within {_seconds(self._timeout)}{place}", trace)
        how = f"with status {code}"
        if code is not None and code < 0:
            how = f"by {signal.Signals(-code).name}"
        return RewardFailure("died", f"ended its process {how}")


def _exit_code(pid: int) -> int | None:
    """Exit status of a child that has ended (minus the signal that ended it), None if it has not; leaves it to be waited for."""
    for _ in range(int(_GRACE / 0.02)):
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        time.sleep(0.02)
    return None


def _is_own(path: str) -> bool:
    return (
        path != reward_worker.__file__ and not path.startswith("<") and sys.base_prefix not in path and "site-packages" not in path
    )


def _kill(process: subprocess.Popen[bytes], link: Connection, ours: socket.socket, trace: IO[bytes], creator: int) -> None:
    if os.getpid() != creator:
        return  # a fork of the run ends: the worker is not its own
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # before it is waited for, so that the number still belongs to it
    link.close()
    ours.close()
    trace.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def host_for(function: Callable[..., Any]) -> Host:
    """A process of its own if another process can import `function`, otherwise a thread."""
    try:
        pickled = pickle.dumps(function)
    except Exception:
        return ThreadHost(function)
    if b"__main__" in pickled or b"_polopt_user_" in pickled:  # importing a script again would run it again
        return ThreadHost(function)
    return ProcessHost(("pickle", pickled, [os.path.abspath(p) for p in sys.path]))


__all__ = ["DirectHost", "Host", "ProcessHost", "RewardFailure", "ThreadHost", "host_for"]
