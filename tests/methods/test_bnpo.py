"""BNPO: the Beta density that divides, its special cases, and what groups and channels it meets at the edges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy import stats as sps
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.parts.advantage.beta_normalised import BetaNormalised, density, fitted, moments_of, normaliser
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.sampler.fresh import Fresh
from polopt.registry import get_method

torch.set_num_threads(1)
F64 = torch.float64
SEEDS = given(seed=st.integers(0, 10_000))


def answers(seed: int, prompts: int = 6, channels: int = 1, *, empty: bool = False) -> Batch:
    """0/1 rewards of groups of 2 to 6 answers, prompts of all kinds of difficulty."""
    rng = np.random.default_rng(seed)
    group = np.concatenate([[g] * int(rng.integers(2, 7)) for g in range(prompts)])
    hard = rng.uniform(0, 1, (prompts, channels))[group]
    right = (rng.uniform(size=hard.shape) < hard).astype(float)
    length = rng.integers(0 if empty else 1, 5, size=len(group))
    mask = torch.tensor(np.arange(4) < length[:, None])
    last = mask & (torch.arange(4) == torch.tensor(length - 1)[:, None])
    reward = last[..., None] * torch.tensor(right)[:, None]
    return Batch.of(reward=reward, mask=mask, group=torch.tensor(group))


def of(part: BetaNormalised, batch: Batch, memory: Mapping[str, Tensor] | None = None) -> Tensor:
    return part(batch, part.initial() if memory is None else memory)


def reference(r: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The released code for one reward and groups of several answers, with loops and SciPy's density."""
    p = {g: r[group == g].mean() for g in np.unique(group)}
    every = np.array(list(p.values()))
    m, v = every.mean(), every.var(ddof=1)
    a, b = (m * (1 - m) / v - 1) * m, (m * (1 - m) / v - 1) * (1 - m)
    alpha, beta = max(1.0, 1 + a / 3), max(1.0, 1 + b / 3)
    out = np.zeros(len(r))
    for i in range(len(r)):
        f = sps.beta.pdf(p[group[i]], alpha, beta)
        out[i] = min(1 / f if f > 0 else math.inf, 1e6) * (r[i] - p[group[i]])
    return out


@pytest.mark.identity("bnpo", "the advantages are the released code's, written out with loops")
@pytest.mark.parametrize("seed", range(10))
def test_formula(seed: int) -> None:
    batch = answers(seed)
    assert batch.group is not None
    expected = reference(batch.outcome().numpy(), batch.group.numpy())
    found = of(BetaNormalised(), batch)
    np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert float(np.abs(expected).max()) > 0.1
    assert torch.equal(found, torch.where(batch.mask, found[:, :1], 0.0))


def test_worked_numbers() -> None:
    """p = 1/4 and 3/4: m = 1/2, V = 1/8, so k = 1, a = b = 1/2 and alpha = beta = 7/6."""
    reward = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0], dtype=F64)
    batch = Batch.of(reward=reward, group=[0] * 4 + [1] * 4, mask=torch.ones(8, 1))
    mean, var = moments_of(torch.tensor([[0.25], [0.75]], dtype=F64), torch.ones(2, dtype=F64))
    assert (float(mean), float(var)) == (0.5, 0.125)
    a, b = fitted(mean, var)
    assert (float(a), float(b)) == (0.5, 0.5)
    alpha, beta = normaliser(mean, var)
    assert float(alpha) == pytest.approx(7 / 6)
    f = float(sps.beta.pdf(0.25, 7 / 6, 7 / 6))
    assert of(BetaNormalised(), batch)[:, 0].tolist() == pytest.approx(
        [x / f for x in (0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75)]
    )
    assert float(beta) == float(alpha)


@pytest.mark.identity("bnpo", "reinforce", "with alpha = beta = 1 the advantage is reward minus the prompt's mean")
@settings(max_examples=25, deadline=None)
@SEEDS
def test_flat_density_is_reinforce_with_the_mean(seed: int) -> None:
    batch = answers(seed)
    found = of(BetaNormalised(alpha=1.0, beta=1.0), batch)
    torch.testing.assert_close(found, GroupBaseline(scale="none")(batch), atol=1e-14, rtol=0)


