"""Losses and gradients of the language methods against those of TRL, on the same log-probabilities and advantages.

TRL's own loss code runs on a trainer without model or data: the log-probabilities are handed to it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.method import Method
from polopt.registry import get_method

pytest.importorskip("trl")
torch.set_num_threads(1)
LIMIT = 9  # tokens that an answer may have
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
#: Settings of TRL under which it should compute what a method computes.
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    "dr-grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
}


class Tokens:
    """Statistics of unequal answers in float32, off-policy by `far`."""

    def __init__(self, seed: int, far: float = 0.3, rows: int = 8, empty: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        width = LIMIT - 2
        lengths = torch.randint(1, width + 1, (rows, 1), generator=g)
        if empty:
            lengths[3] = 0
        self.mask = torch.arange(width) < lengths
        self.old = -torch.rand(rows, width, generator=g) * 3
        self.logp = self.old + far * torch.randn(rows, width, generator=g)
        self.ref = self.old + 0.2 * torch.randn(rows, width, generator=g)
        self.reward = torch.randint(0, 3, (rows,), generator=g).float() / 2
        self.group = torch.arange(rows) // 4

    def batch(self) -> tuple[Batch, Tensor]:
        """The batch and the leaf that the loss depends on."""
        leaf = self.logp.clone().requires_grad_()
        return Batch.of(
            logp=leaf, logp_old=self.old, logp_ref=self.ref, reward=self.reward, group=self.group, mask=self.mask, horizon=LIMIT
        ), leaf


def stub(trainer: type, config: Any, logps: Tensor) -> Any:
    """A trainer with settings alone, whose model gives these log-probabilities."""
    found: Any = object.__new__(trainer)
    every = {
        "args": config, "beta": config.beta, "epsilon_low": config.epsilon, "max_completion_length": LIMIT,
        "epsilon_high": config.epsilon if config.epsilon_high is None else config.epsilon_high,
        "loss_type": getattr(config, "loss_type", None), "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "importance_sampling_level": getattr(config, "importance_sampling_level", None), "use_vllm": False,
        "vllm_importance_sampling_correction": False, "model": SimpleNamespace(training=True), "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "accelerator": SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
    }  # fmt: skip
    for name, value in every.items():
        object.__setattr__(found, name, value)
    return found


def config(kind: type, folder: str, **given: Any) -> Any:
    return kind(output_dir=folder, report_to=[], bf16=False, use_cpu=True, per_device_train_batch_size=8, num_generations=4,
                max_completion_length=LIMIT, gradient_accumulation_steps=1, steps_per_generation=1, **given)  # fmt: skip


def inputs(tokens: Tokens, advantage: Tensor) -> dict[str, Tensor]:
    """What TRL prepares from generations; the advantage is one number per answer."""
    b, t = tokens.mask.shape
    ids, mask = torch.zeros(b, t, dtype=torch.long), tokens.mask.long()
    return {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1] * 0 + 1, "completion_ids": ids, "completion_mask": mask,
        "advantages": advantage, "old_per_token_logps": tokens.old, "ref_per_token_logps": tokens.ref,
        "old_logps": (tokens.old * mask).sum(1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def theirs(name: str, tokens: Tokens, advantage: Tensor, folder: str, **other: Any) -> tuple[Tensor, Tensor]:
    """TRL's loss and its gradient in the log-probabilities."""
    from trl import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    settings = {"beta": 0.0, "epsilon": 0.2, **SETTINGS[name], **other}
    leaf = tokens.logp.clone().requires_grad_()
    trainer = stub(GRPOTrainer, config(GRPOConfig, folder, **settings), leaf)
    loss = trainer._compute_loss(None, inputs(tokens, advantage))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def ours(method: Method, tokens: Tokens, advantage: Tensor) -> tuple[Tensor, Tensor]:
    batch, leaf = tokens.batch()
    loss, _ = method.loss(batch, advantage=advantage[:, None].expand(batch.shape))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("trl"))


def advantages(name: str, tokens: Tokens) -> Tensor:
    """One advantage per answer, as the method computes them."""
    return get_method(name).but("x", reward=()).advantages(tokens.batch()[0]).gather(1, torch.zeros(8, 1, dtype=torch.long))[:, 0]


@pytest.mark.identity(list(SETTINGS), "loss and gradient are TRL's on the same log-probabilities and advantages, to 1e-5")
@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize(("seed", "far"), [(0, 0.0), (1, 0.1), (2, 0.3), (3, 1.0)])
def test_equal_to_trl(name: str, seed: int, far: float, folder: str) -> None:
    tokens = Tokens(seed, far if name != "gspo" else far * 1e-3)
    a = advantages(name, tokens)
    assert float(a.abs().max()) > 0.4
    (mine, slope), (loss, gradient) = ours(get_method(name), tokens, a), theirs(name, tokens, a, folder)
    torch.testing.assert_close(mine, loss, **CLOSE)
    torch.testing.assert_close(slope, gradient, **CLOSE)
    assert float(gradient.abs().max()) > 1e-3
    assert float(slope[~tokens.mask].abs().sum()) == 0.0


@pytest.mark.identity("grpo", "dr-grpo", "the advantages are TRL's: group mean, sample deviation plus 1e-4; or no deviation")
@pytest.mark.parametrize(("name", "scaled"), [("grpo", True), ("dr-grpo", False)])
def test_advantages_are_trls(name: str, scaled: bool) -> None:
    """Written as TRL writes them, for groups of equal size."""
    tokens = Tokens(5)
    grouped = tokens.reward.view(-1, 4)
    expected = grouped - grouped.mean(1, keepdim=True)
    if scaled:
        expected = expected / (grouped.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages(name, tokens), expected.flatten(), **CLOSE)


