"""The commands, called in-process; exit statuses and messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml

from polopt.cli import main
from polopt.registry import all_methods

TASK = "gym:CartPole-v1"
SMALL = [
    "--collect.envs",
    "2",
    "--collect.steps",
    "16",
    "--minibatch",
    "16",
    "--epochs",
    "1",
    "--evaluate.episodes",
    "2",
    "--quiet",
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys, *words) -> tuple[int, str, str]:
    status = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return status, out, err


# -------------------------------------------------------------------- looking
def test_version_and_help(capsys):
    assert call(capsys, "--version")[:2] == (0, "polopt 0.1.0\n")
    for words in ([], ["--help"], ["train", "--help"], ["resume", "--help"]):
        status, out, _ = call(capsys, *words)
        assert status == 0
        assert "usage: polopt" in out


def test_methods(capsys):
    _, out, _ = call(capsys, "methods")
    assert [line.split()[0] for line in out.splitlines()].sort() == list(all_methods()).sort()
    assert "\n  rloo" in out  # a child of the root is indented
    _, out, _ = call(capsys, "methods", "--json")
    found = {m["name"]: m for m in json.loads(out)}
    assert found["grpo"]["parent"] == "ppo"
    assert found["ppo"]["settings"]["surrogate.high"] == 0.2
    assert found["dapo"]["settings"]["surrogate"] == "clip"


def test_parts_and_tasks(capsys):
    _, out, _ = call(capsys, "parts", "surrogate")
    assert "clip-higher" in out
    assert "high=0.28" in out
    assert "spell_backward" in call(capsys, "tasks")[1]
    status, _, err = call(capsys, "parts", "surogate")
    assert (status, err) == (2, "polopt: error: unknown slot 'surogate', did you mean 'surrogate'?\n")


def test_explain_and_diff(capsys):
    _, out, _ = call(capsys, "explain", "dapo")
    assert "Chain: reinforce -> reinforce-baseline -> trpo -> ppo -> grpo -> dapo" in out
    assert "surrogate.high: 0.2 -> 0.28" in out
    assert "sampler: fresh(group_size=8) -> dynamic(" in out
    _, out, _ = call(capsys, "diff", "ppo", "grpo")
    assert "critic: value(" in out
    assert "Nearest common ancestor: ppo" in out
    assert "equal in all" in call(capsys, "diff", "ppo", "ppo")[1]
    assert call(capsys, "explain", "grop")[0] == 2


# -------------------------------------------------------------------- before training
def test_help_of_a_method_on_a_task_lists_every_setting(capsys):
    status, out, _ = call(capsys, "train", "ppo", TASK, "--help", "--collect.envs", "3", "--surrogate", "clip-higher")
    assert status == 0
    for option in ("--lr ", "--epochs ", "--surrogate.high ", "--collect.envs ", "--critic.coef ", "--policy.hidden ", "--budget "):
        assert option in out
    plain = " ".join(out.split())
    assert "parallel environments (control); integer, >= 1 [3, given]" in plain
    assert "ratios above 1 + high are clipped; number, >= 0 [0.28, given]" in plain
    assert "set by the task" in plain


def test_dry_run_shows_configuration_size_and_length_and_starts_nothing(capsys, place):
    status, out, _ = call(capsys, "train", "ppo", TASK, "--dry-run", *SMALL, "--budget", "1k-decisions", "--lr", "0.1")
    assert status == 0
    found = yaml.safe_load(out)
    assert (found["method"], found["task"], found["collect"]["envs"]) == ("ppo", TASK, 2)
    assert "lr: 0.1  # set by the user" in out
    assert "threads: 1  # preset of the task" in out
    assert "# parameters: 9,155 (policy 4,610, value 4,545)" in out  # 4*64+64 + 64*64+64 + 64*2+2, and with one output
    assert "# decisions per update: 32" in out
    assert "# updates: 32 (gradient steps in each: 2 of policy)" in out
    assert "# memory: about 146 KB for parameters" in out  # 9,155 floats, with gradients and two moments
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "polopt train needs METHOD and TASK"),
        (["train", "ppo"], "polopt train needs METHOD and TASK"),
        (["train", TASK], f"'{TASK}' is a task"),
        (["train", "ppo", TASK, "--dryrun"], "unknown option --dryrun, did you mean '--dry-run'?"),
        (["train", "ppo", TASK, "--epochs", "0"], "epochs = '0' (command line): must be >= 1"),
        (["train", "ppo", TASK, "--epochs"], "epochs = 'true' (command line): expected integer"),
        (["train", "ppo", TASK, "--out"], "argument --out: expected one argument"),
        (["train", "ppo", TASK, "extra"], "unrecognized arguments: extra"),
        (["tran"], "invalid choice: 'tran'"),
        (["train", "ppo", TASK, "--config", "none.yaml"], "cannot read --config none.yaml"),
        (["resume", "nowhere"], "nowhere is not a run folder"),
        (["eval", "nowhere"], "nowhere is not a run folder"),
        (["report", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_wrong_calls_end_with_2_and_one_message(capsys, place, words, message):
    status, _, err = call(capsys, *words)
    assert status == 2
    assert message in err
    assert err.startswith("polopt: error: ")
    assert err.count("\n") == 1
    assert list(place.iterdir()) == []


# -------------------------------------------------------------------- configuration files
def test_command_line_wins_over_the_file_and_errors_name_its_line(capsys, place):
    (place / "c.yaml").write_text(f"method: ppo\ntask: {TASK}\ncollect:\n  envs: 3\nepochs: 2\n")
    status, out, _ = call(capsys, "train", "--config", "c.yaml", "--dry-run", "--epochs", "5")
    found = yaml.safe_load(out)
    assert (status, found["collect"]["envs"], found["updates"]["policy"]["epochs"]) == (0, 3, 5)
    (place / "c.yaml").write_text("collect:\n  steps: 4\n  envs: many\n")
    assert "collect.envs = 'many' (c.yaml line 3): expected integer" in call(capsys, "train", "ppo", TASK, "--config", "c.yaml")[2]
    (place / "c.yaml").write_text("collect:\n  env: 4\n")
    assert "unknown setting 'collect.env' (c.yaml line 2)" in call(capsys, "train", "ppo", TASK, "--config", "c.yaml")[2]
    (place / "c.yaml").write_text("collect: {envs: 1\nx: [")
    assert "c.yaml line 2 is not YAML" in call(capsys, "train", "ppo", TASK, "--config", "c.yaml")[2]
    (place / "c.yaml").write_text("seed: 1\nseed: 2\n")
    assert "c.yaml line 2: 'seed' was already given in line 1" in call(capsys, "train", "ppo", TASK, "--config", "c.yaml")[2]
    (place / "c.yaml").write_text("- a\n")
    assert "expected 'setting: value' lines" in call(capsys, "train", "ppo", TASK, "--config", "c.yaml")[2]
    (place / "c.yaml").write_text("method: trpo\n")
    assert "is for method 'trpo'" in call(capsys, "train", "ppo", TASK, "--config", "c.yaml")[2]


# -------------------------------------------------------------------- training
def numbers(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_train_resume_eval_report_and_repeat(capsys, place):
    run = place / "run"
    status, out, err = call(
        capsys, "train", "ppo", TASK, "--budget", "3-updates", "--seed", "5", "--schedule", "constant", "--out", "run", *SMALL
    )
    assert (status, err) == (0, "")
    assert "done: 3 updates, 96 decisions" in out
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["updates"], summary["seed"]) == ("done", 3, 5)

    status, _, err = call(capsys, "train", "ppo", TASK, "--out", "run", *SMALL)
    assert status == 2
    assert "polopt resume run" in err
    assert "another --out" in err

    assert call(capsys, "resume", "run", "--budget", "5-updates", "--quiet")[0] == 0
    assert "budget: 5-updates" in (run / "config.yaml").read_text()

    status, out, _ = call(capsys, "eval", "run", "--episodes", "2", "--checkpoint", "last")
    assert status == 0
    assert json.loads(out)["episodes"] == 2

    assert call(capsys, "train", "--config", "run/config.yaml", "--out", "again", "--quiet")[0] == 0
    first, again = numbers(run), numbers(place / "again")
    assert [r["update"] for r in first] == [1, 2, 3, 4, 5]
    for row in (*first, *again):  # the first run also evaluated when it ended after update 3
        for key in [k for k in row if k.startswith("eval")]:
            del row[key]
    assert again == first
    assert (place / "again/config.yaml").read_text() == (run / "config.yaml").read_text()

    status, out, _ = call(capsys, "report", "run")
    assert status == 0
    assert out.strip().endswith("report.html")


def test_default_folder_is_numbered(capsys, place):
    (place / "runs/ppo-gym-CartPole-v1-s0").mkdir(parents=True)
    assert call(capsys, "train", "ppo", TASK, "--budget", "1-updates", *SMALL)[0] == 0
    assert (place / "runs/ppo-gym-CartPole-v1-s0-2/summary.json").is_file()


OWN = """
from dataclasses import dataclass
from polopt.part import Part
from polopt.parts.advantage.gae import GAE

