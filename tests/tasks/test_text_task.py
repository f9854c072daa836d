"""reasoning-gym tasks: names, options, disjoint splits, rendering, judging."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from polopt.errors import CallError, PoloptError
from polopt.tasks.text import TextOptions, TextTask, _config_defaults, _table, text_names
from polopt.tasks.text_protocol import check_scores


def test_names_are_those_that_reasoning_gym_registers() -> None:
    import reasoning_gym  # noqa: F401
    from reasoning_gym.factory import DATASETS

    assert set(text_names()) == set(DATASETS) - {"composite"}
    for name in ("spell_backward", "chain_sum", "gcd"):
        assert DATASETS[name][1].__name__ == _table()[name][1]


def test_own_options_do_not_hide_those_of_a_task() -> None:
    mine = {f.name for f in fields(TextOptions)} - {"seed"}
    for module, config in _table().values():
        path = Path(sys.modules["reasoning_gym"].__path__[0]).parent / Path(*module.split(".")).with_suffix(".py")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == config:
                theirs = {s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}
                assert not theirs & mine, (module, theirs & mine)


def test_making_a_task_imports_nothing_heavy() -> None:
    code = (
        "import sys; from polopt.tasks import make; make('text:spell_backward', {'reward': 'exact'});"
        "bad = {'reasoning_gym', 'transformers', 'sympy', 'datasets'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("text:spel_backward", {}, "did you mean 'spell_backward'"),
        ("text:spell_backward", {"max_word_length": 5}, "did you mean 'max_word_len'"),
        ("text:spell_backward", {"max_word_len": "long"}, "max_word_len = 'long'.*must be int"),
        ("text:spell_backward", {"min_word_len": 9, "max_word_len": 4}, "max_word_len must be >= min_word_len"),
        ("text:spell_backward", {"size": 4}, "train_items and eval_items"),
        ("text:spell_backward", {"eval_items": 0}, "eval_items = 0 must be >= 1"),
        ("text:spell_backward", {"reward": "exakt"}, "did you mean 'exact'"),
        ("text:spell_backward", {"answer": "("}, "not a regular expression"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(CallError, match=message):
        TextTask(name, options)


@pytest.mark.parametrize("options", [{}, {"max_word_len": 4}])
def test_no_training_question_is_held_out(options: dict[str, object]) -> None:
    task = TextTask("text:spell_backward", {**options, "train_items": 3000})
    held_out = [str(i.columns["question"]) for i in task.items("eval")]
    train = [str(i.columns["question"]) for i in task.items("train")]
    assert len(held_out) == len(set(held_out)) == 256
    assert len(train) == 3000
    assert not set(held_out) & set(train)


def test_repeats_are_replaced_not_dropped() -> None:
    """Among short words an index does hit held-out questions: its replacement comes from an index of its own."""
    task = TextTask("text:spell_backward", {"max_word_len": 3, "eval_items": 300, "train_items": 500})
    _, held_out, first = task._held_out
    clash = [i for i in range(500) if str(task.dataset[first + i]["question"]) in held_out]
    assert clash
    for i in clash:
        index = task.items("train")[i].columns["metadata"]["source_index"]
        assert index > first + i
        assert (index - first - i) % 500 == 0


def test_items_depend_on_seed_and_index_alone() -> None:
    one, two = (TextTask("text:chain_sum", {"seed": s}) for s in (1, 1))
    assert one.items("train")[17] == two.items("train")[17]
    assert one.items("train")[17] != TextTask("text:chain_sum", {"seed": 2}).items("train")[17]
    assert one.items("train")[-1] == one.items("train")[9999]
    with pytest.raises(IndexError):
        one.items("train")[10_000]


def test_too_few_distinct_questions_is_said() -> None:
    task = TextTask("text:chain_sum", {"max_terms": 2, "max_digits": 1, "eval_items": 4000})
    with pytest.raises(CallError, match="too few distinct questions"):
        task.items("eval")


def test_rendering_and_system_message() -> None:
    task = TextTask("text:spell_backward", {"render": "{word} ({word_len})>", "system": "be brief"})
    item = task.items("eval")[0]
    word = item.columns["metadata"]["word"]
    assert item.prompt == [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"{word} ({len(word)})>"}]
    with pytest.raises(CallError, match=r"fields: question.*word"):
        TextTask("text:spell_backward", {"render": "{wort}"}).items("eval")


def test_scores_are_the_verifiers_own() -> None:
    task = TextTask("text:spell_backward")
    item = task.items("eval")[0]
    right = str(item.columns["answer"])
    answers = [right, f"so: <answer> {right} </answer>.", right[0] + "#" * (len(right) - 1), "", "<answer>x</answer>" + right]
    scores = task.score([item] * 5, answers, [[]] * 5, timeout=1.0)
    np.testing.assert_allclose(scores[:3, 0], [1, 1, 1 / len(right)])
    assert scores[3, 0] == 0
    assert task.correct(scores).tolist() == [True, True, False, False, False]
    exact = TextTask("text:spell_backward", {"reward": "exact"})
    assert exact.score([item] * 5, answers, [[]] * 5, timeout=1.0)[:, 0].tolist() == [1, 1, 0, 0, 0]
    assert exact.channels == ("exact",)


def test_answers_may_be_extracted_by_a_regular_expression() -> None:
    task = TextTask("text:gcd", {"answer": r"=\s*(\d+)"})
    assert task.extract("3 = 4, so x = 12.") == "12"
    assert task.extract("none") == ""
    assert TextTask("text:gcd", {"answer": r"\d+"}).extract("3 or 14") == "14"


def test_an_answer_that_breaks_the_verifier_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TextTask("text:spell_backward")

    def broken(answer: str, entry: object) -> float:
        if answer == "boom":
            raise ValueError
        return 1.0

    monkeypatch.setattr(task.dataset, "score_answer", broken)
    item = task.items("eval")[0]
    assert task.score([item] * 2, ["boom", "ok"], [[], []], timeout=1.0)[:, 0].tolist() == [0, 1]


def test_scores_that_are_not_finite_or_of_wrong_shape_are_named() -> None:
    with pytest.raises(PoloptError, match="reward 'b' of completion 1 is nan"):
        check_scores([[1, 2], [3, float("nan")]], 2, ("a", "b"), "data:x")
    with pytest.raises(PoloptError, match=r"shape \(3,\), expected \(3, 1\)"):
        check_scores([1, 2, 3], 3, ("a",), "data:x")
    with pytest.raises(PoloptError, match="not numbers"):
        check_scores([["x"]], 1, ("a",), "data:x")


def test_presets_follow_what_a_method_is_made_of() -> None:
    from polopt.registry import get_method
    from polopt.tasks.text_presets import COMPLETIONS, RATE

    task = TextTask("text:spell_backward")
    rates = {}
    for name in ("grpo", "rloo", "dapo", "cispo", "ppo-lm", "reinforce-baseline"):
        method = get_method(name)
        found = task.preset(method)
        assert found["collect.prompts"] * found.get("sampler.group_size", 1) == COMPLETIONS
        assert ("sampler.group_size" in found) == (method.sampler.group_size > 1)  # type: ignore[attr-defined]
        assert found["threads"] == 1
        rates[name] = found["updates.policy.rule.lr"]
    assert rates["grpo"] == rates["rloo"] == rates["dapo"] == rates["ppo-lm"] == RATE  # one step, or up to four cut ones
    assert rates["cispo"] == RATE / 4  # four steps, and nothing cuts their gradient


def test_options_of_a_task_are_read_from_its_file() -> None:
    found = TextTask("text:spell_backward").option_fields()
    assert found["max_word_len"][0] == 10
    assert found["eval_items"] == (256, "held-out items")
    assert "size" not in found
    config = _table()["chain_sum"]
    import importlib

    real = {f.name: f.default for f in fields(getattr(importlib.import_module(config[0]), config[1]))}
    assert _config_defaults("chain_sum") == real