@pytest.mark.identity("bnpo", "grpo", "with alpha = beta = 3/2 it is GRPO's advantage, with population deviations, times pi/8")
@settings(max_examples=25, deadline=None)
@SEEDS
def test_semicircle_is_grpo(seed: int) -> None:
    batch = answers(seed)
    found = of(BetaNormalised(alpha=1.5, beta=1.5), batch)
    torch.testing.assert_close(found, math.pi / 8 * GroupBaseline(ddof=0, eps=0.0)(batch), atol=1e-12, rtol=1e-10)
    p = torch.linspace(0.01, 0.99, 9, dtype=F64)
    half = torch.tensor(1.5, dtype=F64)
    torch.testing.assert_close(density(p, half, half), 8 / math.pi * (p * (1 - p)).sqrt(), atol=1e-12, rtol=1e-12)


@pytest.mark.identity("bnpo", "the advantages of a group sum to 0; prompts solved always or never have exactly none")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 3), empty=st.booleans())
def test_groups_sum_to_zero(seed: int, channels: int, empty: bool) -> None:
    batch = answers(seed, channels=channels, empty=empty)
    some = batch.mask.any(1)
    found = of(BetaNormalised(), batch).sum(1) / batch.lengths().clamp(min=1)
    scale = max(1.0, float(found.abs().max()))
    assert float(batch.pool(found, "group", "sum").abs().max()) < 1e-12 * scale
    assert bool(found.isfinite().all())
    outcome = batch.outcome()
    if channels == 1:
        dead = batch.pool(outcome, "group", "max") == batch.pool(outcome, "group", "min")
        assert float(found[dead & some].abs().sum()) == 0.0


@pytest.mark.identity("bnpo", "the density integrates to 1")
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (1.5, 1.5), (1.2, 3.0), (7.0, 1.0), (20.0, 40.0)])
def test_density_integrates_to_one(alpha: float, beta: float) -> None:
    def f(x: float) -> float:
        return float(density(torch.tensor(x, dtype=F64), torch.tensor(alpha, dtype=F64), torch.tensor(beta, dtype=F64)))

    assert integrate.quad(f, 0, 1)[0] == pytest.approx(1.0, abs=1e-6)
    assert f(0.37) == pytest.approx(sps.beta.pdf(0.37, alpha, beta), rel=1e-10)


@pytest.mark.identity("bnpo", "a and b fitted to samples of a known Beta are its parameters, within sampling error")
@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.0, 5.0), (8.0, 3.0)])
def test_fit_recovers_the_truth(a: float, b: float) -> None:
    p = torch.tensor(np.random.default_rng(1).beta(a, b, size=(40_000, 1)))
    mean, var = moments_of(p, torch.ones(40_000, dtype=F64))
    found = fitted(mean, var)
    assert float(found[0]) == pytest.approx(a, rel=0.05)
    assert float(found[1]) == pytest.approx(b, rel=0.05)


@pytest.mark.identity("bnpo", "among Beta densities the fitted one leaves the gradient the least variance")
@pytest.mark.parametrize(("a", "b"), [(0.6, 0.9), (2.0, 5.0), (4.0, 1.5)])
def test_the_fitted_density_minimises_the_variance(a: float, b: float) -> None:
    """Variance of (R - p)/f over R and p ~ Beta(a, b), by quadrature: E[p (1-p)/f^2]; any other density has more."""

    def variance(alpha: float, beta: float) -> float:
        x = (np.arange(200_000) + 0.5) / 200_000
        return float(np.mean(sps.beta.pdf(x, a, b) * x * (1 - x) / sps.beta.pdf(x, alpha, beta) ** 2))

    m, v = torch.tensor([a / (a + b)], dtype=F64), torch.tensor([a * b / ((a + b) ** 2 * (a + b + 1))], dtype=F64)
    alpha, beta = (float(x) for x in normaliser(m, v))
    assert (alpha, beta) == (pytest.approx(1 + a / 3), pytest.approx(1 + b / 3))
    best = variance(alpha, beta)
    for da, db in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1), (0.1, 0.1), (-0.1, -0.1), (0.1, -0.1)):
        assert variance(alpha + da, beta + db) > best
    assert best < variance(1.0, 1.0)


