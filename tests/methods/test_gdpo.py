"""GDPO: which rewards stay apart, what scales and weights do, and groups or rewards in which nothing differs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError, MissingStatistic
from polopt.part import Can
from polopt.parts.advantage.decoupled import Decoupled
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.reward.conditioned import Conditioned
from polopt.parts.sampler.fresh import Fresh
from polopt.registry import get_method

torch.set_num_threads(1)
F64 = torch.float64
HALF = math.sqrt(0.5)


def of_rows(rewards: Tensor, group: list[int] | Tensor, lengths: list[int] | None = None) -> Batch:
    """Rows with these rewards [B,K] at their last decision."""
    b = len(rewards)
    n = torch.tensor(lengths or [2] * b)
    t = torch.arange(max(1, int(n.max())))
    mask, last = t < n[:, None], t == n[:, None] - 1
    return Batch.of(reward=last[..., None] * rewards.to(F64)[:, None], mask=mask, group=torch.as_tensor(group))


def random_rows(seed: int, channels: int, groups: int = 5, *, graded: bool = True) -> Batch:
    rng = np.random.default_rng(seed)
    group = np.concatenate([[g] * int(rng.integers(2, 6)) for g in range(groups)])
    rewards = rng.normal(size=(len(group), channels)) if graded else rng.integers(0, 2, (len(group), channels))
    return of_rows(torch.tensor(rewards), torch.tensor(group), rng.integers(1, 5, len(group)).tolist())


def first(part: Decoupled | GroupBaseline, batch: Batch) -> Tensor:
    return part(batch)[:, 0]


def test_formula() -> None:
    """Steps 1 to 3 with loops."""
    batch = random_rows(3, 3)
    assert batch.reward is not None
    assert batch.group is not None
    r, g = batch.reward.sum(1).numpy(), batch.group.numpy()
    s = np.zeros(len(g))
    for n, w in enumerate((1.0, 2.0, 0.5)):
        for i in range(len(g)):
            mine = r[g == g[i], n]
            s[i] += w * (r[i, n] - mine.mean()) / (mine.std(ddof=1) + 1e-4)
    expected = (s - s.mean()) / (s.std(ddof=1) + 1e-4)
    found = Decoupled(weights=(1.0, 2.0, 0.5))(batch)
    np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(found, torch.where(batch.mask, found[:, :1], 0.0))


@pytest.mark.identity("gdpo", "pairs with two 0/1 rewards: GRPO gives all totals that differ +-0.707, GDPO tells two from one")
def test_pairs_of_two_rewards() -> None:
    pairs = {"0 against 1": ((0, 0), (0, 1)), "0 against 2": ((0, 0), (1, 1)), "1 against 2": ((1, 0), (1, 1))}
    sums = {"0 against 1": HALF, "0 against 2": 2 * HALF, "1 against 2": HALF}
    for name, (a, b) in pairs.items():
        batch = of_rows(torch.tensor([a, b]), [0, 0])
        assert first(GroupBaseline(eps=0.0), batch).tolist() == pytest.approx([-HALF, HALF])
        assert first(Decoupled(over="none", eps=0.0), batch).tolist() == pytest.approx([-sums[name], sums[name]])


@pytest.mark.identity("gdpo", "grpo", "with one reward it is GRPO; with copies of it, a positive affine image of GRPO")
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), copies=st.integers(2, 4))
def test_one_reward_is_grpo(seed: int, copies: int) -> None:
    batch = random_rows(seed, 1)
    assert batch.reward is not None
    plain = GroupBaseline()(batch)
    assert torch.equal(Decoupled()(batch), plain)
    many = replace(batch, reward=batch.reward.expand(-1, -1, copies))
    x, y = plain[:, 0], first(Decoupled(), many)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope > 0
    torch.testing.assert_close(y - y.mean(), slope * (x - x.mean()), atol=1e-9, rtol=1e-9)


@pytest.mark.identity("gdpo", "a reward multiplied by c > 0 changes nothing (eps = 0); GRPO's advantages change")
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), c=st.floats(0.01, 100).filter(lambda c: abs(c - 1) > 0.1))
def test_scale_of_a_reward(seed: int, c: float) -> None:
    batch = random_rows(seed, 2)
    assert batch.reward is not None
    scaled = replace(batch, reward=batch.reward * torch.tensor([1.0, c], dtype=F64))
    torch.testing.assert_close(Decoupled(eps=0.0)(scaled), Decoupled(eps=0.0)(batch), atol=1e-9, rtol=1e-7)
    assert float((GroupBaseline()(scaled) - GroupBaseline()(batch)).abs().max()) > 1e-6


@pytest.mark.identity("gdpo", "over the batch the advantages have mean 0 and deviation 1, for any number of rewards")
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 6), over=st.sampled_from(["rows", "decisions"]))
def test_size_does_not_grow_with_rewards(seed: int, channels: int, over: str) -> None:
    batch = random_rows(seed, channels)
    found = Decoupled(over=over)(batch)  # type: ignore[arg-type]
    x = found[:, 0] if over == "rows" else found[batch.mask]
    assert float(x.mean()) == pytest.approx(0.0, abs=1e-10)
    assert float(x.std()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.identity("gdpo", "grpo", "over all patterns of 0/1 rewards there are never fewer distinct advantages than GRPO's")
@pytest.mark.parametrize("channels", [2, 3])
def test_distinct_advantages(channels: int) -> None:
    """Groups of 4: every pattern is a group."""
    patterns = torch.tensor(list(itertools.product((0, 1), repeat=4 * channels))).reshape(-1, channels)
    batch = of_rows(patterns, torch.arange(len(patterns)) // 4, [1] * len(patterns))
    counts = {}
    for name, part in (("grpo", GroupBaseline(eps=0.0)), ("gdpo", Decoupled(over="none", eps=0.0))):
        counts[name] = len(np.unique(np.round(first(part, batch).numpy(), 9)))
    assert counts["gdpo"] > counts["grpo"]
    whole = len(np.unique(np.round(first(Decoupled(eps=0.0), batch).numpy(), 9)))
    assert whole == counts["gdpo"]


def test_weights_set_relative_importance() -> None:
    """Weight 0 removes a reward; GRPO's sum is ruled by the reward of larger scale, GDPO's by its weight."""
    batch = random_rows(5, 2)
    assert batch.reward is not None
    alone = replace(batch, reward=batch.reward * torch.tensor([1.0, 0.0], dtype=F64))
    torch.testing.assert_close(Decoupled(weights=(1.0, 0.0))(batch), Decoupled()(alone), atol=1e-12, rtol=1e-12)
    assert float((Decoupled(weights=(1.0, 3.0))(batch) - Decoupled()(batch)).abs().max()) > 0.05
    with pytest.raises(CallError, match=r"advantage\.weights has 3 entries, but there are 2 rewards"):
        Decoupled(weights=(1.0, 1.0, 1.0))(batch)


# -------------------------------------------------------------------- edges
def test_a_constant_reward_counts_nothing_and_others_do() -> None:
    both = of_rows(torch.tensor([[0.3, 1], [0.3, 0], [0.3, 1], [0.3, 0]]), [0, 0, 1, 1])
    assert first(Decoupled(over="none", eps=0.0), both).tolist() == pytest.approx([HALF, -HALF, HALF, -HALF])
    whole = first(Decoupled(dead="zero", eps=0.0), both)  # +-HALF over its deviation, sqrt(2/3): no group is dead
    assert whole.tolist() == pytest.approx([math.sqrt(0.75) * x for x in (1, -1, 1, -1)])


@pytest.mark.parametrize("dead", ["centre", "zero"])
def test_groups_without_differences(dead: str) -> None:
    """Over rows the sums of every group cancel; over decisions a long good answer moves the mean, and with it the dead group."""
    rewards = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    part = Decoupled(dead=dead)  # type: ignore[arg-type]
    assert first(part, of_rows(rewards, [0, 0, 1, 1, 1]))[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    two_groups = of_rows(rewards, [0, 0, 1, 1, 1], [1, 1, 4, 1, 1])
    found = part.but(over="decisions")(two_groups)
    assert (float(found[0, 0]) < -0.1) if dead == "centre" else (float(found[0, 0]) == 0.0)
    assert float(found[2, 0]) > 0
    assert torch.equal(part.but(over="decisions", dead="centre")(two_groups), Decoupled(over="decisions")(two_groups))
    for over in ("rows", "decisions"):
        padded = part.but(over=over)(two_groups)
        assert padded.shape == (5, 4)
        assert padded[~two_groups.mask].tolist() == [0.0] * 12


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_nothing_differs_at_all(eps: float) -> None:
    part = Decoupled(eps=eps)
    for rewards in (torch.full((4, 2), 0.3), torch.zeros(4, 3)):
        assert float(part(of_rows(rewards, [0, 0, 1, 1])).abs().sum()) == 0.0
    lonely = of_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [0, 1])
    assert float(part(lonely).abs().sum()) == 0.0
    opposed = of_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [0, 0])  # sums 0 and 0: the batch has no deviation
    assert float(part(opposed).abs().sum()) == 0.0


def test_rows_without_decisions_do_not_count() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.2, 0.1], [9.0, 9.0]])
    found = Decoupled()(of_rows(rewards, [0, 0, 1, 1, 1], [1, 2, 2, 1, 0]))
    torch.testing.assert_close(found[:4], Decoupled()(of_rows(rewards[:4], [0, 0, 1, 1], [1, 2, 2, 1])), atol=1e-14, rtol=0)
    assert float(found[4].abs().sum()) == 0.0


def test_a_missing_reward_is_refused() -> None:
    batch = of_rows(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), [0, 0])
    with pytest.raises(CallError, match="is not finite"):
        get_method("gdpo").advantages(batch)
    with pytest.raises(CallError, match="at least 2 samples"):
        get_method("gdpo").but("x", sampler=Fresh(group_size=1))
    with pytest.raises(MissingStatistic, match="reward="):
        Decoupled()(Batch.of(mask=torch.ones(2, 2), logp=torch.zeros(2, 2), group=[0, 0]))


def test_conditioned_rewards() -> None:
    """Two easy rewards are granted where the hard one, summed over the row, reaches 1."""
    reward = torch.tensor([[[0.5, 1, 0], [0.5, 0, 1]], [[0.0, 1, 1], [0.9, 1, 1]]], dtype=F64)
    batch = Batch.of(reward=reward, mask=torch.ones(2, 2), group=[0, 0])
    found = Conditioned(hard=0, threshold=1.0)(batch)
    assert torch.equal(found[0], reward[0])
    assert found[1].tolist() == [[0.0, 0.0, 0.0], [0.9, 0.0, 0.0]]
    assert torch.equal(Conditioned(hard=1, threshold=2.0)(batch)[1], reward[1])
    with pytest.raises(CallError, match=r"reward\.hard = 3, but there are 3 reward channels"):
        Conditioned(hard=3)(batch)
    with pytest.raises(MissingStatistic, match="reward="):
        Conditioned()(replace(batch, reward=None))
    assert Conditioned().requires == {Can.EPISODES}
    exact = replace(batch, reward=torch.tensor([[[1.0, 3], [0, 4]], [[1.25, 5], [-0.5, 6]]], dtype=F64))
    assert Conditioned()(exact)[..., 1].tolist() == [[3.0, 4.0], [0.0, 0.0]]  # channel 0 by default, from 1 on
    with pytest.raises(CallError, match=r"reward\.hard = 2, but there are 2 reward channels"):
        Conditioned(hard=2)(exact)
    assert torch.equal(Conditioned(hard=2, threshold=-9.0)(batch), reward)  # the last channel is one
    method = get_method("gdpo").but("x", reward=Conditioned())
    assert float((method.advantages(batch) - get_method("gdpo").advantages(batch)).abs().max()) > 0.1
