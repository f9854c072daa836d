"""Reward shaping, and samplers driven by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from polopt.batch import Batch
from polopt.errors import CallError, MissingStatistic
from polopt.interfaces import Plan, Request
from polopt.part import Can
from polopt.parts.reward.kl import KLInReward
from polopt.parts.reward.overlong import SoftOverlong
from polopt.parts.sampler.dynamic import DynamicSampling
from polopt.parts.sampler.fresh import Fresh
from polopt.registry import get_method
from polopt.update import Update

torch.set_num_threads(1)


# -------------------------------------------------------------------- rewards
@pytest.mark.identity("dapo", "the soft punishment of long answers, in numbers")
def test_soft_overlong_worked_numbers() -> None:
    """Limit 10, cache 4: lengths 6, 7, 8 and 10 get 0, -1/4, -1/2 and -1."""
    lengths = [6, 7, 8, 10, 0]
    mask = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    batch = Batch.of(reward=torch.ones(5, dtype=torch.float64), mask=mask, horizon=10)
    shaped = SoftOverlong(cache=0.4)(batch)
    assert shaped.shape == (5, 12, 1)
    extra = shaped[..., 0] - batch.scalar_reward()
    np.testing.assert_allclose(extra.sum(1).numpy(), [0.0, -0.25, -0.5, -1.0, 0.0], atol=1e-12)
    assert [int(r.nonzero()[0]) for r in extra[1:4]] == [6, 7, 9]  # at the last decision


def test_soft_overlong_beyond_the_limit_and_without_cache() -> None:
    batch = Batch.of(reward=torch.zeros(2), mask=torch.tensor([[1, 1, 1], [1, 1, 0]]), horizon=2)
    assert SoftOverlong(cache=0.0)(batch)[..., 0].sum(1).tolist() == [-1.0, 0.0]
    assert SoftOverlong(cache=1.0)(batch)[..., 0].sum(1).tolist() == [-1.0, -1.0]
    with pytest.raises(CallError, match="horizon"):
        SoftOverlong()(Batch.of(reward=torch.zeros(2), mask=torch.ones(2, 3), horizon=0))
    with pytest.raises(MissingStatistic, match="reward="):
        SoftOverlong()(Batch.of(mask=torch.ones(2, 3)))


def test_soft_overlong_does_not_depend_on_padding_and_keeps_channels() -> None:
    reward = torch.arange(12.0).reshape(2, 3, 2)
    batch = Batch.of(reward=reward, mask=torch.ones(2, 3), horizon=3)
    shaped = SoftOverlong(cache=1.0)(batch)
    assert torch.equal(shaped[..., 1], reward[..., 1])
    assert torch.equal(SoftOverlong(cache=1.0)(batch.pad(6))[:, :3], shaped)


@pytest.mark.identity("rloo", "ppo-lm", "the KL in the reward per token and per answer adds up to the same")
def test_kl_in_reward_per_token_and_per_sequence() -> None:
    old = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -1.0, -9.0]], dtype=torch.float64)
    batch = Batch.of(logp_old=old, logp_ref=ref, reward=torch.tensor([1.0], dtype=torch.float64), mask=torch.tensor([[1, 1, 0]]))
    np.testing.assert_allclose(KLInReward(0.1, "token")(batch)[0, :, 0].numpy(), [-0.05, 1.1, 0.0], atol=1e-12)
    np.testing.assert_allclose(KLInReward(0.1, "sequence")(batch)[0, :, 0].numpy(), [0.0, 1.0 - 0.1 * (0.5 - 1.0), 0.0], atol=1e-12)
    for form in ("token", "sequence"):
        total = float(KLInReward(0.1, form)(batch)[0, :, 0].sum())  # type: ignore[arg-type]
        assert math.isclose(total, 1.05)
    with pytest.raises(MissingStatistic, match="logp_ref="):
        KLInReward()(Batch.of(logp_old=old, reward=torch.tensor([1.0])))


@pytest.mark.identity("rloo", "ppo-lm", "no gradient flows through the KL in the reward")
def test_kl_in_reward_is_without_gradient() -> None:
    old = torch.zeros(1, 2, requires_grad=True)
    batch = Batch.of(logp_old=old, logp_ref=torch.ones(1, 2), reward=torch.tensor([1.0]))
    assert not KLInReward()(batch).requires_grad


# -------------------------------------------------------------------- samplers
def drive(
    part: Fresh | DynamicSampling, want: int, reward: Callable[[int, int], float]
) -> tuple[dict[str, Batch], list[list[Request]]]:
    """Answer a sampler's requests: `reward(item, i)` for the i-th sample of an item. Every second answer is longer."""
    stream: Iterator[int] = iter(range(10_000))
    asked: list[list[Request]] = []
    sampling = part(Plan(want, lambda n: [next(stream) for _ in range(n)]))
    requests = next(sampling)
    while True:
        asked.append(list(requests))
        width = 2 + len(asked) % 2
        items = [r.item for r in requests for _ in range(r.count)]
        batch = Batch.of(
            reward=torch.tensor([reward(r.item or 0, i) for r in requests for i in range(r.count)]),
            mask=torch.ones(len(items), width), group=[k for k, r in enumerate(requests) for _ in range(r.count)],
            keys={"item": torch.tensor(items)}, row={"item": torch.tensor(items)},
        )  # fmt: skip
        try:
            requests = sampling.send(batch)
        except StopIteration as stop:
            return stop.value, asked