@pytest.mark.identity("bnpo", "several rewards: each channel is normalised by itself, and the advantages are averaged")
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 3))
def test_decomposition(seed: int, channels: int) -> None:
    batch = answers(seed, channels=channels)
    assert batch.reward is not None
    each = [of(BetaNormalised(), replace(batch, reward=batch.reward[..., k : k + 1])) for k in range(channels)]
    torch.testing.assert_close(of(BetaNormalised(), batch), torch.stack(each).mean(0), atol=1e-9, rtol=1e-10)
    summed = of(BetaNormalised(decompose=False, high=float(channels)), batch)
    share = replace(batch, reward=batch.reward.sum(2, keepdim=True) / channels)
    torch.testing.assert_close(summed, of(BetaNormalised(), share), atol=1e-9, rtol=1e-10)
    assert float((summed - of(BetaNormalised(), batch)).abs().max()) > 1e-3


# -------------------------------------------------------------------- edges
def two(rewards: list[float], group: list[int], **more: Tensor) -> Batch:
    return Batch.of(reward=torch.tensor(rewards, dtype=F64), group=group, mask=more.get("mask", torch.ones(len(rewards), 2)))


def test_one_prompt_has_a_flat_density() -> None:
    assert of(BetaNormalised(), two([1, 0, 0, 0], [0] * 4))[:, 0].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_prompts_of_equal_difficulty_have_a_flat_density() -> None:
    assert of(BetaNormalised(), two([1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 2, 2]))[:, 0].tolist() == [0.5, -0.5, -0.5, 0.5, 0.5, -0.5]


def test_prompts_at_the_extremes_have_a_flat_density() -> None:
    """p = 0 and 1: V = 1/2 exceeds m (1 - m) = 1/4, the fitted a and b are negative."""
    batch = two([1, 1, 0, 0], [0, 0, 1, 1])
    mean, var = torch.tensor([0.5], dtype=F64), torch.tensor([0.5], dtype=F64)
    assert float(fitted(mean, var)[0]) == -0.25
    assert [float(x) for x in normaliser(mean, var)] == [1.0, 1.0]
    assert of(BetaNormalised(), batch).abs().sum() == 0.0


def test_an_answer_without_companions() -> None:
    """Its prompt's p is its own reward; in the released code it is 0, and the answer keeps its reward."""
    batch = two([1, 0, 1], [0, 0, 1])
    assert of(BetaNormalised(alpha=1.0, beta=1.0), batch)[:, 0].tolist() == [0.5, -0.5, 0.0]
    assert of(BetaNormalised(alpha=1.0, beta=1.0, form="code"), batch)[:, 0].tolist() == [0.5, -0.5, 1.0]
    lone = of(BetaNormalised(form="code"), batch)[:, 0]  # p = 1/2 and 0: m = 1/4, V = 1/8, a = 1/8, b = 3/8; f(0) = 0
    assert float(lone[2]) == pytest.approx(1e6)
    assert float(lone[0]) == pytest.approx(0.5 / sps.beta.pdf(0.5, 1 + 1 / 24, 1 + 1 / 8))


def test_equal_graded_rewards_teach_nothing() -> None:
    """The rounded mean of 0.3, 0.3, 0.3 is not 0.3; 1/f must not blow that up."""
    batch = two([0.3, 0.3, 0.3, 1.0, 0.0, 0.9, 0.8], [0, 0, 0, 1, 1, 2, 2])
    found = of(BetaNormalised(), replace(batch, reward=None if batch.reward is None else batch.reward.float()))[:, 0]
    assert found[:3].tolist() == [0.0] * 3
    assert float(found[3:].abs().min()) > 0


