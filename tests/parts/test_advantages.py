"""Advantages against sums written out, and their edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.batch import Batch
from polopt.errors import MissingStatistic
from polopt.part import Can
from polopt.parts.advantage.gae import GAE, NStep
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.advantage.running_mean import RunningMean
from polopt.parts.advantage.scan import discounted_sum, standardised

torch.set_num_threads(1)


def control_batch(seed: int, b: int = 4, t: int = 7) -> Batch:
    """Fragments with ends, cuts and decisions that the policy did not make, in float64."""
    g = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(b, t, generator=g, dtype=torch.float64)

    def flags(p: float) -> torch.Tensor:
        return torch.rand(b, t, generator=g) < p

    return Batch.of(
        reward=draw(), mask=~flags(0.25), terminated=flags(0.15), truncated=flags(0.15),
        stats={"value@old": draw(), "value_next@old": draw()},
    )  # fmt: skip


def chains(batch: Batch) -> list[list[tuple[int, list[int], bool]]]:
    """For each row and valid decision: the valid decisions up to an end, by walking forward, and whether it is terminal."""
    mask, term, trunc = (x.numpy() for x in (batch.mask, batch.terminated, batch.truncated))  # type: ignore[union-attr]
    out = []
    for i in range(mask.shape[0]):
        row = []
        for t in range(mask.shape[1]):
            if not mask[i, t]:
                continue
            walk, stop, terminal = [], False, False
            for k in range(t, mask.shape[1]):
                if mask[i, k] and stop:
                    break
                if mask[i, k]:
                    walk.append(k)
                terminal = terminal or bool(term[i, k])
                stop = stop or terminal or bool(trunc[i, k])
            row.append((t, walk, terminal))
        out.append(row)
    return out


@pytest.mark.identity("ppo", "trpo", "ppo-lm", "GAE is the sum of (gamma lam)^l delta_l up to the end of the episode or fragment")
@pytest.mark.identity(
    "a3c", "a2c", "R_t = r_t + gamma R_{t+1}, started from the value at the end of the fragment, 0 at a termination"
)
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.0, 0.9, 1.0]), lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_and_n_step_are_sums_along_the_walk(seed: int, gamma: float, lam: float) -> None:
    batch = control_batch(seed)
    r, v, after = (batch.scalar_reward().numpy(), batch.stats["value@old"].numpy(), batch.stats["value_next@old"].numpy())
    gae, returns = np.zeros_like(r), np.zeros_like(r)
    for i, row in enumerate(chains(batch)):
        for t, walk, terminal in row:
            bootstrap = [after[i, k] for k in walk[:-1]] + [0.0 if terminal else after[i, walk[-1]]]
            delta = [r[i, k] + gamma * b - v[i, k] for k, b in zip(walk, bootstrap, strict=True)]
            gae[i, t] = sum((gamma * lam) ** n * d for n, d in enumerate(delta))
            returns[i, t] = sum(gamma**n * r[i, k] for n, k in enumerate(walk)) + gamma ** len(walk) * bootstrap[-1]
    mask = batch.mask.numpy()
    np.testing.assert_allclose(GAE(gamma, lam)(batch).numpy(), gae, atol=1e-12)
    np.testing.assert_allclose(GAE(gamma, lam).returns(batch).numpy(), (gae + v) * mask, atol=1e-12)
    np.testing.assert_allclose(NStep(gamma).returns(batch).numpy(), returns, atol=1e-12)
    np.testing.assert_allclose(NStep(gamma)(batch).numpy(), (returns - v) * mask, atol=1e-12)


@pytest.mark.identity("ppo", "a2c", "GAE with lam = 1 is the n-step advantage")
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_gae_with_lambda_one_is_n_step_where_next_values_are_consistent(seed: int) -> None:
    """With V(s_{t+1}) the row's own next value, the errors telescope."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(3, 6, generator=g, dtype=torch.float64)
    last = torch.randn(3, 1, generator=g, dtype=torch.float64)
    truncated = torch.rand(3, 6, generator=g) < 0.2
    final = torch.where(truncated, torch.randn(3, 6, generator=g, dtype=torch.float64), torch.cat([value[:, 1:], last], 1))
    batch = Batch.of(
        reward=torch.randn(3, 6, generator=g, dtype=torch.float64), terminated=torch.rand(3, 6, generator=g) < 0.2,
        truncated=truncated, stats={"value@old": value, "value_next@old": final},
    )  # fmt: skip
    torch.testing.assert_close(GAE(0.9, 1.0)(batch), NStep(0.9)(batch), atol=1e-12, rtol=0)
    torch.testing.assert_close(GAE(0.9, 1.0).returns(batch), NStep(0.9).returns(batch), atol=1e-12, rtol=0)


