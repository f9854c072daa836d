"""Presets: they fit every method, follow what a method is made of, and are only fields that it has."""

import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from polopt.errors import CallError
from polopt.overrides import resolve
from polopt.registry import all_methods, get_method
from polopt.tasks.gym_presets import FAMILIES, preset, style_of

ENVS = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "HalfCheetah-v5", "FrozenLake-v1"]


@pytest.mark.parametrize("env", ENVS)
def test_every_method_takes_its_preset_or_is_refused_for_another_reason(env: str) -> None:
    taken, refused = 0, []
    for name, method in all_methods().items():
        try:
            found = resolve(name, f"gym:{env}")
        except CallError as error:
            refused.append(str(error))
            continue
        taken += 1
        assert {p for p, o in found.origin.items() if o == "task"} >= {k for k in preset(env, method) if "collect" in k}
        assert found.settings.threads == 1
    assert taken >= 8
    assert all("which gym" in message for message in refused)  # a capability that control tasks do not offer


def test_style_follows_parts_not_names() -> None:
    ppo = get_method("ppo")
    assert style_of(ppo) == "reuse"
    assert style_of(ppo.but("mine", epochs=1, minibatch=None)) == "online"
    assert style_of(get_method("trpo")) == "trust"
    assert style_of(get_method("a2c")) == "online"
    assert style_of(get_method("reinforce")) == style_of(get_method("grpo")) == "episodes"
    assert preset("CartPole-v1", ppo) == preset("CartPole-v1", ppo.but("renamed"))


def test_families_cover_what_they_name() -> None:
    import gymnasium as gym

    for pattern in FAMILIES:
        assert pattern.startswith("LunarLander") or any(fnmatchcase(k, pattern) for k in gym.registry), pattern


def test_making_mujoco_environments_prints_and_writes_nothing(tmp_path: Path) -> None:
    code = "from polopt.tasks.gym import GymTask; GymTask('gym:HalfCheetah-v5').make()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
    assert not list(tmp_path.iterdir())
