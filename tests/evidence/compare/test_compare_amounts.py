"""Budgets that no contestant could spend, or that are smaller than one update, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import polopt
from polopt.cli import main
from polopt.errors import CallError, Note
from polopt.evidence.compare.amounts import doubtful
from polopt.evidence.compare.entries import entries_of
from polopt.evidence.compare.plan import Arm, Asked, ready
from polopt.evidence.compare.run import describe
from polopt.run import Budget

CARTPOLE, LOGS, SPELL = "gym:CartPole-v1", "dataset:pendulum-logs", "text:spell_backward"


def arms(words: str, task: str, budget: str, **settings: Any) -> list[Arm]:
    return ready(Asked(tuple(entries_of(words.split())), task, (0, 1), Budget.parse(budget), settings))


def refusal(words: str, task: str, budget: str, **settings: Any) -> str:
    with pytest.raises(CallError) as error:
        arms(words, task, budget, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "task", "budget", "told", "fit"),
    [
        ("ppo a2c", CARTPOLE, "2k-tokens", "ppo: budget '2000-tokens' is never spent", "decisions, updates, seconds"),
        ("ppo", CARTPOLE, "1-tokens", "ppo: budget '1-tokens' is never spent", "decisions, updates, seconds"),
        ("ppo a2c", CARTPOLE, "50-rounds", "ppo keeps none", "decisions, updates, seconds"),
        ("iql td3-bc", LOGS, "2k-decisions", "iql learns from a dataset and makes no decisions", "updates, rounds, seconds"),
        ("ppo iql", LOGS, "2k-rounds", "ppo: budget '2000-rounds' is never spent", "updates, seconds"),
        ("a-star-po", SPELL, "2k-rounds", "a-star-po: budget '2000-rounds' is never spent", "decisions, updates, tokens, seconds"),
    ],
)
def test_a_budget_that_is_never_spent_names_who_and_what_fits(words: str, task: str, budget: str, told: str, fit: str) -> None:
    text = refusal(words, task, budget)
    assert told in text
    assert f"(units that fit all contestants: {fit})" in text
    assert "smaller" not in text


def test_it_is_refused_before_any_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["ppo", "a2c", "--task", CARTPOLE, "--budget", "2k-tokens"], ["iql", "--task", LOGS, "--budget", "20-rounds"]):
        assert main(["compare", *words]) == 2
        assert "polopt: error: " in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_rounds_of_a_dataset_come_by_the_iteration() -> None:
    told = refusal("iql td3-bc", LOGS, "99-rounds")
    assert "smaller than one update of iql, which takes 100 rounds" in told
    assert "the smallest budget that works for all contestants is 100-rounds" in told
    assert len(arms("iql td3-bc", LOGS, "100-rounds")) == 2
    assert "which takes 150 rounds" in refusal("iql td3-bc,source.rounds=150", LOGS, "100-rounds")


@pytest.mark.parametrize(
    ("envs", "start", "utd", "least"),
    # 3 decisions at once, 10 without an update: after the fourth iteration 2 rounds are due; with a quarter of a round for each
    # decision after them, the first whole one is due with the 14th decision, so after the fifth iteration
    [(3, 10, 1.0, 2), (3, 10, 0.25, 1), (4, 0, 2.0, 8), (1, 10, 1.0, 1)],
)
def test_rounds_of_a_replay_are_those_of_the_first_iteration_with_any(envs: int, start: int, utd: float, least: int) -> None:
    settings = {
        "collect.envs": envs, "collect.steps": 1, "source.start": start, "source.utd": utd, "source.batch": 4, "policy.hidden": "8",
    }  # fmt: skip
    if least > 1:
        told = refusal("td3", "gym:Pendulum-v1", f"{least - 1}-rounds", **settings)
        assert f"the smallest budget that works for all contestants is {least}-rounds" in told
    assert len(arms("td3", "gym:Pendulum-v1", f"{least}-rounds", **settings)) == 1
    done = polopt.train("td3", "gym:Pendulum-v1", budget="1-rounds", evaluate__episodes=1, overrides=settings)
    assert done.summary["rounds"] == least  # a budget of a single round makes as many


def test_an_update_of_unknown_cost_is_doubted_before_it_runs(tmp_path: Path) -> None:
    def doubt(words: str, task: str, budget: str) -> str:
        return doubtful(budget, arms(words, task, budget))

    # 32 prompts x 8 completions x 16 tokens, written once and read by one pass
    assert "less than one update of grpo (about 8,192 tokens), where" in doubt("grpo reinforce", SPELL, "8191-tokens").replace(
        ", reinforce (about 8,192 tokens)", ""
    )
    assert doubt("grpo", SPELL, "8192-tokens") == doubt("grpo", SPELL, "4096-decisions") == ""
    assert "grpo (about 4,096 decisions)" in doubt("grpo", SPELL, "4095-decisions")
    assert doubt("ppo", CARTPOLE, "1024-decisions") == ""
    told = describe(["grpo"], SPELL, budget="2k-tokens", out=tmp_path / "x")
    assert "note: the budget of 2000-tokens is probably less than one update of grpo" in told


def test_the_doubt_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from polopt.evidence.compare import run

    monkeypatch.setattr(run._Comparing, "carry_out", lambda *given, **rest: None)
    with pytest.warns(Note, match="budget of 2000-tokens is probably less than one update of grpo"):
        run.compare(["grpo"], SPELL, budget="2k-tokens", out=tmp_path / "x")
