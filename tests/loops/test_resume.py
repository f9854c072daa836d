"""A run that stops and resumes gives the same numbers, bit for bit, as one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import StopAt, metrics

import polopt
from polopt.errors import PoloptError
from polopt.run import RunFolder
from polopt.tree import load_tree

CONTROL = {"collect.envs": 2, "collect.steps": 16, "policy.hidden": (8,), "evaluate.episodes": 2, "threads": 1}
TEXT = {"collect.prompts": 3, "collect.max_new_tokens": 6, "evaluate.episodes": 4, "threads": 1}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo-cartpole": ("ppo", "gym:CartPole-v1", {**CONTROL, "minibatch": 8, "epochs": 2}),
    "ppo-cheetah": ("ppo", "gym:HalfCheetah-v5", {**CONTROL, "policy.normalize_obs": True, "policy.normalize_reward": True}),
    "trpo-pendulum": ("trpo", "gym:Pendulum-v1", CONTROL),
    "reinforce-cartpole": ("reinforce", "gym:CartPole-v1", {**CONTROL, "collect.episodes": 2}),
    "grpo-text": ("grpo", "text:spell_backward", {**TEXT, "group_size": 2}),
    "dapo-text": ("dapo", "text:spell_backward", {**TEXT, "group_size": 2, "sampler.max_rounds": 2}),
    "ppo-lm-text": ("ppo-lm", "text:spell_backward", TEXT),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_equals_uninterrupted_run(name: str, tmp_path: Path) -> None:
    method, task, settings = RUNS[name]
    whole = polopt.train(method, task, budget="4-updates", out=tmp_path / "whole", **{"overrides": settings})
    part = polopt.train(method, task, budget="4-updates", out=tmp_path / "part", observers=[StopAt(2)], **{"overrides": settings})
    assert part.summary["status"] == "interrupted"
    assert part.summary["updates"] == 2
    resumed = polopt.resume(tmp_path / "part")
    assert resumed.summary["status"] == "done"
    assert resumed.summary["exact_resume"]
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    ours, theirs = (load_tree(RunFolder(tmp_path / n).newest())[0]["policy"] for n in ("part", "whole"))  # type: ignore[arg-type]
    assert_same(ours, theirs)
    assert resumed.summary["eval_score"] == whole.summary["eval_score"]


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_a_longer_budget_continues(tmp_path: Path) -> None:
    polopt.train("ppo", "gym:CartPole-v1", budget="2-updates", out=tmp_path / "run", overrides=CONTROL)
    more = polopt.resume(tmp_path / "run", budget="3-updates")
    assert more.summary["updates"] == 3
    assert [m["update"] for m in metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_smaller_budget_ends_with_a_score_of_the_present_policy(tmp_path: Path) -> None:
    settings = {**CONTROL, "collect.steps": 128, "updates.policy.rule.lr": 0.01}
    part = polopt.train(
        "ppo", "gym:CartPole-v1", budget="9-updates", out=tmp_path / "run", observers=[StopAt(6)], overrides=settings
    )
    assert part.summary["eval_score"] == part.summary["eval_score_initial"]
    done = polopt.resume(tmp_path / "run", budget="3-updates")
    assert (done.summary["status"], done.summary["updates"]) == ("done", 6)
    assert done.summary["eval_score"] == polopt.evaluate(tmp_path / "run", which="last")["score"]
    assert done.summary["eval_score"] != part.summary["eval_score"]


def test_a_trust_region_refuses_layers_that_another_update_trains(tmp_path: Path) -> None:
    with pytest.raises(polopt.CallError, match=r"update 'critic' trains the same layers; use policy\.shared = false"):
        polopt.train("trpo", "gym:CartPole-v1", out=tmp_path / "run", overrides={**CONTROL, "policy.shared": True})
    assert not (tmp_path / "run").exists()


@pytest.fixture
def done(tmp_path: Path) -> RunFolder:
    polopt.train("ppo", "gym:CartPole-v1", budget="3-updates", out=tmp_path / "run", overrides={**CONTROL, "checkpoint.every": 1})
    return RunFolder(tmp_path / "run")


def test_a_truncated_checkpoint_is_named(done: RunFolder) -> None:
    newest = done.newest()
    assert newest is not None
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(PoloptError, match=r"tensors\.safetensors is damaged"):
        polopt.resume(done.path)


def test_a_checkpoint_of_another_method_is_refused(done: RunFolder, tmp_path: Path) -> None:
    other = polopt.train("a2c", "gym:CartPole-v1", budget="1-updates", out=tmp_path / "other", overrides=CONTROL)
    assert other.folder is not None
    newest = done.newest()
    assert newest is not None
    found = RunFolder(other.folder).newest()
    assert found is not None
    target = other.folder / "checkpoints" / "update-000000999"
    newest.rename(target)
    with pytest.raises(PoloptError, match="written by method 'ppo', this run has method 'a2c'"):
        polopt.resume(other.folder)


def test_a_checkpoint_of_another_format_is_refused(done: RunFolder) -> None:
    newest = done.newest()
    assert newest is not None
    document = json.loads((newest / "tree.json").read_text())
    document["meta"]["format"] = 99
    (newest / "tree.json").write_text(json.dumps(document))
    with pytest.raises(PoloptError, match="format 99"):
        polopt.resume(done.path)


def test_a_full_disk_leaves_the_last_checkpoint(done: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = done.newest()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(PoloptError, match=r"No space left on device; the last checkpoint .* is intact"):
        polopt.resume(done.path, budget="5-updates")
    assert done.newest() == before
    assert not list(done.checkpoints.glob(".tmp-*"))
    monkeypatch.undo()
    assert polopt.resume(done.path).summary["updates"] == 5


def test_a_run_without_checkpoint_starts_again(tmp_path: Path) -> None:
    overrides = {**CONTROL, "budget": "2-updates"}
    first = polopt.train("ppo", "gym:CartPole-v1", out=tmp_path / "run", overrides=overrides)
    import shutil

    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again = polopt.resume(tmp_path / "run")
    assert again.summary["eval_score"] == first.summary["eval_score"]
    assert [m["update"] for m in metrics(tmp_path / "run")] == [1, 2]
