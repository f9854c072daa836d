"""PPO's adaptive KL penalty."""

from __future__ import annotations

import math

import pytest
import torch

from polopt.batch import Batch
from polopt.objective import Now
from polopt.parts.penalty.adaptive_kl import AdaptiveKL
from polopt.parts.surrogate.score import Ratio
from polopt.registry import get_method

torch.set_num_threads(1)


def test_estimate_is_unbiased_and_not_negative() -> None:
    """Enumerated over a small distribution: sum p_old ((r - 1) - log r) = KL(p_old || p)."""
    g = torch.Generator().manual_seed(0)
    old, new = (torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    part = AdaptiveKL(beta0=2.0)
    batch = Batch.of(logp=new[None], logp_old=old[None])
    loss = part(batch, Now({"logp": new[None]}), part.initial())
    assert bool((loss >= 0).all())
    kl = float((old.exp() * (old - new)).sum())
    assert math.isclose(float((old.exp() * loss[0]).sum()), 2.0 * kl, abs_tol=1e-12)


@pytest.mark.identity("ppo", "the adaptive penalty halves and doubles its weight around the target")
@pytest.mark.parametrize(("shift", "factor"), [(0.0, 0.5), (0.1, 0.5), (0.12, 1.0), (0.16, 1.0), (0.18, 2.0), (2.0, 2.0)])
def test_the_weight_follows_the_target(shift: float, factor: float) -> None:
    """Target 0.01: the estimate is about shift^2 / 2, and 0.18 gives 0.0172 > 0.015."""
    part = AdaptiveKL(target=0.01, beta0=3.0)
    old = torch.full((1, 3), -1.0, dtype=torch.float64)
    batch = Batch.of(logp_old=old, stats={"logp@stepped": old + shift}, mask=torch.tensor([[1, 1, 0]]))
    memory = part.initial()
    assert part.observe("scored", batch=batch, memory=memory) == {}
    assert float(part.observe("stepped", batch=batch, memory=memory)["beta"]) == 3.0 * factor
    empty = Batch.of(logp_old=old, stats={"logp@stepped": old}, mask=torch.zeros(1, 3))
    assert float(part.observe("stepped", batch=empty, memory=memory)["beta"]) == 3.0


def test_ppo_with_the_penalty_instead_of_the_clip() -> None:
    method = get_method("ppo").but("ppo-kl", surrogate=Ratio(), penalty=AdaptiveKL(beta0=2.0), critic=None)
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    batch = Batch.of(logp=logp, logp_old=torch.tensor([[-1.2, -1.5]]))
    memory = method.memory()
    advantage = torch.tensor([[1.0, -1.0]])
    loss, _ = method.loss(batch, memory, advantage=advantage)
    r = [math.exp(0.2), math.exp(-0.5)]
    wanted = ((-r[0] + r[1]) + 2.0 * ((r[0] - 1 - 0.2) + (r[1] - 1 + 0.5))) / 2
    assert math.isclose(loss.item(), wanted, rel_tol=1e-5)
    memory.write("penalty.kl-old-adaptive", {"beta": torch.tensor(0.0)})
    free, _ = method.loss(batch, memory, advantage=advantage)
    assert math.isclose(free.item(), (-r[0] + r[1]) / 2, rel_tol=1e-5)
