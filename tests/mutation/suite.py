"""The suite as a judge of faults: which tests execute a line, and whether those tests notice a fault.

One process imports what is heavy and not under test (torch, transformers, pytest ...) and forks for every fault; the child serves
the changed source of one module and runs the tests that execute the changed line, the quickest first, until one fails.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.abc
import importlib.util
import io
import itertools
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutants import Fault

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
#: Tests that may catch a fault.
TESTS = (
    "tests/parts", "tests/methods", "tests/test_objective.py", "tests/test_objective_details.py", "tests/test_batch.py",
    "tests/test_batch_details.py", "tests/evidence/proof", "tests/loops/test_micro.py", "tests/loops/test_seams.py",
    "tests/loops/test_rounds.py", "tests/loops/test_allocators.py", "tests/test_api.py", "tests/test_overrides.py",
)  # fmt: skip
#: Seconds of tests (as traced) that one fault may cost, and how many tests are asked before files of further ones are imported.
MOST, FIRST = 40.0, 25
TIMEOUT = "timeout"
PLUGINS = ["_hypothesis_pytestplugin", "pytest_timeout", "no:cacheprovider", "no:unraisableexception", "no:threadexception"]
PYTEST = ["-q", "--no-header", "--no-summary", "-W", "ignore", *(x for p in PLUGINS for x in ("-p", p))]
MARKS = ["-m", "not torture and not inductor and not gpu"]


def warm_up() -> None:
    """Import what the tests need, but nothing of polopt; property tests try the same examples each time and do not shrink them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # each child would search for plugins again
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path[:0] = [str(SOURCE), str(ROOT / "tests")]
    import gymnasium
    import hypothesis
    import pytest
    import torch
    import torch.fx.experimental.proxy_tensor
    import torch.optim
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    torch.set_num_threads(1)
    assert all((gymnasium, pytest, transformers, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM))
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("faults", derandomize=True, database=None, deadline=None, phases=phases)
    hypothesis.settings.load_profile("faults")
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*PYTEST, "--rootdir", empty, empty])  # loads the plugins
    gc.freeze()  # what is here stays: no child need look through it
    assert not any(name == "polopt" or name.startswith("polopt.") for name in sys.modules)


# -------------------------------------------------------------------- forked children
@dataclass
class Job:
    """A forked child that answers with one line of JSON."""

    name: str
    pid: int
    pipe: int
    folder: Path
    until: float
    start: float
    text: bytes = b""


def forked(work: Sequence[tuple[str, Callable[[Path], Any], float]], jobs: int) -> Iterator[tuple[str, Any, float]]:
    """(name, answer, seconds) of each piece of work (name, function of an empty folder, limit in seconds), as they end.

    The answer is TIMEOUT where the limit was passed, and the text of the error where the child broke.
    """
    waiting, running = list(reversed(work)), dict[int, Job]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = start(*waiting.pop())
                running[job.pipe] = job
            ready, _, _ = select.select(list(running), [], [], 0.2)
            for pipe in ready:
                text = os.read(pipe, 1 << 16)
                running[pipe].text += text
                if not text or text.endswith(b"\n"):
                    job = running.pop(pipe)
                    end(job)
                    yield job.name, json.loads(job.text or b'"error: the process died"'), time.monotonic() - job.start
            for pipe, job in list(running.items()):
                if time.monotonic() > job.until:
                    del running[pipe]
                    end(job)
                    yield job.name, TIMEOUT, time.monotonic() - job.start
    finally:
        for job in running.values():
            end(job)


def start(name: str, work: Callable[[Path], Any], limit: float) -> Job:
    folder = Path(tempfile.mkdtemp(prefix="polopt-fault-"))
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Job(name, pid, read, folder, time.monotonic() + limit, time.monotonic())
    try:
        os.setsid()
        os.close(read)
        with open(folder / "output.txt", "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        answer = work(folder)
    except BaseException:
        answer = f"error: {traceback.format_exc()}"
    try:
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps(answer) + "\n")
    finally:
        os._exit(0)


def end(job: Job) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)  # with all that the tests may have started
    os.waitpid(job.pid, 0)
    os.close(job.pipe)
    shutil.rmtree(job.folder, ignore_errors=True)