@pytest.mark.identity(["grpo", "gspo", "sapo", "dr-grpo"], "where an answer is empty, TRL counts it in the mean over answers")
@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo", "dr-grpo"])
def test_empty_answers_are_the_difference(name: str, folder: str) -> None:
    """A mean over seven answers that have tokens, or over all eight."""
    tokens = Tokens(4, 1e-4 if name == "gspo" else 0.2, empty=True)
    a = torch.linspace(-1, 1, 8)
    (mine, slope), (loss, gradient) = ours(get_method(name), tokens, a), theirs(name, tokens, a, folder)
    torch.testing.assert_close(mine * 7 / 8, loss, **CLOSE)
    torch.testing.assert_close(slope * 7 / 8, gradient, **CLOSE)


@pytest.mark.identity("grpo", "TRL's default multiplies the KL term by the ratio, with gradient; the paper does not")
def test_the_ratio_before_the_kl_is_the_difference(folder: str) -> None:
    """The difference is the mean over answers of beta (r - 1) k3, in value and in gradient."""
    tokens = Tokens(1)
    a = advantages("grpo", tokens)
    leaf = tokens.logp.clone().requires_grad_()
    d = tokens.ref - leaf
    extra = torch.where(tokens.mask, 0.04 * ((leaf - tokens.old).exp() - 1) * (d.exp() - d - 1), 0.0)
    more = (extra.sum(1) / tokens.mask.sum(1)).mean()
    (more_slope,) = torch.autograd.grad(more, leaf)
    (mine, slope), (loss, gradient) = (
        ours(get_method("grpo"), tokens, a),
        theirs("grpo", tokens, a, folder, use_bias_correction_kl=True),
    )
    torch.testing.assert_close(mine + more.detach(), loss, **CLOSE)
    torch.testing.assert_close(slope + more_slope, gradient, **CLOSE)
    assert float(more_slope.abs().max()) > 1e-4


# -------------------------------------------------------------------- RLOO
def rloo(tokens: Tokens, advantage: Tensor, folder: str, epsilon: float = 0.2) -> tuple[Tensor, Tensor]:
    """TRL's RLOO: the clipped ratio of whole answers."""
    from trl import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    leaf = tokens.logp.clone().requires_grad_()
    trainer = stub(RLOOTrainer, config(RLOOConfig, folder, beta=0.0, epsilon=epsilon, epsilon_high=epsilon), leaf)
    loss = trainer._compute_loss(None, inputs(tokens, advantage))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.identity("rloo", "on-policy the gradient is TRL's; its loss has the value of a ratio, ours that of a log-probability")
@pytest.mark.parametrize("seed", range(3))
def test_rloo_on_policy(seed: int, folder: str) -> None:
    tokens = Tokens(seed, far=0.0)
    a = advantages("rloo", tokens)
    (mine, slope), (loss, gradient) = ours(get_method("rloo"), tokens, a), rloo(tokens, a, folder)
    torch.testing.assert_close(slope, gradient, **CLOSE)
    assert float(gradient.abs().max()) > 0.02
    torch.testing.assert_close(loss, -a.mean(), **CLOSE)
    torch.testing.assert_close(mine, -(a * (tokens.logp * tokens.mask).sum(1)).mean(), **CLOSE)


@pytest.mark.identity("rloo", "off-policy TRL multiplies an answer's gradient by its ratio, or by 0 where PPO's clip holds")
@pytest.mark.parametrize("seed", range(3))
def test_rloo_off_policy(seed: int, folder: str) -> None:
    tokens = Tokens(seed, far=0.3)
    a = advantages("rloo", tokens)
    _, slope = ours(get_method("rloo"), tokens, a)
    _, gradient = rloo(tokens, a, folder)
    ratio = ((tokens.logp - tokens.old) * tokens.mask).sum(1).exp()
    cut = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    assert bool(cut.any())
    torch.testing.assert_close(gradient, slope * torch.where(cut, 0.0, ratio)[:, None], **CLOSE)


@pytest.mark.identity("rloo", "the advantages are TRL's leave-one-out ones")
def test_rloo_advantages() -> None:
    """Reward minus the mean of the group's others, as TRL writes it for groups of equal size."""
    tokens = Tokens(7)
    grouped = tokens.reward.view(-1, 4)
    expected = grouped - (grouped.sum(1, keepdim=True) - grouped) / 3
    torch.testing.assert_close(advantages("rloo", tokens), expected.flatten(), **CLOSE)


def test_the_comparison_can_fail(folder: str) -> None:
    """Another bound, or other tensors, and the losses differ."""
    tokens = Tokens(2, 0.5)
    a = advantages("grpo", tokens)
    loss, _ = theirs("grpo", tokens, a, folder)
    other, _ = ours(get_method("grpo").set("surrogate.high", 0.3), tokens, a)
    assert abs(float(other - loss)) > 1e-4
    batch, _ = tokens.batch()
    moved = replace(batch, stats={**batch.stats, "logp@old": tokens.old + 0.1})
    shifted, _ = get_method("grpo").loss(moved, advantage=a[:, None].expand(batch.shape))
    assert abs(float(shifted.detach() - loss)) > 1e-4
