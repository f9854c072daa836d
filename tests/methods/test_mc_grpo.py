"""MC-GRPO: what the median does to advantages, and the row in the middle that leaves the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import polopt
from polopt.batch import Batch
from polopt.errors import CallError
from polopt.interfaces import Plan
from polopt.parts.advantage.median import MedianBaseline, is_middle, middle
from polopt.parts.reward.overlong import SoftOverlong
from polopt.parts.sampler.fresh import Fresh
from polopt.parts.sampler.spare import Spare
from polopt.parts.select.middle import DropMiddle
from polopt.registry import get_method

torch.set_num_threads(1)
F64 = torch.float64
REWARDS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, -2.0]), min_size=3, max_size=9).filter(lambda r: len(r) % 2 == 1)


def answers(*groups: list[float], steps: int = 2, **more: Any) -> Batch:
    reward = torch.tensor([r for g in groups for r in g], dtype=F64)
    ids = [i for i, g in enumerate(groups) for _ in g]
    logp = torch.full((len(reward), steps), -1.0, dtype=F64)
    return Batch.of(logp=logp, logp_old=logp, logp_ref=logp, reward=reward, group=ids, **more)


def advantage(part: MedianBaseline, *groups: list[float]) -> Tensor:
    return part(answers(*groups))[:, 0]


def test_worked_numbers() -> None:
    """R = 0, 1, 3: b = 1, deviations -1, 0, 2, MAD 1.001, two of three rows have an advantage."""
    found = advantage(MedianBaseline(), [0.0, 3.0, 1.0], [5.0, 5.0, 5.0])
    expected = [-1.5 / 1.001, 3.0 / 1.001, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))
    deviation = np.std([0.0, 1.0, 3.0], ddof=1) + 1e-4
    found = advantage(MedianBaseline(scale="std", compensate=False), [0.0, 3.0, 1.0])
    torch.testing.assert_close(found, torch.tensor([-1 / deviation, 2 / deviation, 0.0], dtype=F64))
    assert advantage(MedianBaseline(scale="none", compensate=False), [0.0, 3.0, 1.0]).tolist() == [-1.0, 2.0, 0.0]


@pytest.mark.identity("mc-grpo", "exactly one row of each group leaves the loss, and its advantage is 0")
@settings(max_examples=60, deadline=None)
@given(groups=st.lists(REWARDS, min_size=1, max_size=4))
def test_one_row_leaves(groups: list[list[float]]) -> None:
    batch = answers(*groups)
    out = is_middle(batch)
    assert batch.pool(out.double(), "group", "sum").tolist() == [1.0] * len(out)
    assert bool((MedianBaseline()(batch)[out] == 0).all())
    assert torch.equal(out, is_middle(batch))  # ties are broken alike in every call
    kept = DropMiddle()(Batch.of(mask=batch.mask, row={"middle": out.double()}))
    assert torch.equal(kept, ~out[:, None].expand(batch.shape))


@pytest.mark.identity(
    "mc-grpo", "of an odd group at most half of the others have a positive advantage, and at most half a negative one"
)
@settings(max_examples=60, deadline=None)
@given(rewards=REWARDS)
def test_at_most_half_on_either_side(rewards: list[float]) -> None:
    found = advantage(MedianBaseline(), rewards)
    half = (len(rewards) - 1) // 2
    assert int((found > 0).sum()) <= half
    assert int((found < 0).sum()) <= half


@pytest.mark.identity("mc-grpo", "advantages do not change when rewards become a r + c with a > 0, but for eps")
@settings(max_examples=60, deadline=None)
@given(
    rewards=st.lists(st.integers(-5, 5).map(float), min_size=3, max_size=7, unique=True),
    a=st.floats(0.5, 20), c=st.floats(-10, 10), scale=st.sampled_from(["mad", "std"]),
)  # fmt: skip
def test_affine_rewards(rewards: list[float], a: float, c: float, scale: Any) -> None:
    part = MedianBaseline(scale=scale, eps=1e-9)
    before, after = advantage(part, rewards), advantage(part, [a * r + c for r in rewards])
    torch.testing.assert_close(before, after, rtol=1e-3 if scale == "std" else 1e-6, atol=1e-6)


@pytest.mark.identity("mc-grpo", "a largest reward that grows without bound leaves the baseline; the mean follows it")
def test_outlier() -> None:
    for top in (2.0, 1e6, 1e30):
        batch = answers([0.0, 1.0, top])
        x = batch.outcome()
        assert float(x[middle(batch, x)][0]) == 1.0
        found = MedianBaseline(scale="mad", compensate=False)(batch)[:, 0]
        assert float(found[0]) == pytest.approx(-1 / 1.001)
    mean = MedianBaseline("mean", "none", compensate=False)
    assert float(advantage(mean, [0.0, 1.0, 2.0])[1]) == pytest.approx(0.0)
    assert float(advantage(mean, [0.0, 1.0, 11.0])[1]) == pytest.approx(-3.0)  # the sign that flips


@pytest.mark.identity("mc-grpo", "two of three right: the others have 0 and a negative one; one of three: 0 and a positive one")
@pytest.mark.parametrize(("rewards", "expected"), [([1.0, 1.0, 0.0], [-3000.0, 0.0]), ([0.0, 0.0, 1.0], [0.0, 3000.0])])
def test_binary_pairs(rewards: list[float], expected: list[float]) -> None:
    batch = answers(rewards)
    found = MedianBaseline()(batch)[:, 0]
    assert sorted(found[~is_middle(batch)].tolist()) == pytest.approx(expected)


def test_equal_rewards_teach_nothing() -> None:
    for scale in ("mad", "std", "none"):
        for value in (0.0, 0.1, 1.0):
            assert advantage(MedianBaseline(scale=scale), [value] * 5, [value], [value] * 2).tolist() == [0.0] * 8


def test_equal_rewards_whose_mean_is_rounded_teach_nothing() -> None:
    """0.1 + 0.1 + 0.1 is not three times 0.1 in double precision; also beside groups with larger and smaller rewards."""
    part = MedianBaseline("mean", "none", compensate=False)
    assert advantage(part, [1.0, 0.0], [0.1] * 3).tolist() == [0.5, -0.5, 0.0, 0.0, 0.0]


def test_groups_have_their_own_centre_spread_and_number() -> None:
    """Three of the first group's four rows have an advantage, one of the second's three."""
    groups = [4.0, 0.0, 1.0, 2.0], [10.0, 30.0, 10.0]
    plain = advantage(MedianBaseline(scale="none"), *groups)
    assert plain.tolist() == pytest.approx([4.0, -4 / 3, 0.0, 4 / 3, 0.0, 60.0, 0.0])
    found = advantage(MedianBaseline("mean", "std", compensate=False), *groups)
    expected = np.concatenate([(np.array(g) - np.mean(g)) / (np.std(g, ddof=1) + 1e-4) for g in groups])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("small", "factor"), [(1e-6, 5 / 2), (1.5e-6, 5 / 3)])
def test_advantages_that_count_as_none(small: float, factor: float) -> None:
    """Up to 1e-6 a row counts as one without an advantage."""
    found = advantage(MedianBaseline(scale="none"), [-2.0, 0.0, 0.0, small, 3.0])
    assert found.tolist() == pytest.approx([factor * x for x in (-2.0, 0.0, 0.0, small, 3.0)])


def test_ties_are_broken_by_place() -> None:
    """Of equal rewards the row in the middle of the list, also among many, where sorting may move equals about."""
    batch = answers([1.0] * 301, [0.0] * 200 + [1.0] * 301)
    assert is_middle(batch).nonzero()[:, 0].tolist() == [150, 301 + 250]


def test_even_groups_take_the_lower_of_the_two_in_the_middle() -> None:
    assert advantage(MedianBaseline(scale="none", compensate=False), [4.0, 0.0, 1.0, 2.0]).tolist() == [3.0, -1.0, 0.0, 1.0]


def test_rows_without_a_decision_do_not_count() -> None:
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1], [0, 0]]).bool()
    logp = torch.zeros(5, 2, dtype=F64)
    batch = Batch.of(logp=logp, mask=mask, reward=torch.tensor([0.0, 9.0, 1.0, 3.0, 2.0], dtype=F64), group=[0, 0, 0, 0, 1])
    assert is_middle(batch).tolist() == [False, False, True, False, False]
    found = MedianBaseline(scale="none")(batch)[:, 0]
    assert found.tolist() == [-1.5, 0.0, 0.0, 3.0, 0.0]
    assert batch.group is not None
    assert torch.equal(batch.group[middle(batch, batch.outcome())], batch.group)  # also of the group without a decision


def test_loss_is_that_of_the_rows_that_stay() -> None:
    """The denominators count G rows, and the middle row's KL does not enter."""
    method = get_method("mc-grpo")
    whole = answers([0.0, 1.0, 3.0], row={"middle": torch.tensor([0.0, 1.0, 0.0])})
    now = whole.stat("logp@old").clone().requires_grad_()
    whole = whole.adding({"logp@now": now})
    given = method.advantages(whole)
    loss, _ = method.loss(whole, advantage=given)
    (slope,) = torch.autograd.grad(loss, now)
    assert slope[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(slope[:, 0], -given[:, 0] / 2 / 2)  # two rows of two tokens
    kept = method.set("select", "none").loss(whole.rows(torch.tensor([0, 2])), advantage=given[[0, 2]])[0]
    torch.testing.assert_close(loss, kept)


def test_sampler_draws_one_more_and_marks_the_middle() -> None:
    asked: list[tuple[int | None, int]] = []
    sampling = Spare(group_size=2)(Plan(want=2, draw=lambda n: list(range(n))))
    asked += [(r.item, r.count) for r in next(sampling)]
    with pytest.raises(StopIteration) as end:
        sampling.send(answers([0.0, 3.0, 1.0], [1.0, 0.0, 2.0]))
    assert asked == [(0, 3), (1, 3)]
    assert end.value.value["policy"].row["middle"].tolist() == [0, 0, 1, 1, 0, 0]


def test_refusals() -> None:
    with pytest.raises(CallError, match="marks the middle of rewards as scored"):
        get_method("mc-grpo").but("x", reward=SoftOverlong())
    with pytest.raises(CallError, match="at least 2 samples"):
        get_method("mc-grpo").but("x", sampler=Fresh(group_size=1), select=())
    with pytest.raises(CallError, match="group_size = 1 must be >= 2"):
        Spare(group_size=1)


def test_a_run_trains_on_even_groups() -> None:
    run = polopt.train(
        "mc-grpo", "table:arms", budget="3-updates", out=False, overrides={"sampler.group_size": 2, "collect.prompts": 4}
    )
    assert run.summary["status"] == "done"
    assert run.summary["decisions"] == 3 * 4 * 3