def test_rewards_are_mapped_and_checked() -> None:
    """Rewards of -1 and 1 with low = -1 are those of 0 and 1; without it they are refused."""
    group = [0, 0, 0, 1, 1, 1]
    plain, shifted = two([0, 1, 1, 0, 0, 1], group), two([-1, 1, 1, -1, -1, 1], group)
    assert torch.equal(of(BetaNormalised(low=-1.0), shifted), of(BetaNormalised(), plain))
    with pytest.raises(CallError, match=r"row 0 has -1 in channel 0: set advantage.low"):
        of(BetaNormalised(), shifted)
    with pytest.raises(CallError, match=r"\[0, 1\], but row 5 has 1.5"):
        of(BetaNormalised(), two([0, 1, 1, 0, 0, 1.5], group))


def test_rows_without_decisions_do_not_count() -> None:
    mask = torch.tensor([[1.0, 1], [1, 0], [1, 1], [1, 1], [0, 0]])
    with_empty = of(BetaNormalised(), two([1, 0, 1, 1, 0], [0, 0, 1, 1, 1], mask=mask))
    without = of(BetaNormalised(), two([1, 0, 1, 1], [0, 0, 1, 1], mask=mask[:4]))
    assert torch.equal(with_empty[:4], without)
    assert float(with_empty[4].abs().sum()) == 0.0
    nothing = of(BetaNormalised(), two([1, 0], [0, 0], mask=torch.zeros(2, 2)))
    assert nothing.tolist() == [[0.0, 0.0]] * 2


def test_running_moments() -> None:
    """decay d: the second batch meets d times the first one's moments and (1 - d) times its own; writing comes after reading."""
    part = BetaNormalised(decay=0.5)
    one, other = answers(1), answers(2)
    memory = part.initial()
    assert torch.equal(of(part, one, memory), of(BetaNormalised(), one))
    memory = {**memory, **part.observe("scored", batch=one, memory=memory)}
    blended = []
    for batch in (one, other):
        p = batch.pool(batch.outcome(), "group", "mean")[:, None]
        blended.append(moments_of(p, 1 / batch.pool(batch.outcome(), "group", "count")))
    expected = normaliser(*(0.5 * a + 0.5 * b for a, b in zip(*blended, strict=True)))
    fixed = BetaNormalised(alpha=float(expected[0]), beta=float(expected[1]))
    torch.testing.assert_close(of(part, other, memory), of(fixed, other), rtol=1e-9, atol=1e-12)
    assert float((of(part, other, memory) - of(BetaNormalised(), other)).abs().max()) > 1e-3
    assert BetaNormalised().observe("scored", batch=one, memory=memory) == {}
    nothing = replace(one, mask=torch.zeros_like(one.mask))
    assert part.observe("scored", batch=nothing, memory=memory) == {}


def test_equal_rewards_whose_mean_is_rounded_teach_nothing() -> None:
    """0.1 + 0.1 + 0.1 is not three times 0.1 in double precision; the difference is neither kept nor divided by f."""
    batch = two([0.1, 0.1, 0.1, 1.0, 0.0], [0, 0, 0, 1, 1])
    assert float(batch.pool(batch.outcome(), "group", "mean")[0]) != 0.1
    assert of(BetaNormalised(), batch)[:3].tolist() == [[0.0, 0.0]] * 3


def test_prompts_without_answers_are_not_prompts() -> None:
    """A group of which no row has a decision neither counts nor makes the moments infinite."""
    rewards, group = [1.0, 0, 0, 0, 1, 1, 1, 0], [0] * 4 + [1] * 4
    found = of(BetaNormalised(), two([*rewards, 1.0], [*group, 2], mask=torch.tensor([[1.0, 1]] * 8 + [[0, 0]])))
    assert torch.equal(found[:8], of(BetaNormalised(), two(rewards, group)))
    assert found[8].tolist() == [0.0, 0.0]


