"""Comparisons at their edges: odd names, programs that write something else, locks that outlive a process, early signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polopt.config import save_config
from polopt.errors import CallError, PoloptError
from polopt.evidence.compare import place, schedule
from polopt.evidence.compare.entries import Entry, external_entries, parse, slug
from polopt.evidence.compare.folders import Identity, inspect_run, note, read_metrics
from polopt.evidence.compare.plan import Asked, command_of, seeds_of
from polopt.evidence.compare.read import missing, spent_in
from polopt.evidence.compare.run import Compared, describe
from polopt.evidence.compare.schedule import Job, Scheduler
from polopt.overrides import resolve
from polopt.run import Budget, RunFolder

Go = Callable[..., Compared]
PROGRAM = """
import json, sys
from pathlib import Path
out, key = sys.argv[1], Path("KEY").read_text()
with open(f"{out}/metrics.jsonl", "w", encoding="utf-8") as f:
    for i in range(3):
        line = {key: i, "seconds": 0.1 * i, "eval_score": float(i), "text": "a\\u2028b"}
        f.write(json.dumps(line, ensure_ascii=False) + "\\n")
"""


# -------------------------------------------------------------------- names and numbers
@pytest.mark.parametrize("given", ["--5", "²", 2.0, np.float64(2), [0, 1.5], None, [None]])
def test_seeds_that_are_none(given: Any) -> None:
    with pytest.raises(CallError, match="seeds"):
        seeds_of(given)


def test_seeds_from_numpy() -> None:
    assert seeds_of(np.int64(2)) == (0, 1)  # type: ignore[arg-type]
    assert seeds_of(np.array([3, 0])) == (3, 0)  # type: ignore[arg-type]


def test_names_stay_inside_their_folder() -> None:
    assert slug("..") == slug(".") == "x"
    assert "/" not in slug("../../y")
    long = [Entry("a" * 300 + end, "ppo") for end in "bc"]
    assert len({e.folder for e in long}) == 2
    assert all(len(e.folder) <= 120 for e in long)
    assert Entry("ppo,epochs=4", "ppo").folder == "ppo,epochs=4"


def asked(*entries: Entry, **rest: Any) -> Asked:
    return Asked(entries, "table:arms", (0, 1), Budget.parse("10-updates"), **rest)


def test_names_that_a_command_cannot_say_are_told_as_a_call() -> None:
    plain = command_of(asked(parse("mine=ppo,lr=0.1")), Path("out"))
    assert plain.startswith("polopt compare mine=ppo,lr=0.1 ")
    odd = command_of(asked(Entry("a, b", "ppo", {"lr": 0.1}), metric="loss", higher_is_better=False, baseline="a, b"), Path("o"))
    assert odd == (
        "polopt.compare({'a, b': ('ppo', {'lr': 0.1})}, task='table:arms', seeds=[0, 1], budget='10-updates', points=10, "
        "metric='loss', lower_is_better=True, baseline='a, b', out='o')"
    )
    program = external_entries({"two words": "run {out}"})
    assert "external={'two words': 'run {out}'}" in command_of(asked(parse("ppo"), *program), Path("o"))


def test_a_dry_run_refuses_a_wrong_search(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="lower end must be below"):
        describe(["reinforce"], "table:arms", budget="10-updates", tune=2, search=["lr=5..1"], out=tmp_path / "x")


# -------------------------------------------------------------------- what programs write
def test_what_was_spent() -> None:
    plan = {"metric": "eval_score", "unit": "updates"}
    assert spent_in([{"update": 1}, {"updates": 1}], "updates") == "update"
    assert spent_in([{"updates": 1}], "updates") == "updates"
    assert missing([{"updates": 1, "eval_score": 0.0}], plan) == ""
    assert "both 'eval_score' and a number for 'update'" in missing([{"step": 1, "eval_score": 0.0}], plan)
    assert "both 'eval_score' and a number for 'update'" in missing([{"update": "1", "eval_score": 0.0}], plan)
    assert "did you mean 'evalscore'" in missing([{"update": 1, "evalscore": 0.0}], plan)


def test_a_program_that_names_its_budget_otherwise(go: Go, tmp_path: Path) -> None:
    (tmp_path / "KEY").write_text("step")
    external = {"x": f"{sys.executable} {tmp_path}/program.py {{out}}"}
    (tmp_path / "program.py").write_text(PROGRAM.replace('"KEY"', repr(str(tmp_path / "KEY"))))
    first = go([], "made-up", seeds=1, external=external).comparison.runs[0]
    assert first.status == "failed"
    assert "both 'eval_score' and a number for 'update'" in first.error
    (tmp_path / "KEY").write_text("updates")  # failed runs are tried again
    again = go([], "made-up", seeds=1, external=external).comparison.runs[0]
    assert (again.status, again.spent.tolist(), again.score.tolist()) == ("done", [0, 1, 2], [0, 1, 2])
    # a method does not go on in a program's folder
    before = (tmp_path / "out/runs/x/s0/metrics.jsonl").read_text()
    with pytest.raises(CallError, match="holds a run of the program"):
        go({"x": "ppo"}, seeds=1)
    assert (tmp_path / "out/runs/x/s0/metrics.jsonl").read_text() == before


def test_metrics_without_their_config_are_damage(tmp_path: Path) -> None:
    note(tmp_path / "s0", status="running")
    assert inspect_run(tmp_path / "s0") == "absent"
    (tmp_path / "s0/metrics.jsonl").write_text('{"update": 1}\n')
    with pytest.raises(PoloptError, match=r"config\.yaml is missing"):
        inspect_run(tmp_path / "s0")


def test_other_contents_of_the_data_are_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "q.jsonl"

    def write(n: int) -> Identity:
        data.write_text("".join(json.dumps({"prompt": f"{i}+{n}=", "answer": str(i + n)}) + "\n" for i in range(20)))
        return Identity.of(resolve("reinforce", "data:q.jsonl", {"budget": "1-updates", "options.reward": "exact"}))

    first = write(1)
    save_config(
        resolve("reinforce", "data:q.jsonl", {"budget": "1-updates", "options.reward": "exact"}), RunFolder(tmp_path / "s0")
    )
    note(tmp_path / "s0", code=first.code, data=dict(first.data))
    assert set(first.data) == {"q.jsonl"}
    write(1).refuse_other(tmp_path / "s0", 0)
    other = write(2)
    assert other.fingerprint(0) != first.fingerprint(0)
    with pytest.raises(CallError, match=r"data q\.jsonl = other contents"):
        other.refuse_other(tmp_path / "s0", 0)


def test_a_folder_that_cannot_be_written_is_told(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    from polopt.evidence.compare import page

    def full(*given: Any) -> Path:
        raise OSError(28, "No space left on device", "out/index.html")

    monkeypatch.setattr(page, "make_page", full)
    with pytest.raises(PoloptError, match=r"out/index\.html: No space left on device; .* continue with: polopt compare reinforce"):
        go(["reinforce"], seeds=1, page=True)


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"a": "x\u2028y\x85z"}\n\n{"a": 2}\r\n', encoding="utf-8")
    assert [line["a"] for line in read_metrics(tmp_path, whole=True)] == ["x\u2028y\x85z", 2]


# -------------------------------------------------------------------- the command line
def test_what_was_damaged_is_said_once(go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from polopt.cli.compare import _say

    go(["reinforce"], seeds=1)
    (tmp_path / "out/runs/reinforce/s0/config.yaml").write_text("garbage")
    _say(go(["reinforce"], seeds=1))
    assert capsys.readouterr().out.count("moved to s0.damaged-1") == 1


# -------------------------------------------------------------------- locks
HOLD = """
import os, subprocess, sys
from pathlib import Path
from polopt.evidence.compare.place import alone
with alone(Path(sys.argv[1])) as lock:
    child = subprocess.Popen(["sleep", sys.argv[2]], pass_fds=(lock,))
    print("held", flush=True)
    os._exit(1)  # as if killed: the child lives on and holds the lock
