"""Saving in the middle of episodes and continuing elsewhere gives the same numbers, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from collect.toy_envs import register

from polopt.batch import Batch, Clock
from polopt.collect.vector import VectorCollector
from polopt.interfaces import Request
from polopt.policies.mlp import build
from polopt.settings import CollectSettings, PolicySettings, Settings
from polopt.tasks.gym import GymTask
from polopt.tree import load_tree, save_tree

register()
ENVS = [
    "CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "FrozenLake-v1", "Taxi-v4",
    "CliffWalking-v1", "HalfCheetah-v5", "Hopper-v5", "Ant-v5", "Reacher-v5", "InvertedPendulum-v5", "Swimmer-v5",
]  # fmt: skip


def make(env: str, how: str = "sync", steps: int = 23, whole: bool = False, **options: Any) -> VectorCollector:
    task = GymTask(f"gym:{env}", options)
    settings = Settings(
        collect=CollectSettings(envs=3, steps=steps, vectorize=how),  # type: ignore[arg-type]
        policy=PolicySettings(hidden=(8,), normalize_obs=True, normalize_reward=True),
    )
    return VectorCollector(task, build(task, settings, (), 0), settings, whole, 0)


def ask(collector: VectorCollector) -> Batch:
    batch = collector.answer([Request(i) for i in collector.draw(3)], clock=Clock())
    collector.policy.remember(batch)
    return batch


def resumed(old: VectorCollector, new: VectorCollector, folder: Path) -> VectorCollector:
    save_tree(folder, {"collector": old.state(), "policy": old.policy.state()}, {})
    tree, _ = load_tree(folder)
    new.policy.load(tree["policy"])
    new.load(tree["collector"])
    return new


def same(a: Batch, b: Batch) -> None:
    for name in ("mask", "obs", "action", "reward", "terminated", "truncated"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.final.obs, b.final.obs)  # type: ignore[union-attr]
    assert torch.equal(a.stats["logp@behaviour"], b.stats["logp@behaviour"])


@pytest.mark.parametrize("env", ENVS)
def test_running_environments_continue_bit_for_bit(env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings where it runs
    options = {} if env.startswith(("Frozen", "Cliff")) else {"max_episode_steps": 60}
    old = make(env, **options)
    for _ in range(2):
        ask(old)
    new = resumed(old, make(env, **options), tmp_path / "c")
    assert new.exact
    old.report()
    for _ in range(4):  # over ends and resets
        same(ask(old), ask(new))
        assert old.report() == new.report()
    for c in (old, new):
        c.close()


def test_native_vector_form_continues_bit_for_bit(tmp_path: Path) -> None:
    old = make("CartPole-v1", "native")
    for _ in range(3):
        ask(old)
    new = resumed(old, make("CartPole-v1", "native"), tmp_path / "c")
    assert new.exact
    for _ in range(6):
        same(ask(old), ask(new))


def test_whole_episodes_continue_bit_for_bit(tmp_path: Path) -> None:
    old = make("FrozenLake-v1", whole=True)
    ask(old)
    new = resumed(old, make("FrozenLake-v1", whole=True), tmp_path / "c")
    for _ in range(3):
        same(ask(old), ask(new))


def test_nothing_started_is_saved_as_such(tmp_path: Path) -> None:
    new = resumed(make("CartPole-v1"), make("CartPole-v1"), tmp_path / "c")
    same(ask(make("CartPole-v1")), ask(new))


def test_what_cannot_be_saved_starts_anew_and_says_so(tmp_path: Path) -> None:
    old = make("toy/Mixed-v0")
    ask(old)
    assert old.state()["envs"] is None
    assert old.exact
    new = resumed(old, make("toy/Mixed-v0"), tmp_path / "c")
    assert not new.exact
    assert ask(new).shape == (3, 23)


def test_an_environment_may_save_itself(tmp_path: Path) -> None:
    import gymnasium as gym
    from collect.toy_envs import Counter

    class Saving(Counter):
        def save_state(self) -> dict[str, int]:
            return {"episode": self.episode, "t": self.t}

        def load_state(self, state: dict[str, int]) -> None:
            self.episode, self.t = state["episode"], state["t"]

    gym.register("toy/Saving-v0", entry_point=Saving)
    old = make("toy/Saving-v0", length=7)
    ask(old)
    new = resumed(old, make("toy/Saving-v0", length=7), tmp_path / "c")
    assert new.exact
    same(ask(old), ask(new))
    del gym.registry["toy/Saving-v0"]