def test_fresh_asks_once() -> None:
    batches, asked = drive(Fresh(group_size=3), 2, lambda item, i: float(i))
    assert [(r.item, r.count) for r in asked[0]] == [(0, 3), (1, 3)]
    assert len(asked) == 1
    assert batches["policy"].shape[0] == 6
    assert Fresh().requires == frozenset()
    assert Fresh(group_size=2).requires == {Can.GROUPS}


@pytest.mark.identity("dapo", "groups whose outcomes are all equal are replaced by fresh ones")
def test_dynamic_sampling_replaces_groups_without_signal() -> None:
    """Every third prompt has mixed outcomes: what is missing is asked for again."""
    batches, asked = drive(DynamicSampling(group_size=4), 3, lambda item, i: float(i % 2) if item % 3 == 0 else 1.0)
    batch = batches["policy"]
    assert [len(a) for a in asked] == [3, 2, 1, 1]  # items 0 1 2 | 3 4 | 5 | 6
    assert batch.row["item"].reshape(3, 4)[:, 0].tolist() == [0, 3, 6]
    assert batch.group is not None
    assert batch.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert batch.units["group"] == 3
    assert bool((batch.pool(batch.outcome(), "group", "std") > 0).all())


def test_dynamic_sampling_gives_up_with_what_it_has() -> None:
    batches, asked = drive(DynamicSampling(group_size=2, max_rounds=4), 3, lambda item, i: float(i) if item == 1 else 0.0)
    assert len(asked) == 4
    assert batches["policy"].row["item"].tolist() == [1, 1]
    nothing, asked = drive(DynamicSampling(group_size=2, max_rounds=3), 2, lambda item, i: 1.0)
    assert len(asked) == 3
    assert nothing["policy"].row["item"].tolist() == [4, 4, 5, 5]  # the last round as it is
    advantage = get_method("dapo").advantages(nothing["policy"])
    assert bool((advantage == 0).all())


def test_dynamic_sampling_ignores_rows_without_decisions() -> None:
    batch = Batch.of(reward=torch.tensor([1.0, 5.0]), mask=torch.tensor([[1, 1], [0, 0]]), group=[0, 0])
    assert not bool(DynamicSampling()._differs(batch).any())


def test_dynamic_sampling_can_look_at_one_channel() -> None:
    reward = torch.zeros(2, 1, 2)
    reward[1, 0, 1] = 1.0
    batch = Batch.of(reward=reward, mask=torch.ones(2, 1), group=[0, 0])
    assert DynamicSampling()._differs(batch).tolist() == [True, True]
    assert DynamicSampling(channel=1)._differs(batch).tolist() == [True, True]
    assert DynamicSampling(channel=0)._differs(batch).tolist() == [False, False]


def test_groups_too_small_are_refused_when_the_method_is_built() -> None:
    with pytest.raises(CallError, match="rloo needs at least 2 samples per prompt"):
        get_method("rloo").but("mine", sampler=Fresh(group_size=1))
    with pytest.raises(CallError, match="at least 2 samples per prompt"):
        get_method("grpo").but("mine", sampler=Fresh())
    with pytest.raises(CallError, match="at least 2 samples per prompt"):
        get_method("reinforce").but("mine", sampler=DynamicSampling(group_size=1))
    assert Fresh().requires == frozenset()
    assert Update().epochs == 1