"""


def test_runs_of_a_killed_comparison_are_waited_for(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path), "2"], stdout=subprocess.DEVNULL, check=False, timeout=60)
    assert done.returncode == 1
    began = time.monotonic()
    with place.alone(tmp_path):
        waited = time.monotonic() - began
        assert int((tmp_path / ".lock").read_text()) == os.getpid()
    assert 0.1 < waited < 30


def test_the_worker_holds_the_lock(tmp_path: Path) -> None:
    with place.alone(tmp_path) as lock:
        worker = schedule.Worker(tmp_path / "worker.log", [], lock)
    try:
        (tmp_path / ".lock").write_text("")
        with pytest.raises(CallError, match="another process"), place.alone(tmp_path):
            pass
    finally:
        worker.close()
    with place.alone(tmp_path):
        pass


# -------------------------------------------------------------------- the scheduler, with a worker that only listens
class Listening:
    """Takes what it is sent; answers that all jobs ended once it was told to end them."""

    def __init__(self, *given: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.jobs: list[int] = []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(json.loads(json.dumps(message)))
        self.jobs += [message["id"]] if "folder" in message else []

    def answers(self, timeout: float) -> list[dict[str, Any]]:
        if not any("signal" in m for m in self.sent):
            time.sleep(0.01)
            return []
        ended, self.jobs = self.jobs, []
        return [{"id": n, "status": 3, "rss": 1, "cpu": 0.0} for n in ended]

    def close(self) -> None: ...


class Quiet:
    def started(self, job: Job) -> None: ...

    def ended(self, job: Job) -> None: ...

    def tick(self) -> None: ...


def test_no_job_misses_a_signal_that_comes_while_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Listening()

    def make(*given: Any) -> Listening:
        os.kill(os.getpid(), signal.SIGINT)  # before the first job is sent
        return worker

    monkeypatch.setattr(schedule, "Worker", make)
    jobs = [Job("a", s, tmp_path / f"s{s}", spec={}) for s in range(3)]
    scheduler = Scheduler(tmp_path, 2, [], Quiet(), wait=0.01)
    scheduler.idle = lambda: pytest.fail("prepared a verdict that nobody waits for")
    scheduler.run(jobs)
    assert scheduler.signal == signal.SIGINT
    assert [m.get("signal") for m in worker.sent][-1] == signal.SIGTERM  # after every job
    assert [j.state for j in jobs] == ["unfinished"] * 3


def test_time_of_a_run_is_the_workers(tmp_path: Path) -> None:
    scheduler = Scheduler(tmp_path, 1, [], Quiet())
    job = Job("a", 0, tmp_path / "s0", spec={}, began=time.monotonic() - 100)
    scheduler._active[1] = job
    assert scheduler._ended({"id": 1, "status": 0, "rss": 1, "cpu": 0.0, "wall": 2.0}) is None
    assert json.loads((tmp_path / "s0/run.json").read_text())["wall_seconds"] == 2.0


def test_the_time_limit_begins_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Listening()
    monkeypatch.setattr(schedule, "Worker", lambda *given: worker)
    scheduler = Scheduler(tmp_path, 1, [], Quiet(), timeout=0.05, wait=0.01)
    job = Job("a", 0, tmp_path / "s0", spec={})
    scheduler._start(job)
    time.sleep(0.1)
    scheduler._watch_time()  # the worker still imports
    assert not job.error
    job.pid = 1
    scheduler._watch_time()
    assert "no new metrics" in job.error
    assert worker.sent[-1]["signal"] == signal.SIGKILL
