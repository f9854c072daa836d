"""Runs of recipes on disk: resumed, killed, repeated, loaded and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from interrupted import StopAt, metrics
from stage_worlds import SMALL, built, two

import polopt
from polopt.errors import PoloptError
from polopt.evidence.proof import golden, small, survival
from polopt.recipe import Recipe, Stage
from polopt.registry import get_method
from polopt.run import RunFolder
from polopt.tree import load_tree


class StopInStages(StopAt):
    """Stops like its parent, and is told at the start which stages there are."""

    def start(self, info: Any) -> None:
        assert len(info["stages"]) == 2


RUN = {**SMALL, "surrogate.beta": 0.1, "stages.estimate.length": "3-passes"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stages") / "whole"
    polopt.train("a-star-po", "table:arms", budget="12-updates", out=place, overrides=RUN)
    return place


@pytest.mark.parametrize("update", [1, 3, 6, 7, 11])
def test_resumed_in_any_stage_it_ends_as_the_undisturbed_run(update: int, tmp_path: Path, whole: Path) -> None:
    place = tmp_path / "part"
    part = polopt.train("a-star-po", "table:arms", budget="12-updates", out=place, overrides=RUN, observers=[StopInStages(update)])
    assert part.summary["updates"] == update
    assert part.summary["stage"] == ("estimate" if update <= 6 else "train")
    resumed = polopt.resume(place)
    assert resumed.summary["status"] == "done"
    assert resumed.summary["exact_resume"]
    assert metrics(place) == metrics(whole)
    ours, theirs = (load_tree(RunFolder(p).newest())[0] for p in (place, whole))  # type: ignore[arg-type]
    for what in ("policy", "memory", "scores", "ledger"):
        assert str(ours.get(what)) == str(theirs.get(what))
    assert all(torch.equal(v, theirs["policy"][k]) for k, v in ours["policy"].items())


def test_one_folder_in_which_the_stages_are_seen(whole: Path) -> None:
    found = metrics(whole)
    assert [line["stage"] for line in found] == [1] * 6 + [2] * 6
    assert [line["update"] for line in found] == list(range(1, 13))
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["stage"], summary["stages"]) == ("train", ["estimate", "train"])
    assert summary["decisions"] == found[-1]["decisions"] == 6 * 32 + 6 * 4
    assert len({line["eval_score"] for line in found if "eval_score" in line and line["stage"] == 1}) == 1  # nothing is trained


def test_a_longer_budget_lengthens_the_last_stage(tmp_path: Path) -> None:
    polopt.train("a-star-po", "table:arms", budget="8-updates", out=tmp_path / "run", overrides=RUN)
    assert polopt.resume(tmp_path / "run", budget="12-updates").summary["updates"] == 12
    assert [line["stage"] for line in metrics(tmp_path / "run")] == [1] * 6 + [2] * 6


def test_the_configuration_repeats_the_run(tmp_path: Path, whole: Path) -> None:
    from polopt.cli import main

    assert main(["train", "--config", str(whole / "config.yaml"), "--out", str(tmp_path / "again"), "--quiet", "--no-report"]) == 0
    assert metrics(tmp_path / "again") == metrics(whole)
    assert main(["train", "a-star-po", "table:arms", "--dry-run", "--stages.estimate.group_size=4"]) == 0


def test_the_policy_of_any_stage_can_be_loaded(tmp_path: Path, whole: Path) -> None:
    assert isinstance(polopt.load(whole, "last").predict(0), list)
    assert polopt.evaluate(whole, which="last")["score"] == pytest.approx(metrics(whole)[-1]["eval_score"], abs=1e-7)
    critic = get_method("ppo-lm").but("critic", reward=())
    recipe = two(Stage("first", critic, "4-updates"), Stage("second"))
    polopt.train(recipe, "table:arms", budget="6-updates", out=tmp_path / "run", overrides=SMALL, observers=[StopInStages(3)])
    policy = polopt.load(tmp_path / "run", "last", method=recipe)
    assert set(policy.nets()) == {"policy", "value"}
    assert isinstance(policy.predict(0), list)


def test_a_checkpoint_of_another_recipe_is_refused(whole: Path) -> None:
    state = RunFolder(whole).load_checkpoint("last")
    with pytest.raises(PoloptError, match="written by method 'a-star-po', this run has 'two'"):
        built(two(Stage("only"))).load(state)
    other = get_method("a-star-po")
    assert isinstance(other, Recipe)
    with pytest.raises(PoloptError, match="stage 2, 'train', which a-star-po lacks"):
        built(Recipe(**{**vars(other), "stages": (Stage("alone"),)})).load(state)


def test_a_run_killed_by_sigkill_survives() -> None:
    found = survival.check(get_method("a-star-po"), *small.world(get_method("a-star-po")))
    assert found.ok, found.message


def test_a_golden_trajectory_goes_through_all_stages(tmp_path: Path) -> None:
    method = get_method("a-star-po")
    task, settings = small.world(method)
    kept = golden.record(method, task, settings, tmp_path / "golden.safetensors", updates=6)
    assert kept.chain[0] == kept.chain[1] != kept.chain[2]  # one pass estimates, the rest trains
    kept = golden.load(tmp_path / "golden.safetensors")
    assert golden.check(method, kept, "live").identical
    assert golden.check(method, kept, "replay").identical
    moved = method.set("stages.estimate.advantage.beta", 5.0)
    assert not golden.check(moved, kept, "replay").ok


def test_compared_at_an_equal_budget_over_all_stages(tmp_path: Path) -> None:
    polopt.compare(
        ["a-star-po", "reinforce"], "table:arms", budget="600-decisions", seeds=1, points=3, out=tmp_path / "c", jobs=1, page=False,
        overrides={"collect.prompts": 16},
    )  # fmt: skip
    spent = [json.loads(p.read_text())["decisions"] for p in (tmp_path / "c").rglob("summary.json")]
    assert len(spent) == 2
    assert all(600 <= n < 616 for n in spent), spent
