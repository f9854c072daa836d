"""The same loop and methods on one CUDA GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import polopt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["grpo", "ppo-lm"])
def test_text(method: str, dtype: str) -> None:
    small: dict[str, Any] = {"collect.prompts": 4, "evaluate.episodes": 4, "policy.dtype": dtype}
    run = polopt.train(method, "text:spell_backward", budget="2-updates", out=False, overrides={**small, "device": "cuda"})
    assert run.summary["updates"] == 2


@pytest.mark.parametrize("method", ["ppo", "trpo", "a2c", "reinforce"])
def test_control(method: str) -> None:
    small: dict[str, Any] = {"collect.envs": 2, "evaluate.episodes": 2, "optim.compile": "never"}
    run = polopt.train(method, "gym:CartPole-v1", budget="2-updates", out=False, overrides={**small, "device": "cuda"})
    assert run.summary["updates"] == 2
