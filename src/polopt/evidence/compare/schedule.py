"""Runs jobs side by side in children of a worker process; survives failed and killed ones, and ends cleanly on a signal."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from polopt.errors import CallError, PoloptError
from polopt.evidence.compare import worker
from polopt.evidence.compare.folders import note, read_metrics, read_record, set_aside
from polopt.evidence.compare.read import absent, missing, offered, verdict_on
from polopt.evidence.compare.results import Contestant

#: A run that was killed is continued this often.
CONTINUED = 1
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from polopt.evidence.compare.worker import main; main()"


@dataclass(eq=False)
class Job:
    """One run: what to do in which folder. spec: a run of the library; words: an external program's command."""

    contestant: str
    seed: int
    folder: Path
    spec: Mapping[str, Any] | None = None
    words: Sequence[str] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plan: Mapping[str, Any] = field(default_factory=lambda: {"metric": "eval_score", "unit": "decisions", "budget": 0.0})
    trial: str = ""  # of tuning
    state: str = "waiting"  # waiting, running, done, failed, unfinished
    error: str = ""
    killed: int = 0
    began: float = 0.0
    moved: float = 0.0  # when its metrics last grew
    size: int = 0
    pid: int = 0

    def message(self, number: int) -> dict[str, Any]:
        """What the worker is sent. Raises `CallError` for what cannot be sent."""
        base: dict[str, Any] = {
            "id": number,
            "folder": str(self.folder.resolve()),
            "record": dict(self.record),
            "notes": self.notes,
        }
        return base | ({"words": list(self.words)} if self.words else {"spec": packed(self.spec)})


def packed(spec: Any) -> str:
    """Anything as text; objects of the calling script and of users' files travel by value."""
    import cloudpickle

    for name, module in list(sys.modules.items()):
        if name.startswith("_polopt_user_") and module.__name__ not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
    try:
        return base64.b64encode(cloudpickle.dumps(spec)).decode()
    except Exception as error:
        raise CallError(
            f"a method or task made in Python cannot be sent to the process that runs it ({type(error).__name__}: {error}); "
            "keep it in a file and name it file.py:NAME"
        ) from error


class Watcher(Protocol):
    """What is shown while jobs run."""

    def started(self, job: Job) -> None: ...

    def ended(self, job: Job) -> None: ...

    def tick(self) -> None: ...


