"""The Python face: lazy names, train, load, resume, and configuration files that repeat a run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import polopt
from polopt import api
from polopt.config import dump_config, load_config, save_config
from polopt.loops import drive
from polopt.overrides import Layer, resolve
from polopt.part import Can
from polopt.parts.surrogate.clip import Clip
from polopt.registry import all_methods
from polopt.run import RunFolder

TASK = "gym:CartPole-v1"
SMALL = {"collect__envs": 2, "collect__steps": 16, "minibatch": 16, "epochs": 1, "evaluate__episodes": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# -------------------------------------------------------------------- names
def test_importing_polopt_is_light_and_every_name_is_there():
    code = "import polopt, sys; print('torch' in sys.modules); print(len([getattr(polopt, n) for n in polopt.__all__]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "False"
    assert int(out[1]) == len(polopt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        polopt.trian  # noqa: B018


def test_functions_are_not_shadowed_by_submodules_of_the_same_name():
    import polopt.method
    import polopt.methods
    from polopt.method import Method

    assert isinstance(polopt.method("PPO"), Method)
    assert polopt.methods()["grpo"] is polopt.method("grpo")
    names = list(polopt.methods())
    assert names.index("ppo") < names.index("grpo")


def test_explain_and_diff_take_values():
    mine = polopt.method("grpo").but("mine", surrogate=Clip(low=0.1, high=0.3), doc="Mine.")
    assert "surrogate.high: 0.2 -> 0.3" in polopt.explain(mine)
    assert "-> grpo -> mine" in polopt.explain(mine)
    assert polopt.diff("grpo", mine).splitlines()[1:3] == ["  surrogate.low: 0.2 -> 0.1", "  surrogate.high: 0.2 -> 0.3"]
    with pytest.raises(polopt.CallError, match="got int"):
        polopt.explain(3)


def test_diff_counts_every_part_and_setting_once():
    from polopt.catalogue import compare

    for a in ("ppo", "dapo", "trpo"):
        lines, equal = compare(polopt.method(a), polopt.method(a))
        assert lines == []
        changed, same = compare(polopt.method(a), polopt.method(a).set("lr" if a != "trpo" else "delta", 0.123))
        assert len(changed) == 1
        assert same == equal - 1


@pytest.mark.parametrize("name", list(all_methods()))
def test_every_method_explains_itself(name):
    text = polopt.explain(name)
    assert text.startswith(name)
    assert max(map(len, text.splitlines())) <= 150


# -------------------------------------------------------------------- training
def test_train_load_resume_evaluate(tmp_path):
    run = polopt.train("ppo", TASK, budget="3-updates", seed=1, out=tmp_path / "run", surrogate=Clip(0.1, 0.1), **SMALL)
    assert run.folder == tmp_path / "run"
    assert (run.summary["status"], run.summary["updates"]) == ("done", 3)
    obs = np.zeros((5, 4), dtype=np.float32)
    assert len(run.predict(obs)) == 5
    np.testing.assert_array_equal(polopt.load(run.folder, "last").predict(obs), run.predict(obs))
    assert polopt.evaluate(run.folder, 2)["episodes"] == 2
    longer = polopt.resume(run.folder, budget="4-updates")
    assert longer.summary["updates"] == 4
    with pytest.raises(polopt.CallError, match="expected best or last"):
        polopt.load(run.folder, "first")


def test_train_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = polopt.train("ppo", TASK, budget="1-updates", out=False, overrides={"lr": 0.0}, **SMALL)
    assert run.folder is None
    assert list(tmp_path.iterdir()) == []


def test_observers_see_every_update():
    seen = []

    class Observer:
        def start(self, info):
            seen.append(info["method"])

        def event(self, event):
            seen.append(event.update)

        def end(self, summary):
            seen.append(summary["status"])

    polopt.train("ppo", TASK, budget="2-updates", out=False, observers=[Observer()], **SMALL)
    assert seen == ["ppo", 1, 2, "done"]


def test_wrong_calls():
    with pytest.raises(polopt.CallError, match=r"unknown setting 'collect.env' \(call\), did you mean 'collect.envs'"):
        polopt.train("ppo", TASK, collect__env=3)
    with pytest.raises(polopt.CallError, match="expected integer"):
        polopt.train("ppo", TASK, seed="one")


def test_a_method_made_in_python_is_rebuilt_from_its_nearest_registered_ancestor(tmp_path):
    mine = polopt.method("ppo").but("mine", surrogate=Clip(0.3, 0.4), epochs=2)
    run = polopt.train(mine, TASK, budget="1-updates", out=tmp_path / "run", **SMALL)
    text = (run.folder / "config.yaml").read_text()
    assert text.splitlines()[1:3] == ["method: ppo", "name: mine"]
    assert polopt.resume(run.folder, budget="2-updates").summary["method"] == "mine"


@dataclass(frozen=True)
class Gentle(Clip):
    """A part that lives in no file of its own."""

    name = ""


Gentle.__module__ = "__main__"


def test_what_was_made_in_a_notebook_must_be_passed_again(tmp_path):
    mine = polopt.method("ppo").but("mine", surrogate=Gentle(0.3, 0.4))
    folder = polopt.train(mine, TASK, budget="1-updates", out=tmp_path / "run", lr=0.01, **SMALL).folder
    with pytest.raises(polopt.CallError, match=r"surrogate = <Gentle> .* made in Python .* polopt.resume\(RUN, method=...\)"):
        polopt.resume(folder, budget="2-updates")
    assert polopt.resume(folder, budget="2-updates", method=mine).summary["updates"] == 2
    assert load_config(folder / "config.yaml").values["updates.policy.rule.lr"] == 0.01


QUESTIONS = "".join(f'{{"prompt": "{a}{b}", "answer": "{b}{a}"}}\n' for a in "abc" for b in "de")


def rewarded(completions, **columns):
    return [float(len(c)) for c in completions]


def test_python_functions_as_rewards_of_data_tasks(tmp_path):
    (tmp_path / "q.jsonl").write_text(QUESTIONS)
    user = api._rewards_to_options({"reward": [rewarded, "exact"], "lr": 1})
    assert user == {"options.reward": [rewarded, "exact"], "lr": 1}
    assert api._rewards_to_options({"reward": Clip()}) == {"reward": Clip()}
    r = resolve("grpo", f"data:{tmp_path}/q.jsonl", user)
    assert r.task.channels == ("rewarded", "exact")
    assert f"reward: ['{__file__}:rewarded', exact]" in dump_config(r).replace("\n", " ")


def test_rewards_of_the_users_file_are_copied_into_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(QUESTIONS)
    (tmp_path / "mine.py").write_text("def brief(completions, **columns):\n    return [1.0] * len(completions)\n")
    r = resolve("grpo", "data:q.jsonl", {"options.reward": "exact,mine.py:brief", "options.weights": "1,0.5"})
    folder = RunFolder.create("run")
    save_config(r, folder)
    (tmp_path / "mine.py").unlink()
    again = drive.read_run(folder)
    assert again.task.channels == ("exact", "brief")
    assert [x.weight for x in again.task.rewards.rewards] == [1.0, 0.5]
    assert (folder.path / "files/mine.py").is_file()


# -------------------------------------------------------------------- configuration files
CASES = [
    ("grpo", "text:chain_sum", {"lr": 1e-4, "surrogate": "clip-higher", "penalty": "kl-ref,entropy", "penalty.kl-ref.coef": 0.1}),
    ("grpo", "text:chain_sum", {"penalty": None, "options.train_items": 50, "threads": None}),
    ("trpo", TASK, {"updates.critic.epochs": 3, "policy.hidden": (32, 16)}),
    ("ppo", TASK, {"checkpoint.seconds": float("inf"), "collect.stop": ["#: yes", "'"], "lr": 1.23456789e-7}),
    ("ppo", TASK, {"updates.policy.surrogate": "clip-higher"}),
    ("dapo", "text:chain_sum", {}),
]


@pytest.mark.parametrize(("method", "task", "user"), CASES)
def test_a_configuration_file_says_everything(method, task, user, tmp_path):
    r = resolve(method, task, user)
    file = tmp_path / "c.yaml"
    file.write_text(dump_config(r))
    c = load_config(file)
    again = resolve(c.method, c.task, [Layer(c.values, c.sources, listing=True)], name=c.name)
    assert again.method == r.method
    assert again.settings == r.settings
    file.write_text(dump_config(again))
    c = load_config(file)
    third = resolve(c.method, c.task, [Layer(c.values, c.sources, listing=True)], name=c.name)
    assert dump_config(third) == dump_config(again)


@pytest.mark.parametrize("name", list(all_methods()))
def test_a_listing_of_defaults_marks_nothing_as_set_by_the_user(name, tmp_path):
    class Anything:
        name, domain, offers = "anything", "text", frozenset(Can)

        def preset(self, method):
            return {"collect.envs": 3}

    r = resolve(name, Anything(), {})
    file = tmp_path / "c.yaml"
    file.write_text(dump_config(r))
    c = load_config(file)
    again = resolve(c.method, Anything(), [Layer(c.values, c.sources, listing=True)])
    assert again.method == polopt.method(name)
    assert set(again.origin.values()) == {"default", "task"}
    assert dump_config(again) == dump_config(r)