# -------------------------------------------------------------------- which tests execute a line
@dataclass
class Coverage:
    """Seconds of every test, and the tests that execute each line of each watched file."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def tests(self, fault: Fault) -> list[list[str]]:
        """Tests that execute one of a fault's lines, in two portions: quick ones that execute much of its file come first.

        They end after `MOST` seconds, so that the whole grows with the number of faults alone. A fault that only a later test
        would notice counts as not noticed.
        """
        by_line = self.lines.get(fault.file, {})
        touched = Counter(t for tests in by_line.values() for t in tests)
        found = {t for line, tests in by_line.items() if line in fault.lines for t in tests}
        ranked = sorted(found, key=lambda t: (self.seconds[t] / touched[t], t))
        spent = itertools.accumulate(self.seconds[t] for t in ranked)
        kept = [t for t, until in zip(ranked, spent, strict=True) if until <= MOST] or ranked[:1]
        return [portion for portion in (kept[:FIRST], kept[FIRST:]) if portion]

    def slowest(self, tests: Iterable[Iterable[str]]) -> float:
        """Seconds of the slowest of these tests."""
        return max((self.seconds[t] for portion in tests for t in portion), default=0.0)


class Watch:
    """A pytest plugin that notes the time of every test and the lines of watched files that it executes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[str, list[int]]] = {}
        self.failed: list[str] = []
        self.found: dict[str, set[int]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.found, self.start = {}, time.perf_counter()
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        self.seconds[nodeid] = time.perf_counter() - self.start
        self.lines[nodeid] = {os.path.relpath(file, ROOT): sorted(lines) for file, lines in self.found.items()}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(self.folder):
            return None
        lines = self.found.setdefault(file, set())

        def each(frame: Any, event: str, arg: Any) -> Any:
            lines.add(frame.f_lineno)
            return each

        return each(frame, event, arg)


def files_of(names: Iterable[str]) -> list[str]:
    """The test files of these names that exist."""
    found = []
    for name in names:
        path = ROOT / name
        found += sorted(path.rglob("test_*.py")) if path.is_dir() else [path] * path.exists()
    return [str(p.relative_to(ROOT)) for p in found]


def cover(folder: Path, jobs: int) -> Coverage:
    """Run the tests once, without a fault; those that fail are left out."""
    import pytest

    def watch(file: str) -> Callable[[Path], Any]:
        def work(scratch: Path) -> Any:
            plugin = Watch(f"{folder}{os.sep}")
            code = int(pytest.main([*PYTEST, *MARKS, f"--basetemp={scratch / 'tmp'}", file], plugins=[plugin]))
            return {"seconds": plugin.seconds, "lines": plugin.lines, "failed": plugin.failed, "code": code}

        return work

    out = Coverage()
    for file, answer, _ in forked([(f, watch(f), 600.0) for f in files_of(TESTS)], jobs):
        if not isinstance(answer, dict) or answer["code"] not in (0, 1, 5):
            out.failed.append(file)
            continue
        out.failed += answer["failed"]
        for test, seconds in answer["seconds"].items():
            if test in answer["failed"]:
                continue
            out.seconds[test] = seconds
            for source, lines in answer["lines"][test].items():
                for line in lines:
                    out.lines.setdefault(source, {}).setdefault(line, []).append(test)
    return out


# -------------------------------------------------------------------- whether a fault is noticed
class Serve(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from changed source."""

    def __init__(self, file: str, source: str) -> None:
        self.path, self.source = str(ROOT / file), source
        self.module = ".".join((ROOT / file).relative_to(SOURCE).with_suffix("").parts)
        self.served = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.module else None

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        self.served = True
        return self.source.encode()


class Ordered:
    """A pytest plugin that keeps the wanted tests, in the wanted order, and notes the first that fails."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self.place = {name: i for i, name in enumerate(wanted)}
        self.first: str | None = None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.first is None:
            self.first = TIMEOUT if "Timeout (>" in str(report.longrepr) else report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.first is None:
            self.first = f"import: {report.nodeid}"


def judge(fault: Fault, portions: list[list[str]], seconds: float) -> Callable[[Path], str | None]:
    """Run the tests against a fault, each at most so many seconds: the first that fails, or None."""

    def work(scratch: Path) -> str | None:
        import pytest

        server = Serve(fault.file, fault.source)
        sys.meta_path.insert(0, server)
        for i, portion in enumerate(portions):
            plugin = Ordered(portion)
            files = sorted({t.partition("::")[0] for t in portion})
            code = int(
                pytest.main(
                    ["-x", *PYTEST, *MARKS, f"--timeout={seconds}", f"--basetemp={scratch / str(i)}", *files], plugins=[plugin]
                )
            )
            if plugin.first is not None:
                return plugin.first
            if code in (1, 2, 4):
                return "import"  # conftest, or the part's own module, does not load
            if code not in (0, 5):
                raise RuntimeError(f"pytest ended with {code}")
        if portions and not server.served:
            raise RuntimeError(f"{server.module} was never imported")
        return None

    return work


def judged(faults: Sequence[Fault], coverage: Coverage, jobs: int) -> Iterator[tuple[Fault, str | None, float]]:
    """(fault, the test that caught it or None, seconds) as they come; TIMEOUT for an endless loop."""
    by_number = {str(i): f for i, f in enumerate(faults)}
    work = []
    for i, f in by_number.items():
        portions = coverage.tests(f)
        work.append((i, judge(f, portions, 10 + 10 * coverage.slowest(portions)), 600.0))
    for i, answer, seconds in forked(work, jobs):
        if answer is not None and answer.startswith("error: "):
            raise RuntimeError(answer)
        yield by_number[i], answer, seconds
