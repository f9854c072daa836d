"""Built-in rewards: worked examples of each, and that mathematics is judged in a process of its own."""

import threading
import time

import pytest

from polopt.errors import PoloptError
from polopt.tasks import verifiers
from polopt.tasks.rewards import RewardSet, parse_rewards


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        ("42", "so it is 42", 1.0),
        ("42", r"The answer is \boxed{42}.", 1.0),
        ("42", "43", 0.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        (r"$\frac{1}{2}$", r"\boxed{\frac12}", 1.0),
        ("3 + 4 = 7\n#### 1,234", "1234", 1.0),
        ("x^2+2x+1", "$(x+1)^2$", 1.0),
        ("x^2+2x+1", "$(x-1)^2$", 0.0),
        ("72", "first 72, no: 70", 0.0),
        ("-5", "5", 0.0),
        ("5", "", 0.0),
        ("", "4", None),
        (None, "4", None),
        (7, "7", 1.0),
    ],
)
def test_math(answer: object, completion: str, expected: float | None) -> None:
    assert verifiers.math([completion], column="answer", answer=[answer]) == [expected]
    assert verifiers.math([[{"role": "assistant", "content": completion}]], column="answer", answer=[answer]) == [expected]


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        ("Paris", " paris.\n", 1.0),
        ("new  york", "New York", 1.0),
        ("½", "1⁄2", 1.0),
        ("Paris", "in Paris", 0.0),
        (3, "3", 1.0),
        (None, "3", None),
    ],
)
def test_exact(answer: object, completion: str, expected: float | None) -> None:
    assert verifiers.exact([completion], column="gold", gold=[answer]) == [expected]


def test_regex() -> None:
    found = verifiers.matches(
        ["<think>\n</think>7", "7", [{"role": "assistant", "content": "<think></think>"}]], pattern=r"\A<think>.*</think>"
    )
    assert found == [1.0, 0.0, 1.0]


def test_length() -> None:
    assert verifiers.short([[1] * n for n in (0, 4, 5, 6, 8, 20)], limit=4) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def run(reward: str, completions: list[str], **columns: list[object]) -> list[float]:
    rewards = RewardSet(parse_rewards(reward))
    rewards.open("answer")
    data = {"prompts": ["p"] * len(completions), "completions": completions, "completion_ids": [[1]] * len(completions), **columns}
    try:
        return rewards.score(data, data["prompts"], timeout=60)[:, 0].tolist()
    finally:
        rewards.close()


def test_math_works_off_the_main_thread() -> None:
    out: list[list[float]] = []
    thread = threading.Thread(target=lambda: out.append(run("math", ["it is 0.5", "2"], answer=["1/2", "3"])))
    thread.start()
    thread.join(60)
    assert out == [[1.0, 0.0]]


def test_math_without_a_readable_reference_is_an_error() -> None:
    with pytest.raises(PoloptError, match="no reward applies to completion 1"):
        run("math", ["1", "1"], answer=["1", ""])


def test_the_limit_is_processor_time_and_later_ones_are_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(gold: object, text: str) -> float:
        if text == "sleep":
            time.sleep(2.2)  # waiting for a busy machine costs nothing
            return 1.0
        while True:
            pass

    monkeypatch.setattr(verifiers, "_equal", judge)
    assert verifiers.math(["sleep"], column="answer", answer=["1"]) == [1.0]
    limits = []
    real = verifiers._processor_time
    monkeypatch.setattr(verifiers, "_processor_time", lambda seconds: (limits.append(seconds), real(seconds / 100))[1])
    assert verifiers.math(["spin"] * 10, column="answer", answer=["1"] * 10) == [0.0] * 10
    assert limits == [2.0] * 8 + [0.1] * 2


def test_an_expensive_expression_scores_0_instead_of_hanging() -> None:
    assert run("math", [r"$9^{9^{9^{9}}}!$", "4"], answer=["4", "4"]) == [0.0, 1.0]
