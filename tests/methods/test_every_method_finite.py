"""Every registered method: no NaN or infinity in advantage, loss or gradient, whatever mask, groups, rewards, ratios, precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt import objective
from polopt.batch import Batch
from polopt.columns import last_valid
from polopt.draws import Draws
from polopt.evidence.proof.batches import CASES
from polopt.evidence.proof.invariance import batches
from polopt.method import Method
from polopt.parts.surrogate.score import Ratio
from polopt.registry import all_methods, get_method
from polopt.stats import split
from polopt.update import Update

torch.set_num_threads(1)
#: Losses that ask networks for actions and their values are not functions of a batch's statistics.
NETWORKS = {"actor", "multiplier"}
METHODS = [n for n, m in all_methods().items() if not m.networks() and not any(NETWORKS & {*u.terms} for u in m.updates)]
ROWS, STEPS = 6, 5
HALF = (torch.float16, torch.bfloat16)


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    """What a batch may be like at worst."""
    bits = draw(st.integers(0, 2 ** (ROWS * STEPS) - 1) | st.sampled_from([0, 2**30 - 1, 1, 2**5 - 1]))
    mask = torch.tensor([bits >> i & 1 for i in range(ROWS * STEPS)]).view(ROWS, STEPS).bool()
    for row in draw(st.sets(st.integers(0, ROWS - 1), max_size=2)):
        mask[row] = False
    return {
        "mask": mask,
        "sizes": draw(st.sampled_from([(1,) * 6, (6,), (1, 5), (2, 2, 2), (1, 2, 3), (3, 3)])),
        "rewards": draw(st.sampled_from(["none", "all", "some"])),
        "ratio": draw(st.sampled_from(["on-policy", "near", "up", "down", "both", "beyond"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, *HALF])),
        "seed": draw(st.integers(0, 1000)),
    }


def changed(batch: Batch, mask: Tensor, sizes: tuple[int, ...], rewards: str, ratio: str, dtype: torch.dtype, seed: int) -> Batch:
    """The random batch in this situation; garbage outside the mask, which is repeated where rows are longer."""
    t = batch.shape[1]
    mask = mask.repeat(1, -(-t // STEPS))[:, :t]
    g = torch.Generator().manual_seed(seed)
    last = last_valid(mask)
    ends = last & (torch.rand(mask.shape, generator=g) < 0.7)
    won = {"none": torch.zeros(ROWS), "all": torch.ones(ROWS), "some": (torch.rand(ROWS, generator=g) < 0.5).float()}[rewards]
    sign = torch.where(torch.rand(mask.shape, generator=g) < 0.5, -1.0, 1.0).double()
    shift = {
        "on-policy": torch.zeros(mask.shape), "near": 0.3 * torch.randn(mask.shape, generator=g),
        "up": torch.full(mask.shape, 20.0), "down": torch.full(mask.shape, -20.0), "both": 20.0 * sign, "beyond": 300.0 * sign,
    }[ratio]  # fmt: skip
    stats = dict(batch.stats)
    for full in batch.stats:
        if full.partition("@")[0] == "logp" and not full.endswith("@old"):
            stats[full] = batch.stat("logp@old") + shift
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(0, 3, mask.shape, generator=g)].double()

    def dirty(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        spread = mask.view(*mask.shape, *[1] * (x.dim() - 2))
        return torch.where(spread, x.nan_to_num(), garbage.view(spread.shape)).to(dtype)

    reward = torch.where(last, won[:, None], 0.0)[..., None]
    out = replace(
        batch, mask=mask, terminated=ends, truncated=last & ~ends, reward=torch.where(mask[..., None], reward, torch.nan),
        stats={k: dirty(v) for k, v in stats.items()}, horizon=t,
    )  # fmt: skip
    return out.with_key("group", torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)))


def base(method: Method) -> Batch:
    """Six rows with everything that the method reads."""
    return next(b for b in batches(method, len(CASES)) if b.shape[0] == ROWS)


def finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def check(method: Method, update: Update, batch: Batch, words: str) -> None:
    memory = method.memory(batch.units.get("item", 0))
    advantage = None
    if "surrogate" in update.terms and method.slots(update).advantage is not None:
        advantage = objective.advantages(method, update, batch, memory)
        assert finite(advantage), f"{words}: advantage {advantage}"
    leaves = {k: v.detach().clone().requires_grad_() for k, v in batch.stats.items() if k.endswith("@now")}
    now = {n: leaves[f"{n}@now"] for n in split(method.needs(update)).get("now", frozenset())}
    rng = Draws(torch.Generator().manual_seed(0))
    loss, info = objective.loss(method, update, batch.adding(leaves), now, advantage, None, memory, rng)
    assert finite(loss), f"{words}: loss {float(loss)}"
    for name, value in info.items():
        assert finite(value), f"{words}: {name} = {value}"
    if not loss.requires_grad:
        return
    for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True):
        if g is None:
            continue
        assert finite(g), f"{words}: gradient in {name} {g}"
        assert float(torch.where(batch.mask.view(*batch.shape, *[1] * (g.dim() - 2)), 0.0, g.double()).abs().sum()) == 0.0, words


@pytest.mark.identity("*", "no NaN or infinity for any mask, group sizes from 1, equal rewards, ratios of e^+-20, half precision")
@pytest.mark.parametrize("name", METHODS)
def test_finite(name: str) -> None:
    method = all_methods()[name]
    plain = base(method)

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(situation=situations())
    def run(situation: dict[str, Any]) -> None:
        batch = changed(plain, **situation)
        for update in method.updates:
            check(method, update, batch, f"{name}/{update.name}")

    run()


def test_the_check_can_fail() -> None:
    """A surrogate with a ratio that nothing bounds."""

    @dataclass(frozen=True)
    class Unbounded(Ratio):
        def __call__(self, batch: Batch, now: Any, advantage: Tensor) -> Tensor:
            return -(now["logp"] - batch.stat("logp@old")).exp() * advantage

    method = get_method("reinforce").but("x", surrogate=Unbounded())
    mask = torch.ones(ROWS, STEPS, dtype=torch.bool)
    given = {"mask": mask, "sizes": (6,), "rewards": "all", "dtype": torch.float32, "seed": 0}
    check(method, method.update(), changed(base(method), **given, ratio="near"), "near")
    with pytest.raises(AssertionError, match=r"loss -?inf"):
        check(method, method.update(), changed(base(method), **given, ratio="beyond"), "beyond")


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_half_precision_overflows_nowhere(name: str) -> None:
    """A ratio of e^20 at a negative advantage: its gradient, 5e8, is the largest number of float16 there."""
    method = get_method(name).but("x", critic=None, penalty=())
    logp = torch.tensor([[20.0, 0.0]], dtype=torch.float16).requires_grad_()
    batch = Batch.of(logp=logp, logp_old=torch.zeros(1, 2, dtype=torch.float16), reward=torch.zeros(1), group=[0])
    loss, _ = method.loss(batch, advantage=torch.tensor([[-1.0, -1.0]]))
    loss.backward()
    assert logp.grad is not None
    assert loss.dtype == torch.float32
    assert logp.grad.tolist() == [[65504.0, 0.5]]


def test_the_methods_are_all_there() -> None:
    assert {"grpo", "ppo", "trpo", "ppo-lm", "clip-cov", "bapo"} <= set(METHODS)
    left_out = set(all_methods()) - set(METHODS)
    assert all(all_methods()[n].networks() or any(NETWORKS & {*u.terms} for u in all_methods()[n].updates) for n in left_out)
