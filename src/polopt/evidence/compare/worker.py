"""The process that runs jobs: it imports the library once, and forks a child for each run.

It speaks lines of JSON. In: {"preload": [modules], "lock": handle}; a job {"id", "folder", "record", "notes", "spec" or "words"};
{"signal": n, "id": job, or none for all}. Out: {"ready": seconds}; {"id", "pid"} when a child was started; {"id", "status",
"rss", "cpu", "wall"} when it ended (exit status or minus the signal, bytes, seconds). Nothing is computed before a fork, so that
children start from a process with one thread. When its input ends (the comparison's process is gone) it asks its children to
save and end.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import gc
import json
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

DONE, FAILED, INTERRUPTED = 0, 1, 3
#: Seconds that children have to save and end when the comparison's process is gone.
GRACE = 60.0
#: What runs of a domain import in any case, besides its own modules: done once, before the first fork.
HEAVY = {
    "control": ("torch._dynamo", "gymnasium.envs.classic_control"),
    "text": (
        "torch._dynamo",
        "reasoning_gym",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.auto.tokenization_auto",
    ),
}


def modules_for(domain: str) -> list[str]:
    """The modules that runs of this domain need."""
    from polopt.loops.build import DOMAINS

    return [*DOMAINS.get(domain, ()), *HEAVY.get(domain, ("torch._dynamo",))]


def main() -> None:
    """Serve jobs until the input ends."""
    commands, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # a stray print must not be taken for an answer
    Server(commands, answers).serve()


class Server:
    """Reads commands, forks children, reports their ends."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, answers
        self.children: dict[int, tuple[int, bool, float]] = {}  # process -> (job, whether it leads a group of its own, start)
        self.open = True
        self.wake, self._wake = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(self._wake, False)

    def serve(self) -> None:
        """Until the input has ended and every child with it."""
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the comparison decides
        buffer, end = b"", 0.0
        while self.open or self.children:
            watched = [self.wake, *([self.commands] if self.open else [])]
            readable, _, _ = select.select(watched, [], [], 1.0)
            if self.wake in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake, 4096)
            if self.commands in readable:
                data = os.read(self.commands, 1 << 20)
                buffer += data
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    self.obey(json.loads(line))
                if not data:
                    self.open, end = False, time.monotonic() + GRACE
                    self.send_signal(signal.SIGTERM)
            self.reap()
            if not self.open and self.children and time.monotonic() > end:
                self.send_signal(signal.SIGKILL)

    def obey(self, command: dict[str, Any]) -> None:
        """Carry out one command."""
        if "preload" in command:
            start = time.monotonic()
            if command.get("lock") is not None:
                os.set_inheritable(command["lock"], False)  # held by this process and the library's runs, not by programs
            preload(command["preload"])
            self.tell({"ready": time.monotonic() - start})
        elif "signal" in command:
            self.send_signal(command["signal"], command.get("id"))
        else:
            self.start(command)

    def start(self, job: dict[str, Any]) -> None:
        """Fork the child of a job."""
        external = "words" in job
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            status = FAILED
            try:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                os.close(self.commands)
                os.close(self.answers)
                if external:
                    os.setpgid(0, 0)
                _die_with(server)
                _log_to(Path(job["folder"]) / "log.txt")
                status = run_external(job) if external else run_job(job)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        self.children[pid] = (job["id"], external, time.monotonic())
        self.tell({"id": job["id"], "pid": pid})

    def reap(self) -> None:
        """Report children that ended."""
        while self.children:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid not in self.children:
                continue
            job, _, began = self.children.pop(pid)
            wall = time.monotonic() - began
            rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            cpu = usage.ru_utime + usage.ru_stime
            self.tell({"id": job, "status": os.waitstatus_to_exitcode(status), "rss": rss, "cpu": cpu, "wall": wall})

    def send_signal(self, number: int, job: int | None = None) -> None:
        """To one child or to all; programs get it with everything that they started."""
        for pid, (owner, group, _) in self.children.items():
            if job is None or job == owner:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, number) if group else os.kill(pid, number)

    def tell(self, answer: dict[str, Any]) -> None:
        """Answer; if nobody listens any more, the input ends as well."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.answers, json.dumps(answer).encode() + b"\n")


def preload(modules: list[str]) -> None:
    """Import what children need, so that each child finds it in its memory."""
    from polopt.registry import load_everything

    load_everything()
    import_module("polopt.loops.drive")
    import_module("polopt.run").commit()  # of the code that all runs share, whatever is committed meanwhile
    for name in modules:
        try:
            import_module(name)
        except Exception:  # the run itself will say what is missing
            traceback.print_exc()
    gc.collect()
    gc.freeze()  # pages of what was imported stay shared


def _die_with(parent: int) -> None:
    """Ask Linux to end this process, as SIGTERM does, when the server is gone."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(INTERRUPTED)


def _log_to(path: Path) -> None:
    """Send what the child prints to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


# -------------------------------------------------------------------- jobs, in the child
def run_external(job: dict[str, Any]) -> int:
    """Become the program."""
    words = job["words"]
    try:
        os.execvp(words[0], words)
    except OSError as error:
        print(f"cannot start {words[0]}: {error.strerror}", file=sys.stderr)
        return 127


def run_job(job: dict[str, Any]) -> int:
    """Carry out a run: from its beginning, or from its last checkpoint; a damaged checkpoint is set aside."""
    from polopt.errors import PoloptError
    from polopt.evidence.compare.folders import note, read_record, set_aside
    from polopt.run import RunFolder

    folder = Path(job["folder"])
    notes = [*read_record(folder).get("notes", []), *job.get("notes", [])]
    spec = pickle.loads(base64.b64decode(job["spec"]))
    run_folder = RunFolder(folder)
    resuming = (folder / "config.yaml").exists()
    if resuming and run_folder.newest() is not None:
        try:
            run_folder.load_checkpoint("last")
        except PoloptError as error:
            notes.append(set_aside(folder, str(error)))
            _log_to(folder / "log.txt")
            resuming = False
    note(folder, **job["record"], notes=notes, status="running", error="")
    try:
        summary = _drive(spec, run_folder, resuming)
    except KeyboardInterrupt:
        note(folder, status="interrupted")
        return INTERRUPTED
    except BaseException as error:
        traceback.print_exc()
        note(folder, status="failed", error=f"{type(error).__name__}: {error}".strip())
        return FAILED
    return DONE if summary["status"] == "done" else INTERRUPTED


def _drive(spec: dict[str, Any], folder: Any, resuming: bool) -> dict[str, Any]:
    from polopt.config import save_config
    from polopt.evidence.compare.folders import note, read_record
    from polopt.loops.drive import drive
    from polopt.overrides import Layer, resolve

    resolved = resolve(spec["method"], spec["task"], [Layer(*layer) for layer in spec["layers"]])
    if not resuming:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        save_config(resolved, folder)

    def prepare(run: Any) -> None:
        if run.updates == 0 and not (resuming and "weights" in read_record(folder.path)):
            note(folder.path, weights=weights(run.policy), began=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        hook: Callable[[Any], None] | None = spec.get("prepare")
        if hook is not None:
            hook(run)

    return drive(resolved, folder, resuming=resuming, prepare=prepare).summary


def weights(policy: Any) -> dict[str, str]:
    """A fingerprint of each net's parameters."""
    from hashlib import sha256

    import torch

    found = {}
    for name, net in sorted(policy.nets().items()):
        digest = sha256()
        for key, value in sorted(net.named_parameters()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()[:16]
    return found


if __name__ == "__main__":
    main()
