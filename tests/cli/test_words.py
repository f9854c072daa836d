"""How the words of a command line become settings."""

from __future__ import annotations

import pytest

from polopt.cli.words import split_settings
from polopt.errors import CallError


@pytest.mark.parametrize(
    ("words", "rest", "settings"),
    [
        ("ppo gym:X --lr 3e-4", "ppo gym:X", {"lr": "3e-4"}),
        ("--lr 3e-4 ppo gym:X", "ppo gym:X", {"lr": "3e-4"}),
        ("ppo --lr=3e-4 gym:X --out d", "ppo gym:X --out d", {"lr": "3e-4"}),
        ("ppo gym:X --policy.shared --debug", "ppo gym:X --debug", {"policy.shared": "true"}),
        ("ppo gym:X --policy.log_std -0.5", "ppo gym:X", {"policy.log_std": "-0.5"}),
        ("ppo gym:X --policy.shared --seed 3", "ppo gym:X", {"policy.shared": "true", "seed": "3"}),
        ("ppo gym:X --out=d --dry-run", "ppo gym:X --out=d --dry-run", {}),
        ("ppo gym:X -h", "ppo gym:X -h", {}),
        ("ppo gym:X --options.reward=a=b", "ppo gym:X", {"options.reward": "a=b"}),
    ],
)
def test_split(words, rest, settings):
    assert split_settings(["train", *words.split()]) == (["train", *rest.split()], settings)


def test_only_train_has_settings():
    assert split_settings(["eval", "RUN", "--episodes", "3"]) == (["eval", "RUN", "--episodes", "3"], {})


def test_a_setting_given_twice_is_refused():
    with pytest.raises(CallError, match="--lr is given twice: 1 and 2"):
        split_settings(["train", "--lr", "1", "--lr=2"])