def test_the_range_of_rewards_is_that_of_rows_with_decisions() -> None:
    """An empty row has an outcome of 0, which [1, 2] does not hold; a row is checked though part of it is padding."""
    mask = torch.tensor([[1.0, 1], [1, 0], [0, 0]])
    found = of(BetaNormalised(low=1.0, high=2.0), two([1.0, 2.0, 1.0], [0, 0, 0], mask=mask))
    assert found.tolist() == [[-0.5, -0.5], [0.5, 0.0], [0.0, 0.0]]
    with pytest.raises(CallError, match=r"row 1 has 1\.5"):
        of(BetaNormalised(), two([0.0, 1.5, 1.0], [0, 0, 0], mask=mask))


@pytest.mark.parametrize(("low", "high"), [(-5e-7, 1 + 5e-7), (-1e-6, 1 + 1e-6)])
def test_rewards_a_rounding_out_of_range_are_those_of_its_ends(low: float, high: float) -> None:
    group = [0, 0, 0, 1, 1, 1]
    assert torch.equal(
        of(BetaNormalised(), two([low, high, high, low, low, high], group)),
        of(BetaNormalised(), two([0, 1, 1, 0, 0, 1], group)),
    )


@pytest.mark.parametrize("bad", [-1.5e-6, 1 + 1.5e-6])
def test_rewards_further_out_of_range_are_refused(bad: float) -> None:
    with pytest.raises(CallError, match="takes rewards in"):
        of(BetaNormalised(), two([0.0, 1.0, bad], [0, 0, 0]))


def test_fewer_than_two_prompts_have_the_moments_of_the_start() -> None:
    """0 and 1, whatever their success; a run that begins with such a batch goes on as if its moments had been there before."""
    start = [x.expand(2) for x in (torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64))]
    for p, weight in (([[0.25, 0.75]], [1.0]), ([[0.25, 0.75]] * 2, [0.5, 0.5]), ([[0.25, 0.75]], [0.0])):
        found = moments_of(torch.tensor(p, dtype=F64), torch.tensor(weight, dtype=F64))
        assert all(torch.equal(a, b) for a, b in zip(found, start, strict=True))
    part = BetaNormalised(decay=0.9)
    begin = part.initial()
    after = part.observe("scored", batch=two([1, 0], [0, 0]), memory=begin)
    assert [float(begin["mean"]), float(begin["var"]), int(begin["batches"])] == [0.0, 1.0, 0]
    assert [after["mean"].tolist(), after["var"].tolist(), int(after["batches"])] == [[0.0], [1.0], 1]


def test_variance_that_counts_as_none() -> None:
    """Up to 1e-12 there is none, and no density is fitted."""
    half = torch.tensor([0.5] * 3, dtype=F64)
    a, b = fitted(half, torch.tensor([0.0, 1e-12, 1.5e-12], dtype=F64))
    assert a.tolist() == b.tolist() == pytest.approx([0.0, 0.0, 0.5 * (0.25 / 1.5e-12 - 1)])


def test_when_moments_move() -> None:
    """Once the batch is scored, and at no other moment."""
    part = BetaNormalised(decay=0.5)
    assert part.moments == {"scored"}
    assert set(part.observe("scored", batch=answers(1), memory=part.initial())) == set(part.initial())
    for moment in ("answered", "stepped"):
        assert part.observe(moment, batch=answers(1), memory=part.initial()) == {}  # type: ignore[arg-type]


def test_settings_without_sense() -> None:
    for part, words in (
        (BetaNormalised(low=1.0), "low = 1 is not below high = 1"),
        (BetaNormalised(alpha=2.0), "fix both or none"),
    ):
        with pytest.raises(CallError, match=words):
            get_method("bnpo").but("x", advantage=part)
    with pytest.raises(CallError, match="group_size = 1"):
        get_method("bnpo").but("x", sampler=Fresh(group_size=1))
