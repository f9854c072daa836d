"""Details of samplers: what they ask for by default, when they stop, what they compare, and which groups are too small."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.interfaces import Plan
from polopt.part import Can, Part
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.reward.overlong import SoftOverlong
from polopt.parts.sampler.dynamic import DynamicSampling
from polopt.parts.sampler.fresh import Fresh
from polopt.parts.sampler.spare import Spare
from polopt.registry import get_method

torch.set_num_threads(1)


def test_samplers_ask_for_groups() -> None:
    assert Fresh().requires == frozenset()  # the default group is one row
    assert Fresh(group_size=2).requires == {Can.GROUPS}
    assert DynamicSampling().requires == {Can.GROUPS, Can.REFILL}
    (request,) = next(Fresh()(Plan(1, lambda n: [7] * n)))
    assert (request.item, request.count) == (7, 1)
    asked = next(DynamicSampling()(Plan(2, lambda n: [7, 8][:n])))
    assert [(r.item, r.count) for r in asked] == [(7, 8), (8, 8)]


def alike(value: float) -> Batch:
    return Batch.of(reward=torch.full((8,), float(value)), mask=torch.ones(8, 1), group=[0] * 8)


def test_dynamic_sampling_stops_after_ten_rounds() -> None:
    """Nothing ever differs: the tenth batch is used as it is."""
    sampling, rounds = DynamicSampling()(Plan(1, lambda n: list(range(n)))), 1
    next(sampling)
    for _ in range(9):
        sampling.send(alike(rounds))
        rounds += 1
    with pytest.raises(StopIteration) as stop:
        sampling.send(alike(rounds))
    assert stop.value.value["policy"].outcome().tolist() == [10.0] * 8


def test_dynamic_sampling_compares_the_sum_of_all_channels() -> None:
    """By default channels that cancel out are alike; one channel is compared over valid decisions alone."""
    reward = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [9.0, 9.0]]])
    batch = Batch.of(reward=reward, mask=torch.tensor([[1, 1], [1, 0]]), group=[0, 0])
    assert DynamicSampling()._differs(batch).tolist() == [False, False]
    assert DynamicSampling(channel=0)._differs(batch).tolist() == [True, True]
    same = replace(batch, reward=torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [9.0, 9.0]]]))
    assert DynamicSampling(channel=0)._differs(same).tolist() == [False, False]
    later = replace(batch, reward=torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [9.0, 9.0]]]))
    assert DynamicSampling(channel=0)._differs(later).tolist() == [False, False]  # the sum over the row


def test_dynamic_sampling_of_one_or_two_samples() -> None:
    with pytest.raises(CallError, match="at least 2 samples per prompt"):
        get_method("reinforce").but("mine", sampler=DynamicSampling(group_size=1))
    get_method("reinforce").but("mine", sampler=DynamicSampling(group_size=2))


def test_groups_of_one_are_refused_and_of_two_are_not() -> None:
    grpo, rloo = get_method("grpo"), get_method("rloo")
    for method in (grpo, rloo):
        method.but("mine", sampler=Fresh(group_size=2))
    with pytest.raises(CallError, match="a baseline within groups needs at least 2 samples"):
        grpo.but("mine", sampler=Fresh(group_size=1))
    with pytest.raises(CallError, match="rloo needs at least 2 samples"):
        rloo.but("mine", sampler=Fresh(group_size=1))
    get_method("reinforce").but("mine", sampler=Fresh(group_size=1), advantage=GroupBaseline("batch", "batch"))

    @dataclass(frozen=True)
    class Whole(Part):
        """A sampler that says nothing about groups."""

        kind: ClassVar[str] = "sampler"
        name: ClassVar[str] = "whole"

    grpo.but("mine", sampler=Whole())


def test_one_sample_more_than_is_trained_on() -> None:
    """Eight are trained on by default, nine are drawn; a reward that changes scores afterwards is refused, none is not."""
    part = Spare()
    assert part.requires == {Can.GROUPS, Can.EPISODES}
    assert part.host
    assert [(r.item, r.count) for r in next(part(Plan(2, lambda n: [7, 8][:n])))] == [(7, 9), (8, 9)]
    method = get_method("mc-grpo")
    assert part.validate(method, method.update()) is None
    changed = get_method("grpo").but("mine", reward=SoftOverlong())
    assert "which reward 'soft-overlong' changes" in str(part.validate(changed, changed.update()))
