"""Reward functions: TRL's signature, weights, policies on failure. Isolation is tested with functions that really hang or crash."""

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from polopt.errors import CallError, PoloptError
from polopt.tasks.rewards import RewardSet, parse_rewards

FILE = """
import os, time
from helper import FACTOR

def brevity(completions, **kwargs):
    return [-FACTOR * len(c) for c in completions]

def picky(completions):
    if any("bad" in c for c in completions):
        raise ZeroDivisionError("no answer to that")
    return [1.0] * len(completions)

def sleeps(completions, **kwargs):
    while True:
        time.sleep(0.01)

def spins(completions, **kwargs):
    import re
    re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter lock practically forever

def crashes(completions, **kwargs):
    os.kill(os.getpid(), 11)

def leaves(completions, **kwargs):
    raise SystemExit(3)

def nested(completions, **kwargs):
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    open(completions[0], "w").write(str(child.pid))
    time.sleep(60)

def pid(completions, **kwargs):
    return [os.getpid()] * len(completions)

async def slow_judge(prompts, completions, completion_ids, gold, **kwargs):
    import asyncio
    await asyncio.sleep(0.01)
    return [float(c == g) for c, g in zip(completions, gold)]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("FACTOR = 2")
    path = tmp_path / "my.py"
    path.write_text(FILE)
    return path


def score(reward, completions=("a", "b"), *, weights=None, on_error="raise", timeout=20.0, prompts=None, same=None, **columns):
    """Scores of one call, and the set (closed)."""
    rewards = RewardSet(parse_rewards(reward, weights), on_error=on_error)
    prompts = list(prompts or [f"prompt {i}" for i in range(len(completions))])
    data = {"prompts": prompts, "completions": list(completions), "completion_ids": [[1] * len(c) for c in completions], **columns}
    rewards.open("gold")
    try:
        return rewards.score(data, same or prompts, timeout=timeout), rewards
    finally:
        rewards.close()


# ------------------------------------------------------------------ what functions receive and return
def test_channels_stay_apart_and_are_weighted(file: Path) -> None:
    rewards = RewardSet(parse_rewards(["exact", f"{file}:brevity"], [1.0, 0.5]))
    rewards.open("gold")
    out = rewards.score(
        {"prompts": ["p", "q"], "completions": ["yes", "no"], "completion_ids": [[1], [2]], "gold": ["Yes.", "yes"]}, ["p", "q"]
    )
    rewards.close()
    assert rewards.channels == ("exact", "brevity")
    np.testing.assert_array_equal(out, [[1.0, -3.0], [0.0, -2.0]])


def test_two_functions_of_one_name_get_two_channels(file: Path) -> None:
    assert [r.name for r in parse_rewards([f"{file}:brevity", f"{file}:brevity", lambda completions: [0.0]])] == [
        "brevity",
        "brevity-2",
        "reward",
    ]


def test_async_functions_of_files_and_callables(file: Path) -> None:
    async def local(completions, **kwargs):
        await asyncio.sleep(0.001)
        return [float(len(c)) for c in completions]

    out, _ = score([f"{file}:slow_judge", local], ["abc", "x"], gold=["abc", "y"])
    np.testing.assert_array_equal(out, [[1, 3], [0, 1]])


def test_arguments_are_those_of_trl() -> None:
    seen = {}

    def named(prompts, completions, completion_ids, gold, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(locals())
        log_extra("column", completions)
        log_metric("words", 2.5)
        return [0.5, 1]

    out, rewards = score(named, ["a", "b"], gold=["x", "y"], level=[1, 2])
    np.testing.assert_array_equal(out, [[0.5], [1.0]])
    assert seen["completion_ids"] == [[1], [1]]
    assert seen["kwargs"] == {"level": [1, 2]}
    assert seen["trainer_state"] is None
    assert rewards.report() == {"words": 2.5}
    assert rewards.report() == {}


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    import torch

    out, _ = score(
        [
            lambda completions: np.array([1, 0]),
            lambda completions: torch.tensor([0.5, 1.5]),
            lambda completions: [True, np.float32(2)],
        ]
    )
    np.testing.assert_array_equal(out, [[1, 0.5, 1], [0, 1.5, 2]])


def test_none_means_not_applicable() -> None:
    out, _ = score([lambda completions: [None, 1.0], lambda completions: [0.25, None]])
    np.testing.assert_array_equal(out, [[0, 0.25], [1, 0]])


def test_importable_callables_run_in_a_process_and_others_here() -> None:
    out, _ = score([os_pid_of, lambda completions: [os.getpid()] * len(completions)])
    assert out[0, 0] != os.getpid()
    assert out[0, 1] == os.getpid()


def os_pid_of(completions, **kwargs):
    return [os.getpid()] * len(completions)


def test_a_process_lasts_from_call_to_call(file: Path) -> None:
    rewards = RewardSet(parse_rewards(f"{file}:pid"))
    rewards.open("")
    data = {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1]]}
    first, second = (rewards.score(data, ["p"])[0, 0] for _ in range(2))
    rewards.close()
    assert first == second
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)  # close() ended it


# ------------------------------------------------------------------ refused when built
@pytest.mark.parametrize(
    ("reward", "weights", "message"),
    [
        (None, None, "needs a reward"),
        ([], None, "needs a reward"),
        ("mth", None, "did you mean 'math'"),
        ("exact:3", None, "nothing after a colon"),
        ("length", None, "number of tokens"),
        ("length:0", None, "number of tokens"),
        ("regex:", None, "needs a pattern"),
        ("regex:(", None, "not a regular expression"),
        ("missing.py:f", None, "there is no file"),
        (3, None, "expected a name or a callable"),
        (["exact", "math"], [1.0], "1 numbers for 2 rewards"),
        ("exact", [0.0], "other than 0"),
        ("exact", [float("nan")], "finite"),
        ("exact", ["one"], "finite number"),
        ("exact", True, "finite number"),
    ],
)
def test_wrong_options_are_refused(reward, weights, message) -> None:
    with pytest.raises(CallError, match=message):
        parse_rewards(reward, weights)


def test_lists_may_be_texts_with_commas() -> None:
    made = parse_rewards("math, exact", "1, 0.5")
    assert [(r.name, r.weight) for r in made] == [("math", 1.0), ("exact", 0.5)]
    assert [r.name for r in parse_rewards("regex:a{1,2}, b")] == ["regex"]


def test_a_wrong_name_in_a_file_is_refused_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text("raise SystemExit\ndef brevity(completions): return [0.0]\n")
    with pytest.raises(CallError, match="did you mean 'brevity'"):
        parse_rewards(f"{path}:brevty")
    parse_rewards(f"{path}:brevity")
    path.write_text("def broken(:\n")
    with pytest.raises(CallError, match="not valid Python"):
        parse_rewards(f"{path}:broken")


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(CallError, match="did you mean 'raise'"):
        RewardSet(parse_rewards("exact"), on_error="rise")


# ------------------------------------------------------------------ functions that fail
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [1.0], "returned 1 rewards, expected a list of 2 numbers"),
        (lambda completions: 1.0, "returned float 1.0, expected a list of 2"),
        (lambda completions: None, "returned None, expected a list of 2"),
        (lambda completions: [1.0, "good"], "returned str 'good' for completion 1.*prompt 1"),
        (lambda completions: [1.0, float("nan")], "returned nan for completion 1 of 2 .*prompt 1.*finite"),
        (lambda completions: [float("inf"), 1.0], "returned inf for completion 0"),
        (lambda completions: [None, None], "no reward applies to completion 0"),
        (lambda wrong: [0.0, 0.0], "TypeError"),
    ],
)
def test_wrong_answers_are_named(function, message) -> None:
    with pytest.raises(PoloptError, match=message) as caught:
        score(function)
    assert not isinstance(caught.value, CallError)


def test_an_exception_names_function_line_and_prompt(file: Path) -> None:
    completions = ["ok"] * 5 + ["so bad"] + ["ok"] * 2
    with pytest.raises(PoloptError) as caught:
        score(f"{file}:picky", completions)
    text = str(caught.value)
    for part in (
        "'picky'",
        str(file),
        "ZeroDivisionError: no answer to that",
        "my.py:10 in picky",
        "completion 5 of 8",
        "'prompt 5'",
        "'so bad'",
    ):
        assert part in text
    assert "Traceback" in str(caught.value.__cause__)


def test_zero_and_mean_keep_the_healthy_completions(file: Path) -> None:
    completions, prompts = ["ok", "bad", "ok", "ok", "bad"], ["p", "p", "p", "q", "q"]
    out, rewards = score([f"{file}:picky"], completions, prompts=prompts, on_error="zero")
    np.testing.assert_array_equal(out[:, 0], [1, 0, 1, 1, 0])
    assert rewards.report()["reward_failures"] == 2
    calls = {"n": 0}

    def graded(completions):
        calls["n"] += 1
        if "bad" in completions:
            raise ValueError
        return [float(len(c)) for c in completions]

    out, _ = score(graded, ["ok", "bad", "fine", "bad", "x"], prompts=["p", "p", "p", "q", "r"], on_error="mean", weights=[2.0])
    np.testing.assert_array_equal(out[:, 0], [4, 6, 8, 0, 2])  # the mean of 2 and 4, twice; nothing to go by for q


def test_nan_counts_as_failure_of_its_completion_alone() -> None:
    out, rewards = score([lambda completions: [1.0, float("nan")], lambda completions: [0.5, 0.5]], on_error="zero")
    np.testing.assert_array_equal(out, [[1, 0.5], [0, 0.5]])
    assert rewards.report() == {"reward_failures": 1.0}


@pytest.mark.parametrize("name", ["sleeps", "spins"])
def test_a_hanging_function_is_killed_and_named(file: Path, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(PoloptError, match=rf"reward '{name}'.* did not answer within 0.4 s; it was at my.py:\d+ in {name}"):
        score(f"{file}:{name}", timeout=0.4)
    assert time.monotonic() - start < 10


def test_after_a_hang_the_next_call_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "once.py"
    path.write_text(
        "import time\ndef f(completions):\n    if completions[0] == 'hang': time.sleep(99)\n    return [1.0] * len(completions)\n"
    )
    rewards = RewardSet(parse_rewards(f"{path}:f"), on_error="zero")
    rewards.open("")
    data = {"prompts": ["p"], "completions": ["hang"], "completion_ids": [[1]]}
    assert rewards.score(data, ["p"], timeout=0.3) == 0
    assert rewards.score({**data, "completions": ["fine"]}, ["p"], timeout=20) == 1
    assert rewards.report()["reward_failures"] == 1
    rewards.close()


def test_a_hanging_lambda_is_given_up() -> None:
    start = time.monotonic()
    with pytest.raises(PoloptError, match=r"did not answer within 0.3 s"):
        score(lambda completions: time.sleep(5), timeout=0.3)
    assert time.monotonic() - start < 3


def test_a_late_answer_is_not_taken_for_the_next(tmp_path: Path) -> None:
    naps = iter([0.5, 0.0])

    def slow_first(completions):
        time.sleep(nap := next(naps))
        return [nap]

    rewards = RewardSet(parse_rewards(slow_first), on_error="zero")
    rewards.open("")
    data = {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1]]}
    assert rewards.score(data, ["p"], timeout=0.1) == 0
    time.sleep(0.6)
    assert rewards.score(data, ["p"], timeout=5) == 0.0
    assert rewards.report()["reward_failures"] == 1


@pytest.mark.parametrize(("name", "message"), [("crashes", "ended its process by SIGSEGV"), ("leaves", "raised SystemExit: 3")])
def test_a_crash_does_not_end_the_run(file: Path, name: str, message: str) -> None:
    with pytest.raises(PoloptError, match=message):
        score(f"{file}:{name}")


def test_children_of_a_killed_function_are_killed_too(file: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(PoloptError, match="did not answer"):
        score(f"{file}:nested", [str(note)], timeout=1.0)
    status = Path(f"/proc/{note.read_text()}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the child still runs")


def test_a_file_that_cannot_be_imported_is_an_error_under_every_policy(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text("import no_such_module\ndef f(completions): return [0.0]\n")
    with pytest.raises(PoloptError, match=r"could not be loaded: ModuleNotFoundError.*my.py:1"):
        score(f"{path}:f", ["a"], on_error="zero")


@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), 9)"])
def test_no_process_outlives_the_run(file: Path, tmp_path: Path, ending: str) -> None:
    program = f"""
    import os, threading
    from polopt.tasks.rewards import RewardSet, parse_rewards
    rewards = RewardSet(parse_rewards("{file}:pid"))
    rewards.open("")
    print(int(rewards.score({{"prompts": ["p"], "completions": ["c"], "completion_ids": [[1]]}}, ["p"])[0, 0]), flush=True)
    {ending}
    """
    assert_process_ends(program)


def test_a_hanging_process_outlives_a_killed_run_only_until_its_timeout(file: Path) -> None:
    program = f"""
    import os, threading
    from polopt.tasks.isolation import ProcessHost
    host = ProcessHost(("file", "{file}", "spins", {{}}))
    host.submit({{"completions": ["c"]}}, 1.0)
    print(host._worker._process.pid, flush=True)
    os.kill(os.getpid(), 9)
    """
    assert_process_ends(program)


def assert_process_ends(program: str) -> None:
    """The process whose number the program prints is gone within five seconds of the program's end."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout)
    for _ in range(250):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail(f"reward process {pid} still runs; {done.stderr}")