class Worker:
    """The worker process and the lines exchanged with it."""

    def __init__(self, log: Path, preload: Sequence[str], lock: int | None = None) -> None:
        self._log = log.open("ab")
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, json.dumps([p or os.getcwd() for p in sys.path])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True, env=environment, bufsize=0,
            pass_fds=() if lock is None else (lock,),
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        self._buffer = b""
        self.send({"preload": list(preload), "lock": lock})

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a line; a worker that is gone is noticed when its answers end."""
        with contextlib.suppress(BrokenPipeError):
            data = memoryview(json.dumps(message).encode() + b"\n")
            while data:
                data = data[self._in.write(data) or 0 :]

    def answers(self, timeout: float) -> list[dict[str, Any]] | None:
        """Lines that arrive within `timeout` seconds; None when the worker is gone."""
        readable, _, _ = select.select([self._out], [], [], timeout)
        if not readable:
            return []
        data = self._out.read(1 << 16)
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self, timeout: float = worker.GRACE + 10) -> None:
        """End the worker; children that still run save and end first."""
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._out.close()
        self._log.close()


class Scheduler:
    """Keeps up to `jobs` children busy until all jobs have ended; may be used for several batches of jobs.

    signal: the number of the signal that ended it early.
    """

    def __init__(
        self,
        out: Path,
        jobs: int,
        preload: Sequence[str],
        watcher: Watcher,
        *,
        timeout: float | None = None,
        wait: float = 0.5,
        lock: int | None = None,
    ) -> None:
        self.out, self.slots, self.preload, self.watcher, self.timeout, self.wait = out, jobs, preload, watcher, timeout, wait
        self.lock = lock  # an open file that the worker keeps open as long as a child lives
        self.signal: int | None = None
        self.metric_exists = False
        self.absent = ""  # in words that the metric does not exist: no further job is begun
        self.idle: Callable[[], object] | None = None  # called once, when a core has nothing left to do
        self._signals_seen = self._signals_told = 0
        self._worker: Worker | None = None
        self._restarts = 0
        self._number = 0
        self._active: dict[int, Job] = {}

    def warm(self) -> None:
        """Start the worker, which imports while the caller does other things."""
        if self._worker is None:
            self._worker = Worker(self.out / "worker.log", self.preload, self.lock)

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs; on SIGINT or SIGTERM the running ones save and end, and the others stay unfinished."""
        waiting = [j for j in jobs if j.state == "waiting"]
        with self._signals():
            while waiting or self._active:
                if self.signal is not None:
                    waiting = self._drop(waiting)
                    self._tell_signals()
                elif self.absent:
                    waiting = self._drop(waiting)
                while waiting and len(self._active) < self.slots:
                    self._start(waiting.pop(0))
                self.warm()
                assert self._worker is not None
                answers = self._worker.answers(self.wait) if self._active else []
                if answers is None:
                    waiting = self._lost() + waiting
                for answer in answers or []:
                    if "pid" in answer:
                        begun = self._active[answer["id"]]
                        begun.pid, begun.began, begun.moved = int(answer["pid"]), time.monotonic(), time.monotonic()
                    elif "status" in answer:
                        job = self._ended(answer)
                        waiting = [*([job] if job is not None else []), *waiting]
                self._watch_time()
                self.watcher.tick()
                over = self.signal is not None or self.absent
                if self.idle is not None and not over and not waiting and len(self._active) < self.slots:
                    self.idle()
                    self.idle = None

    def _tell_signals(self) -> None:
        """Pass signals on: after the jobs that were sent before, of which none may miss it."""
        if self._signals_seen > self._signals_told and self._worker is not None:
            self._signals_told = self._signals_seen
            self._worker.send({"signal": int(signal.SIGKILL if self._signals_seen > 1 else signal.SIGTERM)})

    def _drop(self, waiting: list[Job]) -> list[Job]:
        for job in waiting:
            job.state = "unfinished"
        return []

    def _start(self, job: Job) -> None:
        self.warm()
        assert self._worker is not None
        self._number += 1
        job.state, job.began, job.moved, job.size = "running", time.monotonic(), time.monotonic(), 0
        job.pid = 0
        if job.words and read_record(job.folder):
            set_aside(job.folder, "not finished", "partial")  # a program begins anew
        if job.words:
            note(job.folder, **job.record, notes=job.notes, status="running", error="")
        message = job.message(self._number)
        job.notes = []
        self._active[self._number] = job
        self._worker.send(message)
        self.watcher.started(job)

    def _lost(self) -> list[Job]:
        """The worker is gone, and its children with it: count them as killed, and start another one."""
        assert self._worker is not None
        code = self._worker.process.wait()
        self._worker.close()
        self._worker = None
        self._restarts += 1
        if self._restarts > 3 or not self._active:
            raise PoloptError(f"the process that runs jobs ended with status {code}; see {self.out}/worker.log")
        lost, again = list(self._active), []
        for number in lost:
            _wait_for(self._active[number].pid)
            job = self._ended({"id": number, "status": -signal.SIGKILL, "rss": 0, "cpu": 0.0})
            again += [job] if job is not None else []
        return again

    def _ended(self, answer: Mapping[str, Any]) -> Job | None:
        """Note how a child ended; returns the job if it is to be tried again."""
        job = self._active.pop(int(answer["id"]))
        status = int(answer["status"])
        record = read_record(job.folder)
        # the worker's clock: this process may have been busy (`idle`) when the child ended
        wall = float(record.get("wall_seconds") or 0.0) + float(answer.get("wall", time.monotonic() - job.began))
        peak = max(int(record.get("peak_rss") or 0), int(answer["rss"]))
        cpu = float(record.get("cpu_seconds") or 0.0) + float(answer["cpu"])
        note(job.folder, wall_seconds=round(wall, 3), cpu_seconds=round(cpu, 3), peak_rss=peak)
        stopped = self.signal is not None
        if status < 0 and not stopped and not job.error:
            job.killed += 1
            if job.killed <= CONTINUED:
                job.state = "waiting"
                return job
            job.error = f"killed twice by {_signal_name(-status)} (out of memory?)"
        if job.words:
            job.state = self._judge_program(job, status, stopped)
        elif status == worker.DONE:
            job.state = "done"
        elif (status == worker.INTERRUPTED or status < 0) and not job.error:
            job.state = "unfinished"
        else:
            job.state, job.error = "failed", job.error or record.get("error") or f"ended with status {status}"
        if job.state == "failed":
            note(job.folder, status="failed", error=job.error)
        elif job.state == "unfinished":
            note(job.folder, status="interrupted")
        else:
            note(job.folder, status="done")  # also of one that does not count: it came to its end, and is not run again
            if why := verdict_on(job.folder, Contestant(job.contestant, command=" ".join(job.words)), job.seed, job.plan):
                job.state, job.error = "failed", why
            self.look_for_metric(job)
        self.watcher.ended(job)
        return None

    def look_for_metric(self, job: Job) -> None:
        """Notice in a run of the library that has ended that the metric does not exist: neither there nor in any run so far."""
        if self.metric_exists or self.absent:
            return
        metric, keys = job.plan["metric"], offered(job.folder)
        self.metric_exists = metric in keys or any(metric in offered(j.folder) for j in self._active.values())
        if keys and job.spec and not self.metric_exists:
            self.absent = absent(metric, job.contestant, job.seed, keys)

    def _judge_program(self, job: Job, status: int, stopped: bool) -> str:
        """done, failed or unfinished, for an external program that ended."""
        if stopped and status != 0:
            return "unfinished"
        if job.error:
            return "failed"
        if status != 0:
            job.error = f"ended with status {status}{_last_line(job.folder / 'log.txt')}"
            return "failed"
        try:
            lines = read_metrics(job.folder, whole=True)
        except PoloptError as error:
            job.error = str(error)
            return "failed"
        job.error = missing(lines, job.plan)
        return "failed" if job.error else "done"

    def _watch_time(self) -> None:
        """End children whose metrics have not grown for too long."""
        if self.timeout is None or self._worker is None:
            return
        now = time.monotonic()
        for number, job in self._active.items():
            with contextlib.suppress(OSError):
                size = (job.folder / "metrics.jsonl").stat().st_size
                if size != job.size:
                    job.size, job.moved = size, now
            # without a process it has not begun: the worker still imports
            if job.pid and now - job.moved > self.timeout and not job.error:
                job.error = f"no new metrics for {self.timeout:g} seconds"
                self._worker.send({"signal": int(signal.SIGKILL), "id": number})

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While inside, the first SIGINT or SIGTERM lets children save and end; the second one ends them at once."""

        def handle(number: int, frame: object) -> None:
            self.signal = number
            self._signals_seen += 1  # told by the loop: a line sent from here could end up inside another one

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def _wait_for(pid: int) -> None:
    """Until an orphaned child has saved and ended; one that does not is killed: no two processes may write one run."""
    end = time.monotonic() + worker.GRACE
    while pid and time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as f:
            f.seek(max(path.stat().st_size - 4096, 0))
            lines = [x for x in f.read().decode("utf-8", errors="replace").splitlines() if x.strip()]
    except OSError:
        return ""
    return f": {lines[-1].strip()}" if lines else ""


__all__ = ["Job", "Scheduler", "Watcher", "Worker", "packed"]