def test_gae_worked_by_hand() -> None:
    batch = Batch.of(
        reward=torch.tensor([[1.0, 2.0, 4.0]]), terminated=torch.tensor([[0, 0, 1]]),
        stats={"value@old": torch.tensor([[0.5, 1.0, 2.0]]), "value_next@old": torch.tensor([[1.0, 2.0, 99.0]])},
    )  # fmt: skip
    # gamma = lam = 1/2: errors 1 + 0.5 - 0.5 = 1, 2 + 1 - 1 = 2, 4 - 2 = 2
    assert GAE(0.5, 0.5)(batch).tolist() == [[1 + 0.25 * 2.5, 2 + 0.25 * 2, 2.0]]


@pytest.mark.identity("ppo", "a3c", "reinforce", "nothing is learned across the end of an episode")
def test_nothing_is_learned_across_an_end() -> None:
    batch = control_batch(3)
    ended = Batch.of(
        reward=batch.scalar_reward(), terminated=torch.zeros(4, 7), truncated=torch.tensor([[0, 0, 1, 0, 0, 0, 0]]).expand(4, 7),
        stats=batch.stats,
    )  # fmt: skip
    changed = Batch.of(
        reward=torch.cat([batch.scalar_reward()[:, :3], torch.full((4, 4), 1e6, dtype=torch.float64)], 1),
        terminated=torch.zeros(4, 7), truncated=torch.tensor([[0, 0, 1, 0, 0, 0, 0]]).expand(4, 7), stats=batch.stats,
    )  # fmt: skip
    for part in (GAE(), NStep(), MonteCarlo()):
        assert torch.equal(part(ended)[:, :3], part(changed)[:, :3])
        assert not torch.equal(part(ended)[:, 3:], part(changed)[:, 3:])


def test_termination_beats_truncation() -> None:
    """An answer cut by the limit is judged: both flags stand, and nothing is bootstrapped."""
    both = Batch.of(
        reward=torch.tensor([[1.0]]), terminated=torch.tensor([[1]]), truncated=torch.tensor([[1]]),
        stats={"value@old": torch.zeros(1, 1), "value_next@old": torch.full((1, 1), 100.0)},
    )  # fmt: skip
    assert GAE()(both).item() == 1.0
    assert NStep()(both).item() == 1.0


@pytest.mark.parametrize("part", [GAE(), NStep(), MonteCarlo(gamma=0.9), GAE(standardise=True), GroupBaseline()])
def test_garbage_outside_the_mask_and_padding_change_nothing(part: GAE) -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    clean = {k: torch.randn(2, 4, generator=g, dtype=torch.float64) for k in ("reward", "value@old", "value_next@old")}
    dirty = {k: torch.where(mask, v, math.nan) for k, v in clean.items()}

    def build(c: dict[str, torch.Tensor]) -> Batch:
        return Batch.of(reward=c["reward"], mask=mask, group=[0, 0], stats={k: c[k] for k in ("value@old", "value_next@old")})

    wanted = torch.where(mask, part(build(clean)), 0.0)
    found = part(build(dirty))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(part(build(clean).pad(9))[:, :4], wanted, atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), t=st.integers(1, 40))
