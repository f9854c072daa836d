"""Comparisons that run: pairing, resuming, failing, external programs, tuning."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import polopt
from polopt.errors import CallError
from polopt.evidence.compare.read import read_comparison
from polopt.evidence.compare.run import Compared

Go = Callable[..., Compared]
FILE = Path(__file__).with_name("faulty_methods.py")
FAULTY = f"{FILE}:FAULTY"


def lines(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in found]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files a run has, and when they were written."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


# -------------------------------------------------------------------- pairing
def test_contestants_are_paired_and_runs_equal_those_of_train(go: Go, tmp_path: Path) -> None:
    found = go(["ppo", "a2c", "reinforce-baseline"]).comparison
    assert [r.status for r in found.runs] == ["done"] * 6
    weights = {(r.contestant, r.seed): r.weights for r in found.runs}
    for seed in (0, 1):
        assert len({weights[name, seed] for name in ("ppo", "a2c", "reinforce-baseline")}) == 1
    assert weights["ppo", 0] != weights["ppo", 1]
    assert record(found.of("ppo")[0].folder)["weights"].keys() == {"policy", "value"}
    # the same evaluation before training, as weights and held-out seeds are the same
    for seed in (0, 1):
        assert len({found.of(n)[seed].score[0] for n in ("ppo", "a2c", "reinforce-baseline")}) == 1
    run = found.of("ppo")[1]
    assert run.spent.tolist() == [0, 1, 2]
    alone = polopt.train(
        "ppo", "gym:CartPole-v1", budget="2-updates", seed=1, out=tmp_path / "alone", collect__envs=2, collect__steps=16,
        policy__hidden="8", evaluate__episodes=2, evaluate__points=2,
    )  # fmt: skip
    assert alone.folder is not None
    assert lines(alone.folder) == lines(run.folder)


def test_same_prompts_and_environment_seeds_for_all() -> None:
    from polopt.loops.improve import Improve
    from polopt.overrides import resolve

    def built(method: str, task: str, **over: Any) -> Improve:
        found = resolve(method, task, {"seed": 3, **over})
        return Improve(found.method, found.task, found.settings)

    runs = [built(m, "gym:CartPole-v1") for m in ("ppo", "a2c", "trpo")]
    starts = []
    for run in runs:
        run.collector._start()
        starts.append(run.collector._obs.tolist())
    assert starts[0] == starts[1] == starts[2]
    drawn = [built(m, "text:spell_backward").collector.draw(20) for m in ("grpo", "rloo", "dapo")]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(set(drawn[0])) == 20


# -------------------------------------------------------------------- never twice, and on from where it stopped
def test_finished_runs_are_left_alone_and_more_may_be_added(go: Go, tmp_path: Path) -> None:
    first = go(["ppo"], seeds=1)
    before = identity(tmp_path / "out/runs")
    again = go(["ppo"], seeds=1)
    assert identity(tmp_path / "out/runs") == before
    assert again.comparison.runs[0].score.tolist() == first.comparison.runs[0].score.tolist()
    more = go(["ppo", "a2c"], seeds=2)
    assert {k: v for k, v in identity(tmp_path / "out/runs").items() if "/ppo/s0/" in k} == before
    assert [r.status for r in more.comparison.runs] == ["done"] * 4
    assert go(["a2c"], seeds="1,").comparison.seeds == (1,)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"budget": "3-updates"}, "budget = 2-updates, this comparison has 3-updates"),
        ({"evaluate__episodes": 3}, "evaluate.episodes = 2, this comparison has 3"),
        ({"epochs": 3}, "updates.policy.epochs = 10, this comparison has 3"),
    ],
)
def test_runs_with_other_settings_are_refused(go: Go, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    go(["ppo"], seeds=1)
    before = identity(tmp_path / "out/runs")
    with pytest.raises(CallError) as error:
        go(["ppo"], seeds=1, **change)
    assert str(tmp_path / "out/runs/ppo/s0") in str(error.value)
    assert told in str(error.value)
    assert "another --out" in str(error.value)
    assert identity(tmp_path / "out/runs") == before


def test_changed_code_of_the_user_is_refused(go: Go, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    text = FILE.read_text() + "\nMINE = PPO.but('mine', advantage=Faulty(at=9))\n"
    mine.write_text(text)
    go([f"{mine}:MINE"], seeds=1)
    go([f"{mine}:MINE"], seeds=1)
    sys.modules.pop(next(m for m in sys.modules if m.startswith("_polopt_user_") and m.endswith("_mine")))
    mine.write_text(text.replace("no luck today", "no luck at all"))
    with pytest.raises(CallError, match=r"files/mine\.py"):
        go([f"{mine}:MINE"], seeds=1)


def test_interrupted_runs_go_on_to_the_same_numbers(go: Go, tmp_path: Path) -> None:
    common = {"budget": "4-updates", "advantage.process": os.getpid()}
    mark = tmp_path / "mark"
    settings = {"advantage.what": "interrupt", "advantage.mark": str(mark), "advantage.process": os.getpid()}
    mark.touch()
    whole = go({"faulty": (FAULTY, settings)}, budget=common["budget"], out=tmp_path / "whole", seeds=1).comparison
    mark.unlink()
    broken = go({"faulty": (FAULTY, settings)}, budget=common["budget"], seeds=3, jobs=1)
    assert broken.signal == signal.SIGINT
    assert [r.status for r in broken.comparison.runs] == ["unfinished"] * 3
    assert record(tmp_path / "out/runs/faulty/s0")["status"] == "interrupted"
    assert len(lines(tmp_path / "out/runs/faulty/s0")) in (2, 3)
    assert not (tmp_path / "out/runs/faulty/s1").exists()
    done = go({"faulty": (FAULTY, settings)}, budget=common["budget"], seeds=3, jobs=1)
    assert [r.status for r in done.comparison.runs] == ["done"] * 3
    assert lines(tmp_path / "out/runs/faulty/s0") == lines(whole.runs[0].folder)
    assert done.comparison.runs[0].weights == whole.runs[0].weights


def test_a_second_signal_ends_at_once(go: Go, tmp_path: Path) -> None:
    settings = {"advantage.what": "insist", "advantage.mark": str(tmp_path / "mark"), "advantage.process": os.getpid()}
    found = go({"faulty": (FAULTY, settings)}, seeds=1)
    assert found.signal == signal.SIGINT
    assert found.comparison.runs[0].status == "unfinished"
    assert go({"faulty": (FAULTY, settings)}, seeds=1).comparison.runs[0].status == "done"


def test_continuing_with_other_versions_is_told(go: Go, tmp_path: Path) -> None:
    go([FAULTY], seeds=1)
    folder = tmp_path / "out/runs/faulty/s0"
    old = record(folder)
    (folder / "run.json").write_text(json.dumps({**old, "versions": {**old["versions"], "torch": "1.0"}}))
    notes = go([FAULTY], seeds=1).comparison.notes
    assert len(notes) == 1
    assert notes[0].startswith("faulty, seed 0, was continued with other versions: torch 1.0 -> ")


def test_a_killed_run_is_continued_once(go: Go, tmp_path: Path) -> None:
    settings = {"advantage.what": "die", "advantage.mark": str(tmp_path / "mark"), "checkpoint.every": 1}
    twice = {"advantage.what": "die"}
    found = go({"once": (FAULTY, settings), "always": (FAULTY, twice), "ppo": "ppo"}, seeds=1, budget="3-updates").comparison
    once, always, other = found.runs
    assert once.status == "done"
    assert [line["update"] for line in lines(once.folder)] == [1, 2, 3]
    assert always.status == "failed"
    assert always.error == "killed twice by SIGKILL (out of memory?)"
    assert other.status == "done"


def test_a_dead_worker_counts_as_killed(go: Go, tmp_path: Path) -> None:
    """Children of a worker that dies are ended by the system, and go on under a new one."""
    # the child kills its parent, the worker
    text = FILE.read_text().replace("os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getppid(), signal.SIGKILL); time.sleep(1)")
    (tmp_path / "mine.py").write_text(text)
    settings = {"advantage.what": "die", "advantage.mark": str(tmp_path / "mark")}
    found = go({"once": (f"{tmp_path}/mine.py:FAULTY", settings)}, seeds=1).comparison
    assert found.runs[0].status == "done"


# -------------------------------------------------------------------- failures
def test_a_contestant_that_crashes_on_every_seed(go: Go, tmp_path: Path) -> None:
    found = go([FAULTY, "ppo"])
    assert {(r.contestant, r.status) for r in found.comparison.runs} == {("faulty", "failed"), ("ppo", "done")}
    assert {r.error for r in found.comparison.runs} == {"ValueError: no luck today", ""}
    assert "no luck today" in (tmp_path / "out/runs/faulty/s0/log.txt").read_text()
    assert "faulty" in found.words
    # a second call tries the failed ones again and leaves the others alone
    before = identity(tmp_path / "out/runs/ppo")
    go([FAULTY, "ppo"])
    assert identity(tmp_path / "out/runs/ppo") == before


def test_scores_that_are_not_numbers(go: Go) -> None:
    failed = go(["ppo"], f"{FILE}:NaNTask", seeds=1).comparison.runs[0]
    assert failed.status == "failed"
    assert "returned a reward that is not finite" in failed.error


def test_a_last_score_that_is_not_a_number_is_a_failure_and_final(go: Go, tmp_path: Path) -> None:
    go(["ppo"], seeds=1)
    metrics = tmp_path / "out/runs/ppo/s0/metrics.jsonl"
    *rest, last = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*rest, json.dumps({**json.loads(last), "eval_score": None})]) + "\n")
    before = identity(metrics.parent)
    found = go(["ppo"], seeds=1).comparison.runs[0]
    assert (found.status, found.error) == ("failed", "its last eval_score is not a number")
    assert math.isnan(found.score[-1])
    assert not math.isnan(found.score[1])
    assert identity(metrics.parent) == before  # it is finished, only worthless


def test_a_run_that_hangs_is_given_up(go: Go) -> None:
    found = go({"slow": (FAULTY, {"advantage.what": "hang"})}, seeds=1, timeout=1.5).comparison.runs[0]
    assert (found.status, found.error) == ("failed", "no new metrics for 1.5 seconds")


def test_damaged_folders_are_set_aside(go: Go, tmp_path: Path) -> None:
    good = go(["ppo"], seeds=4, budget="1-updates").comparison
    runs = tmp_path / "out/runs/ppo"
    (runs / "s0/config.yaml").write_text("{{{")
    (runs / "s1/metrics.jsonl").write_bytes(b"\x00\xff garbage\n")
    (runs / "s2/summary.json").write_text('{"status": ')
    (runs / "s3/summary.json").unlink()
    for checkpoint in (runs / "s3/checkpoints").glob("update-*"):
        (checkpoint / "tensors.safetensors").write_bytes(b"short")
    found = go(["ppo"], seeds=4, budget="1-updates").comparison
    assert [r.status for r in found.runs] == ["done"] * 4
    assert [r.score.tolist() for r in found.runs] == [r.score.tolist() for r in good.runs]
    assert sorted(p.name for p in runs.iterdir()) == sorted([f"s{i}{end}" for i in range(4) for end in ("", ".damaged-1")])
    assert len(found.notes) == 4
    assert "ppo/s0 was damaged (config.yaml cannot be read" in found.notes[0]
    assert any("checkpoint file" in n for n in found.notes)
    assert read_comparison(tmp_path / "out").notes == found.notes


# -------------------------------------------------------------------- what a contestant can be
def test_methods_and_tasks_made_in_python(go: Go) -> None:
    from polopt.methods.onpolicy.ppo import PPO
    from polopt.tasks.gym import GymTask

    class Own(GymTask):
        pass

    found = go({"a": PPO.but("a", epochs=2), "b": (PPO, {"epochs": 1}), "c": "ppo,epochs=1"}, Own("gym:CartPole-v1"), seeds=1)
    a, b, c = found.comparison.runs
    assert [r.status for r in (a, b, c)] == ["done"] * 3
    assert b.score.tolist() == c.score.tolist()
    assert lines(b.folder) == lines(c.folder) != lines(a.folder)


PROGRAM = """
import json, os, sys
task, seed, amount, out, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
assert task == "gym:CartPole-v1" and os.environ["OMP_NUM_THREADS"] == "1"
print("working")
if how == "crash":
    raise SystemExit("it broke")
