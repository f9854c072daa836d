"""Every actor-critic of the registry: finite losses and gradients on any transitions, one of them or many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.batch import Batch, Clock
from polopt.evidence.proof.actors import acts, networks
from polopt.method import Method
from polopt.part import Can
from polopt.registry import all_methods

METHODS = {n: m for n, m in all_methods().items() if acts(m)}


def made(method: Method, n: int, scale: float, paid: str, ends: str, edge: bool, seed: int, dtype: torch.dtype) -> Batch:
    g = torch.Generator().manual_seed(seed)
    if Can.ENUMERATE in method.requires():
        action = torch.randint(0, 4, (n, 1), generator=g)
    else:
        action = torch.rand(n, 1, 2, generator=g, dtype=torch.float64).to(dtype) * 2 - 1
        action = action.sign() if edge else action
    reward = {
        "equal": torch.ones(n, 1, 1),
        "random": torch.randn(n, 1, 1, generator=g),
        "huge": 1e6 * torch.randn(n, 1, 1, generator=g),
    }
    flags = {"none": torch.zeros(n, 1), "all": torch.ones(n, 1), "some": (torch.rand(n, 1, generator=g) < 0.5).float()}
    return Batch(
        mask=torch.ones(n, 1, dtype=torch.bool), reward=reward[paid].to(dtype), terminated=flags[ends].bool(),
        truncated=torch.zeros(n, 1, dtype=torch.bool), action=action, row={"steps": torch.ones(n, dtype=dtype)},
        obs=(scale * torch.randn(n, 1, 3, generator=g)).to(dtype), next_obs=(scale * torch.randn(n, 1, 3, generator=g)).to(dtype),
        clock=Clock(1, 0.5),
    )  # fmt: skip


@pytest.mark.identity(
    *METHODS, "losses and gradients are finite on any transitions: one or many, equal or huge rewards, actions at bounds"
)
@pytest.mark.parametrize("name", sorted(METHODS))
@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 5), st.sampled_from([0.0, 1.0, 1e3]), st.sampled_from(["equal", "random", "huge"]),
    st.sampled_from(["none", "all", "some"]), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_losses_and_gradients_are_finite(name: str, n: int, scale: float, paid: str, ends: str, edge: bool, seed: int) -> None:
    method = METHODS[name]
    policy = networks(method).float()
    batch, memory = made(method, n, scale, paid, ends, edge, seed, torch.float32), method.memory()
    for slot, part in method.parts().items():
        if hasattr(part, "build"):
            memory.built[slot] = part.build({"obs": batch.obs[:, 0], "action": batch.action[:, 0]}, policy.standardised)
    for update in method.updates:
        loss, info = method.loss(batch, memory, update=update.name, nets=policy, rng=torch.Generator().manual_seed(seed))
        batch = batch.adding({k: v for k, v in info.items() if k.endswith("@drawn")})
        assert bool(loss.isfinite()), update.name
        assert all(bool(v.isfinite().all()) for v in info.values())
        named = {f"{net}.{k}": p for net in update.trains for k, p in policy.nets()[net].named_parameters()}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (where, _), g in zip(named.items(), found, strict=True):
            assert g is None or bool(g.isfinite().all()), f"{update.name}: {where}"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_half_precision_is_finite(name: str) -> None:
    method = METHODS[name]
    if any(hasattr(p, "build") for p in method.parts().values()):
        pytest.skip("searches its data on the host, in double precision")
    policy = networks(method).to(torch.bfloat16)
    batch = made(method, 4, 1.0, "random", "some", False, 0, torch.bfloat16)
    for update in method.updates:
        loss, info = method.loss(batch, update=update.name, nets=policy, rng=torch.Generator().manual_seed(0))
        batch = batch.adding({k: v for k, v in info.items() if k.endswith("@drawn")})
        assert bool(loss.isfinite())


def test_a_reward_that_is_not_finite_is_refused() -> None:
    from polopt.errors import CallError

    method = METHODS["td3"]
    batch = made(method, 3, 1.0, "random", "some", False, 0, torch.float32)
    bad = replace(batch, reward=torch.full_like(batch.reward, torch.nan))
    with pytest.raises(CallError, match="not finite"):
        method.loss(bad, nets=networks(method).float())