def test_scan_equals_the_loop(seed: int, t: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, c = (torch.randn(3, t, generator=g, dtype=torch.float64) for _ in range(2))
    wanted, later = torch.zeros_like(x), torch.zeros(3, dtype=torch.float64)
    for k in reversed(range(t)):
        later = x[:, k] + c[:, k] * later
        wanted[:, k] = later
    torch.testing.assert_close(discounted_sum(x, c), wanted)


def test_standardise_edges() -> None:
    def run(x: list[float]) -> list[float]:
        out: list[float] = standardised(torch.tensor([x]), Batch.of(mask=torch.ones(1, len(x)))).flatten().tolist()
        return out

    assert run([0.1] * 7) == [0.0] * 7  # the rounded mean of seven 0.1 is not 0.1
    assert run([5.0]) == [5.0]  # a deviation of one number does not exist
    assert np.allclose(run([1.0, 3.0]), [-(0.5**0.5), 0.5**0.5])
    masked = standardised(torch.tensor([[1.0, 3.0, 1e9]]), Batch.of(mask=torch.tensor([[1, 1, 0]])))
    assert np.allclose(masked.numpy(), [[-(0.5**0.5), 0.5**0.5, 0.0]])


# -------------------------------------------------------------------- Monte Carlo
@pytest.mark.identity("reinforce", "reinforce-baseline", "returns count from each decision on, minus V with the baseline")
def test_returns_to_go_and_whole_return() -> None:
    batch = Batch.of(reward=torch.tensor([[1.0, 2.0, 4.0]]), stats={"value@old": torch.tensor([[1.0, 1.0, 1.0]])})
    assert MonteCarlo(gamma=0.5)(batch).tolist() == [[3.0, 4.0, 4.0]]
    assert MonteCarlo(gamma=0.5, credit="whole")(batch).tolist() == [[3.0, 3.0, 3.0]]
    assert MonteCarlo(gamma=0.5, baseline="value")(batch).tolist() == [[2.0, 3.0, 3.0]]
    assert MonteCarlo(gamma=0.5, baseline="value").returns(batch).tolist() == [[3.0, 4.0, 4.0]]


@pytest.mark.identity("reinforce", "the outcome of an answer is the return of each of its tokens")
def test_text_outcome_reaches_every_token() -> None:
    batch = Batch.of(reward=torch.tensor([2.0, 3.0]), mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert MonteCarlo()(batch).tolist() == [[2.0, 2.0, 2.0], [3.0, 3.0, 0.0]]


def test_requirements_are_declared() -> None:
    assert Can.EPISODES in MonteCarlo().requires
    assert MonteCarlo().needs == frozenset()
    assert MonteCarlo(baseline="value").needs == {"value@old"}
    assert MonteCarlo(baseline="value").nets == {"value"}
    assert GroupBaseline(centre="batch", scale="batch").requires == {Can.EPISODES}
    assert GroupBaseline(centre="batch", scale="group").requires == {Can.EPISODES, Can.GROUPS}
    assert GAE().nets == {"value"}


# -------------------------------------------------------------------- groups
def outcomes(rewards: list[float], group: list[int], mask: list[list[int]] | None = None, t: int = 2) -> Batch:
    return Batch.of(
        reward=torch.tensor(rewards, dtype=torch.float64), group=group,
        mask=torch.ones(len(rewards), t) if mask is None else torch.tensor(mask),
    )  # fmt: skip


@pytest.mark.identity("grpo", "gspo", "cispo", "dapo", "(R - mean) / (std + eps) within the group of a prompt")
def test_group_worked_by_hand_with_unequal_groups() -> None:
    batch = outcomes([0.0, 1.0, 5.0, 2.0, 2.0, 8.0], [4, 4, 1, 1, 1, 9])
    adv = GroupBaseline(eps=0.0)(batch)[:, 0]
    std = math.sqrt(0.5)
    wanted = [-0.5 / std, 0.5 / std, 2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), 0.0]
    np.testing.assert_allclose(adv.numpy(), wanted, atol=1e-12)
    loo = GroupBaseline(centre="leave-one-out", scale="none")(batch)[:, 0]
    np.testing.assert_allclose(loo.numpy(), [-1.0, 1.0, 3.0, -1.5, -1.5, 0.0], atol=1e-12)
    population = GroupBaseline(ddof=0, eps=0.0)(batch)[:2, 0]
    np.testing.assert_allclose(population.numpy(), [-1.0, 1.0], atol=1e-12)


@pytest.mark.identity("rloo", "grpo", "dr-grpo", "equal rewards give advantages of exactly 0")
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(value: float, dtype: torch.dtype) -> None:
    for centre in ("group", "leave-one-out"):
        for scale in ("group", "batch", "none"):
            part = GroupBaseline(centre=centre, scale=scale)  # type: ignore[arg-type]
            batch = Batch.of(reward=torch.tensor([value] * 7 + [3.0], dtype=dtype), group=[0] * 7 + [1], mask=torch.ones(8, 3))
            assert bool((part(batch) == 0).all()), (centre, scale)


@pytest.mark.identity(
    "rloo", "A_i = k/(k-1) (R_i - mean R); sum of A_i = 0; k = 2 gives R_1 - R_2; a common shift of R changes nothing"
)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(2, 6))
def test_leave_one_out_is_the_scaled_centred_reward(seed: int, k: int) -> None:
    """R_i - b_i = k/(k-1) (R_i - mean R); the advantages of a group sum to 0; a common shift changes nothing."""
    r = np.random.default_rng(seed).normal(size=3 * k)
    group = sorted([0, 1, 2] * k)
    adv = GroupBaseline(centre="leave-one-out", scale="none")(outcomes(list(r), group))[:, 0].numpy()
    centred = GroupBaseline(scale="none")(outcomes(list(r), group))[:, 0].numpy()
    np.testing.assert_allclose(adv, k / (k - 1) * centred, atol=1e-12)
    np.testing.assert_allclose(adv.reshape(3, k).sum(1), 0.0, atol=1e-12)
    shifted = GroupBaseline(centre="leave-one-out", scale="none")(outcomes(list(r + 7.0), group))[:, 0].numpy()
    np.testing.assert_allclose(shifted, adv, atol=1e-10)
    if k == 2:
        np.testing.assert_allclose(adv[0::2], r[0::2] - r[1::2], atol=1e-12)