waste = bytearray(60_000_000)
with open(f"{out}/metrics.jsonl", "w") as f:
    for i in (0, 2, 1) if how == "back" else range(3):
        score = float("nan") if how == "nan" and i == 2 else seed + i
        share = 0.1 if how == "short" else 1.0
        f.write(json.dumps({"decisions": int(amount * share * i / 2), "seconds": i, "eval_score": score}) + "\\n")
"""


def test_external_programs(go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} {tmp_path}/program.py {{task}} {{seed}} {{decisions}} {{out}}"
    external = {how: f"{command} {how}" for how in ("good", "crash", "nan", "short", "back")}
    found = go(["ppo"], external=external, seeds=2, budget="64-decisions", quiet=False).comparison
    told = dict(re.findall(r"^\d+/12  (\w+) seed 0  (.*)  0:0\d$", capsys.readouterr().out, re.MULTILINE))
    assert told == {
        "ppo": told["ppo"],
        "good": "done  eval_score 2",
        "crash": "failed  ended with status 1: it broke",
        "nan": "failed  its last eval_score is not a number",
        "short": "failed  ended after 6 of 64 decisions",
        "back": "failed  metrics.jsonl goes back from 64 to 32 decisions: lines must be in order",
    }  # as each of them ended, and as it is counted
    good = found.of("good")[1]
    assert good.status == "done"
    assert good.spent.tolist() == [0, 32, 64]
    assert good.score.tolist() == [1, 2, 3]
    assert good.peak_rss is not None
    assert good.peak_rss > 60_000_000
    assert (good.folder / "log.txt").read_text() == "working\n"
    assert good.versions["python"]
    assert found.of("crash")[0].error == "ended with status 1: it broke"
    assert found.of("nan")[0].error == "its last eval_score is not a number"
    assert found.of("short")[0].error == "ended after 6 of 64 decisions"
    assert found.of("back")[0].error == "metrics.jsonl goes back from 64 to 32 decisions: lines must be in order"
    before = identity(good.folder)
    again = go(["ppo"], external={"good": external["good"]}, seeds=2, budget="64-decisions").comparison
    assert identity(good.folder) == before
    assert again.of("good")[1].score.tolist() == [1, 2, 3]
    # a program that did not come to its end begins anew, and what it wrote is kept
    (good.folder / "run.json").write_text(json.dumps({**record(good.folder), "status": "running"}))
    anew = go([], external={"good": external["good"]}, seeds=2, budget="64-decisions").comparison
    assert [r.status for r in anew.runs] == ["done", "done"]
    assert (good.folder.parent / "s1.partial-1/metrics.jsonl").exists()
    with pytest.raises(CallError, match="another --out"):
        go([], external={"good": external["good"] + " more"}, seeds=2, budget="64-decisions")


def test_tuning_is_equal_and_is_not_done_twice(go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{sys.executable} -c pass {{out}}"
    call: dict[str, Any] = {"tune": 3, "tune_seeds": 1, "seeds": 1, "external": {"prog": command}}
    found = go(["ppo", "trpo"], **call, quiet=False).comparison
    told = capsys.readouterr().out
    for name in ("ppo", "trpo"):
        assert sorted(re.findall(rf"  {name} trial (t\d) seed 1000  done", told)) == ["t0", "t1", "t2"]
    assert len(re.findall(r"  ppo seed 0  done", told)) == 1
    trials = {n: json.loads((tmp_path / f"out/tune/{n}/trials.json").read_text()) for n in ("ppo", "trpo")}
    assert [len(t) for t in trials.values()] == [3, 3]
    assert trials["ppo"][0]["values"] == {}
    assert list(trials["ppo"][1]["values"]) == ["updates.policy.rule.lr"]
    assert "updates.policy.rule.delta" in trials["trpo"][1]["values"]
    assert all(list(t["scores"]) == ["1000"] for t in trials["ppo"])
    assert 1e-4 <= trials["ppo"][1]["values"]["updates.policy.rule.lr"] <= 1e-2  # a tenth to ten times the preset 1e-3
    best = max(trials["ppo"], key=lambda t: t["mean"])
    assert found.contestants[0].tuned == best["values"]
    assert any("prog is an external program and was not tuned" in n for n in found.notes)
    before = identity(tmp_path / "out/tune/ppo/t1") | identity(tmp_path / "out/runs/ppo")
    go(["ppo", "trpo"], **call)
    assert identity(tmp_path / "out/tune/ppo/t1") | identity(tmp_path / "out/runs/ppo") == before


# -------------------------------------------------------------------- cost
def test_comparing_costs_little_beside_the_runs(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run adds to the comparison's own process, in CPU time: tens of milliseconds (6 ms on a quiet machine)."""
    import time

    from polopt.evidence.compare.run import _Comparing

    spent: list[float] = []
    real = _Comparing.run

    def timed(self: _Comparing, *given: Any, **named: Any) -> bool:
        start = time.process_time()
        going = real(self, *given, **named)
        spent.append(time.process_time() - start)
        return going

    monkeypatch.setattr(_Comparing, "run", timed)
    go(["ppo"], seeds=1)  # imports
    go(["ppo"], seeds=12, quiet=False)
    assert spent[1] / 11 < 0.06
