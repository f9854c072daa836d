"""Gymnasium tasks: what is refused, and how."""

import subprocess
import sys

import pytest
from collect.toy_envs import register

from polopt.errors import CallError
from polopt.tasks.gym import GymTask

register()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym:CartPole-v11", "unknown environment 'CartPole-v11', did you mean 'CartPole-v1'"),
        ("gym:cartpole", "did you mean 'CartPole-v"),
        ("gym:zzzzzzzz", "pprint_registry"),
        ("gym:", "names no environment"),
        ("gym:nowhere/Env-v0", "unknown environment 'nowhere/Env-v0': "),
        ("gym:no_such_module:Env-v0", "no_such_module"),
    ],
)
def test_unknown_environments_are_refused_before_one_is_built(name: str, message: str) -> None:
    with pytest.raises(CallError, match=message):
        GymTask(name).check()


def test_wrong_options_name_environment_and_option() -> None:
    with pytest.raises(CallError, match=r"CartPole-v1' with options \{'gravitty': 1\}.*gravitty"):
        GymTask("gym:CartPole-v1", {"gravitty": 1}).make()


def test_options_reach_the_environment() -> None:
    assert GymTask("gym:Pendulum-v1", {"g": 3.0}).make().unwrapped.g == 3.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("env", "size", "kind", "outputs"),
    [
        ("CartPole-v1", 4, "discrete", 2),
        ("Pendulum-v1", 3, "box", 1),
        ("FrozenLake-v1", 16, "discrete", 4),
        ("toy/Mixed-v0", 5, "multidiscrete", 5),
    ],
)
def test_spaces(env: str, size: int, kind: str, outputs: int) -> None:
    observation, action = GymTask(f"gym:{env}").spaces()
    assert observation.size == size
    assert action.kind == kind
    assert (sum(action.counts) or action.size) == outputs


@pytest.mark.parametrize("env", ["toy/Dicts-v0", "Blackjack-v1"])
def test_unsupported_spaces_are_named(env: str) -> None:
    with pytest.raises(CallError, match=r"observation space (Dict|Tuple)\(.*supported are Box, Discrete"):
        GymTask(f"gym:{env}").spaces()


def test_making_a_task_imports_no_gymnasium() -> None:
    code = "import sys; from polopt.tasks.gym import GymTask; GymTask('gym:CartPole-v1'); assert 'gymnasium' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