def test_rows_without_decisions_do_not_count() -> None:
    mask = [[1, 1], [1, 1], [0, 0]]
    adv = GroupBaseline(eps=0.0)(outcomes([0.0, 1.0, 50.0], [0, 0, 0], mask))
    np.testing.assert_allclose(adv[:2, 0].numpy(), [-math.sqrt(0.5), math.sqrt(0.5)], atol=1e-12)
    assert adv[2].tolist() == [0.0, 0.0]


def test_batch_baseline_needs_no_groups() -> None:
    batch = Batch.of(reward=torch.tensor([1.0, 3.0]), mask=torch.ones(2, 1))
    assert GroupBaseline(centre="batch", scale="none")(batch).flatten().tolist() == [-1.0, 1.0]
    assert GroupBaseline(centre="none", scale="none")(batch).flatten().tolist() == [1.0, 3.0]
    with pytest.raises(MissingStatistic, match="group="):
        GroupBaseline()(batch)


# -------------------------------------------------------------------- running mean
def test_running_mean_reads_before_it_writes() -> None:
    part = RunningMean(decay=0.75)
    memory = part.initial()
    seen = []
    for rewards in ([2.0, 4.0], [7.0, 7.0], [0.0, 0.0]):
        batch = Batch.of(reward=torch.tensor(rewards), mask=torch.ones(2, 2))
        seen.append(float(part(batch, memory)[0, 0]))
        assert part.observe("drawn", batch=batch, memory=memory) == {}
        memory |= part.observe("scored", batch=batch, memory=memory)
    # baselines: 0, then 3, then 0.75 * 3 + 0.25 * 7 = 4
    assert seen == [2.0, 4.0, -4.0]
    assert float(memory["baseline"]) == 3.0
    empty = Batch.of(reward=torch.tensor([9.0]), mask=torch.zeros(1, 2))
    assert float(part.observe("scored", batch=empty, memory=memory)["baseline"]) == 3.0