@dataclass(frozen=True)
class Doubled(GAE):
    def __call__(self, batch):
        return 2 * super().__call__(batch)

@dataclass(frozen=True)
class Broken(GAE):
    def __call__(self, batch):
        raise RuntimeError("deep inside")
"""


def test_own_code_is_copied_and_repeats(capsys, place):
    (place / "own.py").write_text(OWN)
    words = ["--budget", "2-updates", "--advantage", "own.py:Doubled", "--advantage.gamma", "0.5", *SMALL]
    assert call(capsys, "train", "ppo", TASK, "--out", "run", *words)[0] == 0
    assert (place / "run/files/own.py").read_text() == OWN
    assert "part: files/own.py:Doubled" in (place / "run/config.yaml").read_text()
    (place / "own.py").unlink()
    assert call(capsys, "train", "--config", "run/config.yaml", "--out", "again", "--quiet")[0] == 0
    assert numbers(place / "again") == numbers(place / "run")
    assert call(capsys, "resume", "again", "--budget", "3-updates", "--quiet")[0] == 0


def test_a_failing_run_ends_with_1_and_keeps_the_traceback(capsys, place):
    (place / "own.py").write_text(OWN)
    words = ["train", "ppo", TASK, "--advantage", "own.py:Broken", "--out", "run", *SMALL]
    status, _, err = call(capsys, *words)
    assert status == 1
    assert err.strip() == "polopt: error: RuntimeError: deep inside; the traceback is in run/error.txt"
    assert "in __call__" in (place / "run/error.txt").read_text()
    assert json.loads((place / "run/summary.json").read_text())["status"] == "failed"
    words[words.index("run")] = "other"
    with pytest.raises(RuntimeError):
        main([*words, "--debug"])


def test_a_run_that_cannot_be_built_leaves_its_folder_free(capsys, place, monkeypatch):
    import polopt.loops.improve as improve

    def fail(*_, **__):
        raise OSError("no such model")

    monkeypatch.setattr(improve, "make_policy", fail)
    status, _, err = call(capsys, "train", "ppo", TASK, "--out", "run", *SMALL)
    assert status == 1
    assert "no such model; the traceback is in run/error.txt" in err
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert call(capsys, "train", "ppo", TASK, "--out", "run", "--budget", "1-updates", *SMALL)[0] == 0


ENDLESS = ["train", "ppo", TASK, "--budget", "1M-updates", "--optim.compile", "never", "--out", "run", *SMALL]


def wait_for(path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)


def check_interrupted(place, err) -> None:
    assert "interrupted, saved in run; continue with: polopt resume run" in err
    summary = json.loads((place / "run/summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert f"update-{summary['updates']:09d}" in {p.name for p in (place / "run/checkpoints").iterdir()}


def test_sigterm_saves_and_ends_with_143(capsys, place):
    def send():
        wait_for(place / "run/metrics.jsonl")
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    status, _, err = call(capsys, *ENDLESS)
    sender.join()
    assert status == 143
    check_interrupted(place, err)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handlers of the caller are back


def test_ctrl_c_saves_and_ends_with_130(place):
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.Popen([sys.executable, "-m", "polopt", *ENDLESS], stderr=subprocess.PIPE, text=True, env=one)
    wait_for(place / "run/metrics.jsonl")
    done.send_signal(signal.SIGINT)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 130
    check_interrupted(place, err)
