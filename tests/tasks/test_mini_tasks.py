"""Small text tasks: what they ask, how they judge, and what each dial does."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from polopt.errors import CallError
from polopt.policies.lm.model import ASSETS, SHIPPED, resolve
from polopt.registry import get_method
from polopt.tasks import make
from polopt.tasks.chain import partial_results, written
from polopt.tasks.countdown import derivation
from polopt.tasks.mini import MINIATURES, MiniTask
from polopt.tasks.text import TextTask
from polopt.tasks.text_protocol import Item, solution_of

NAMES = [f"text:{name}" for name in MINIATURES]


def task(name: str, **options: Any) -> MiniTask:
    made = make(name, options)
    assert isinstance(made, MiniTask)
    return made


def scored(of: MiniTask, items: list[Item], answers: list[str]) -> np.ndarray:
    return of.score(items, answers, [[]] * len(items), timeout=1.0)


# -------------------------------------------------------------------- every small task
@pytest.mark.parametrize("name", NAMES)
def test_solutions_are_right_short_and_carried_by_items(name: str) -> None:
    of = task(name)
    items = [*of.items("eval")[:100], *(of.items("train")[i] for i in range(100))]
    solutions = [str(solution_of(of, i)) for i in items]
    assert [i.columns[of.solution] for i in items] == solutions
    assert (scored(of, items, solutions) == 1.0).all()
    assert of.correct(scored(of, items, solutions)).all()
    assert max(len(s) for s in solutions) < of.tokens  # and the end token
    assert max(len(str(i.prompt)) for i in items) <= 32


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_never_in_both_splits(name: str) -> None:
    of = task(name, train_items=500)
    held_out = {of.question(i) for i in of.items("eval")}
    assert len(held_out) == 256
    assert not held_out & {of.question(i) for i in of.items("train")}


@pytest.mark.parametrize("name", NAMES)
def test_the_preset_names_the_model_and_the_user_may_name_another(name: str) -> None:
    from polopt.overrides import resolve as settle

    found = settle("grpo", name)
    assert found.settings.policy.model == task(name).model
    assert found.settings.policy.model in SHIPPED
    assert resolve(found.settings.policy.model) == str(ASSETS / task(name).model)
    assert found.settings.collect.max_new_tokens == task(name).tokens
    assert found.settings.collect.prompts * found.method.sampler.group_size == 128
    assert settle("grpo", name, {"policy.model": "tiny"}).settings.policy.model == "tiny"
    assert task(name).preset(get_method("ghpo"))["sampler.connector"] == ""


def test_making_one_imports_nothing_heavy() -> None:
    code = (
        "import sys; from polopt.tasks import make; [make(n) for n in ('text:chain', 'text:countdown', 'text:spell')];"
        "bad = {'reasoning_gym', 'transformers', 'datasets'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("text:chian", {}, "unknown text task"),
        ("text:chain", {"flip": 0.1}, "did you mean 'flips'"),
        ("text:chain", {"flips": 1.5}, "flips = 1.5 must be"),
        ("text:chain", {"second": "lenght"}, "did you mean 'length'"),
        ("text:chain", {"min_terms": 7}, "refuses its options"),
        ("text:countdown", {"junk": "bad"}, "options.junk"),
        ("text:spell", {"min_length": 9, "max_length": 5}, "must be >= options.min_length"),
        ("text:spell", {"max_len": 5}, "did you mean 'max_length'"),
        ("text:spell", {"kind": "shuffle"}, "options.kind"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CallError, match=message):
        make(name, options)


# -------------------------------------------------------------------- dials that all have
@pytest.mark.parametrize("name", NAMES)
def test_flips_turn_training_verdicts_round_and_no_others(name: str) -> None:
    of = task(name, flips=0.3)
    train, held_out = [of.items("train")[i] for i in range(400)], list(of.items("eval")[:100])
    right, wrong = scored(of, train, [str(i.columns["solution"]) for i in train]), scored(of, train, ["x"] * 400)
    assert abs(1 - right.mean() - 0.3) < 0.08  # 3.5 standard deviations
    assert abs(wrong.mean() - 0.3) < 0.08
    assert (scored(of, held_out, ["x"] * 100) == 0).all()
    same = scored(of, [train[0]] * 400, ["x"] * 400)
    assert abs(same.mean() - 0.3) < 0.08  # equal answers have luck of their own,
    np.testing.assert_array_equal(same, scored(task(name, flips=0.3), [train[0]] * 400, ["x"] * 400))  # the same again and again


@pytest.mark.parametrize("name", NAMES)
def test_random_labels_spoil_their_share_of_training_items(name: str) -> None:
    of = task(name, random_labels=0.2)
    train, held_out = [of.items("train")[i] for i in range(500)], list(of.items("eval"))
    spoilt = 1 - scored(of, train, [str(i.columns["solution"]) for i in train]).mean()
    assert 0.12 < spoilt < 0.26  # another question may have the same answer
    assert (scored(of, held_out, [str(i.columns["solution"]) for i in held_out]) == 1).all()
    clean = task(name)
    assert [i.prompt for i in train] == [clean.items("train")[i].prompt for i in range(500)]


@pytest.mark.parametrize(
    ("name", "prompt_answer"),
    [
        ("text:chain", lambda i: str(i.prompt).rstrip("=")[-1]),
        ("text:countdown", None),
        ("text:spell", lambda i: str(i.prompt).rstrip(">")),
    ],
)
def test_a_shortcut_pays_wrong_answers_of_its_kind_in_training(name: str, prompt_answer: Any) -> None:
    of = task(name, shortcut=0.5)

    def lazily(item: Item) -> str:
        if prompt_answer:
            return str(prompt_answer(item))
        a, b, c = item.columns["metadata"]["numbers"]
        target = item.columns["metadata"]["target"]
        sums = {f"{a}{s * b:+d}{t * c:+d}": a + s * b + t * c for s in (1, -1) for t in (1, -1)}
        return next((text for text, x in sums.items() if abs(x - target) == 2), "")

    train = [of.items("train")[k] for k in range(60)]
    answers = [lazily(i) for i in train]
    plain, paid = scored(task(name), train, answers)[:, 0], scored(of, train, answers)[:, 0]
    lazy = np.array([a != "" for a in answers]) & (plain == 0)
    assert lazy.any()
    assert (paid[lazy] == 0.5).all()
    assert (paid[~lazy] == plain[~lazy]).all()
    assert (scored(of, list(of.items("eval")), [lazily(i) for i in of.items("eval")])[:, 0] != 0.5).all()
    assert not of.correct(np.array([[0.5]])).any()


def test_a_second_reward_is_a_channel_of_its_own() -> None:
    plain, length, form = task("text:chain"), task("text:chain", second="length", length=4), task("text:chain", second="format")
    assert (plain.channels, length.channels, form.channels) == (("exact",), ("exact", "length"), ("exact", "format"))
    item = Item("3+4-9=", {"answer": "-2", "train": True, "question": "", "metadata": {"expression": "3 + 4 - 9"}})
    answers = ["7-2", "7,0-2", "7-2;", "-2;;", "9;"]
    assert scored(plain, [item] * 5, answers).tolist() == [[1], [1], [1], [1], [0]]
    assert scored(length, [item] * 5, answers).tolist() == [[1, 1], [1, 0], [1, 1], [1, 1], [0, 1]]
    assert scored(form, [item] * 5, answers).tolist() == [[1, 0], [1, 0], [1, 1], [1, 0], [0, 1]]
    assert form.correct(scored(form, [item] * 5, answers)).tolist() == [True] * 4 + [False]


# -------------------------------------------------------------------- chain
def test_partial_results_are_written_without_needless_commas() -> None:
    assert partial_results("3 + 4 - 9 + 5") == [7, -2, 3]
    assert written([7, -2, 3]) == "7-2,3"
    assert partial_results("8") == [8]
    worst = written(partial_results("0 - 9 - 9 - 9 - 9 - 9"))
    assert worst == "-9-18-27-36-45"
    items = task("text:chain").items("train")
    for i in range(50):
        expression = str(items[i].columns["metadata"]["expression"])
        assert partial_results(expression)[-1] == eval(expression)  # digits, plus and minus


def test_number_of_terms_is_a_dial() -> None:
    of = task("text:chain", min_terms=3, max_terms=3)
    assert {str(i.prompt).count("+") + str(i.prompt).count("-") for i in of.items("eval")} == {2}
    both = task("text:chain")
    assert {i.columns["metadata"]["num_terms"] for i in both.items("eval")} == {2, 3, 4, 5, 6}


# -------------------------------------------------------------------- countdown
def test_the_quick_verdict_is_that_of_reasoning_gym() -> None:
    of, slow = task("text:countdown", reward="score"), TextTask("text:countdown", {**task("text:countdown").difficulty})
    items, rng = list(of.items("eval")), random.Random(0)
    answers = []
    for item in items[:150]:
        numbers = [str(n) for n in item.columns["metadata"]["numbers"]]
        rng.shuffle(numbers)
        text = numbers[0] + "".join(rng.choice("+-") + n for n in numbers[1:])
        answers.append(
            rng.choice([text, text, f"-{text}", text[:-1], f"({text})", text.replace("+", "*"), "", "++", f"{text}x", "A"])
        )
    fast = scored(of, items[:150], answers)[:, 0]
    for item, answer, score in zip(items[:150], answers, fast, strict=True):
        expected = slow.dataset.score_answer(answer, item.columns)
        assert (score >= 1.0) == (expected >= 1.0), (item.prompt, answer)
        assert score == expected or "A" in answer or "x" in answer
    assert (scored(task("text:countdown"), items[:150], answers)[:, 0] == (fast >= 1.0)).all()  # partial credit is thresholded


def test_retry_junk_and_derivations() -> None:
    item = Item("5,9,2=6", {"train": True, "question": "", "metadata": {"numbers": [5, 9, 2], "target": 6}})
    answers = ["9+2-5", "2+9-5", "5+9+2?9+2-5", "9+2-5?", "9A+2-T5", "9+2-5A?"]

    def verdicts(**options: Any) -> list[float]:
        return scored(task("text:countdown", **options), [item] * len(answers), answers)[:, 0].tolist()

    assert verdicts() == [1, 1, 1, 0, 1, 0]
    assert verdicts(retry=False) == [1, 1, 0, 0, 1, 0]
    assert verdicts(junk="wrong") == [1, 1, 1, 0, 0, 0]
    assert verdicts(derivations="rare") == [0, 1, 0, 0, 0, 0]
    assert derivation("2-5+9") == "9+2-5"
    assert derivation("1-2-3+10") == "10+1-3-2"


def test_the_task_of_reasoning_gym_can_be_asked_for_by_options() -> None:
    of = task("text:countdown", max_numbers=4, min_numbers=4, max_target=99, render="{question}", operators=("+", "*"))
    assert "Final answer format instructions" in str(of.items("train")[0].prompt)
    assert len(of.items("train")[0].columns["metadata"]["numbers"]) == 4


# -------------------------------------------------------------------- spell
def test_strings_are_reversed_or_sorted_and_scored_from_the_left() -> None:
    of = task("text:spell", reward="score", min_length=4, max_length=4)
    item = Item("abcd>", {"answer": "dcba", "train": False, "question": "", "metadata": {"word": "abcd"}})
    assert scored(of, [item] * 5, ["dcba", "dcab", "abcd", "", "dcbaa"])[:, 0].tolist() == [1, 0.5, 0, 0, 0.8]
    assert scored(task("text:spell"), [item] * 2, ["dcba", "dcab"])[:, 0].tolist() == [1, 0]
    assert {len(i.columns["answer"]) for i in task("text:spell").items("eval")} == set(range(4, 13))
    found = task("text:spell", kind="sort").items("eval")[0]
    assert found.columns["answer"] == "".join(sorted(found.columns["metadata"]["word"]))
