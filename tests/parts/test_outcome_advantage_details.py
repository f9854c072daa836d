"""Advantages of outcomes: what they declare, whose rows and decisions count, and their values where nothing is known."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError, MissingStatistic
from polopt.memory import Memory
from polopt.part import Can, Part
from polopt.parts.advantage.beta_normalised import BetaNormalised
from polopt.parts.advantage.channels import outcomes, pooled
from polopt.parts.advantage.control import GroupWithControl
from polopt.parts.advantage.decoupled import Decoupled
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.advantage.grouped import groups_of_one
from polopt.parts.advantage.improvement import Improvement
from polopt.parts.advantage.median import MedianBaseline
from polopt.parts.advantage.optimal_value import OptimalAdvantage, SoftValue, soft_value
from polopt.parts.sampler.fresh import Fresh
from polopt.registry import get_method

torch.set_num_threads(1)
F64 = torch.float64
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()


def of_rows(rewards: list[float], group: list[int], mask: Tensor = MASK, **more: Any) -> Batch:
    """Rows with these rewards at their first decision; 9 where there is none."""
    reward = torch.where(mask, 0.0, torch.tensor(9.0, dtype=F64))
    for i, r in enumerate(rewards):
        if bool(mask[i].any()):
            reward[i, int(mask[i].int().argmax())] = r
    return Batch.of(reward=reward, mask=mask, group=group, **more)


def with_items(batch: Batch, items: list[int]) -> Batch:
    return batch.with_key("item", torch.tensor(items))


# -------------------------------------------------------------------- what is declared
@pytest.mark.parametrize(
    ("part", "reads", "requires"),
    [
        *(
            (p, {"group"}, {Can.EPISODES, Can.GROUPS})
            for p in (BetaNormalised(), Decoupled(), MedianBaseline(), GroupWithControl())
        ),
        (Improvement(), {"group", "improvement"}, {Can.EPISODES, Can.GROUPS}),
        (OptimalAdvantage(), {"item"}, {Can.EPISODES}),
        (SoftValue(), {"item"}, {Can.EPISODES}),
    ],
)
def test_declared(part: Part, reads: set[str], requires: set[Can]) -> None:
    """They judge whole rows by their outcomes, and ask for no statistic of a policy."""
    assert (part.reads, part.requires, part.needs, part.rows) == (reads, requires, set(), True)


@pytest.mark.parametrize("part", [BetaNormalised(), Decoupled(), MedianBaseline(), GroupBaseline()])
def test_two_answers_are_the_fewest_to_compare(part: Part) -> None:
    grpo = get_method("grpo")
    with pytest.raises(CallError, match=r"needs at least 2 samples per prompt, but sampler\.group_size = 1"):
        grpo.but("x", advantage=part, sampler=Fresh(group_size=1))
    pair = grpo.but("x", advantage=part, sampler=Fresh(group_size=2))
    assert groups_of_one(pair) is None
    assert groups_of_one(SimpleNamespace(sampler=None)) is None  # type: ignore[arg-type]  # no sampler that draws groups
    assert part.validate(pair, pair.update()) is None


# -------------------------------------------------------------------- channels
def test_outcomes_by_channel() -> None:
    reward = torch.arange(30, dtype=F64).reshape(5, 3, 2)
    found = outcomes(Batch.of(reward=reward, mask=MASK))
    assert found.tolist() == [[6.0, 9.0], [6.0, 7.0], [26.0, 28.0], [0.0, 0.0], [52.0, 54.0]]
    with pytest.raises(MissingStatistic, match="the batch has no reward: pass reward="):
        outcomes(Batch.of(mask=MASK))


def test_statistics_by_channel() -> None:
    """Groups {0, 2} and {1, 4}; row 3 has no decision and does not count."""
    batch = of_rows([0.0] * 5, [0, 1, 0, 1, 1])
    x = torch.tensor([[1.0, 10], [2, 0], [5, 20], [99, 99], [4, 6]], dtype=F64)
    assert pooled(batch, x, "mean").tolist() == [[3, 15], [3, 3], [3, 15], [3, 3], [3, 3]]
    assert pooled(batch, x, "std").tolist() == [[2, 5], [1, 3], [2, 5], [1, 3], [1, 3]]
    assert pooled(batch, x, "std", ddof=1)[0].tolist() == pytest.approx([math.sqrt(8), math.sqrt(50)])
    assert pooled(batch, x, "max", "batch").tolist() == [[5, 20]] * 5


# -------------------------------------------------------------------- control rows
def test_control_rows_count_one_and_leave_the_others_alone() -> None:
    """Only valid decisions of rows with a positive mark; a mark of 0 or below is none."""
    batch = of_rows([1.0, 0.0, 0.0, 7.0, 3.0], [0, 0, 1, 1, 1])
    plain = GroupBaseline()(batch)
    assert torch.equal(GroupWithControl()(batch), plain)
    marks = torch.tensor([0.0, 1.0, 0.25, 1.0, -1.0])
    found = GroupWithControl()(replace(batch, row={"control": marks}))
    assert found[1].tolist() == [1.0, 0.0, 0.0]
    assert found[2].tolist() == [1.0, 1.0, 0.0]
    assert found[3].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(found[[0, 4]], plain[[0, 4]])
    assert GroupWithControl.conditions == ("control-rows",)


# -------------------------------------------------------------------- policy improvement
def improved(rewards: list[float], group: list[int], xi: float, mask: Tensor = MASK) -> Batch:
    return of_rows(rewards, group, mask, row={"improvement": torch.full((len(rewards),), xi, dtype=F64)})


def test_improvement_worked_out() -> None:
    """Group {0, 1, 2}: outcomes 3, 0, 0, deviations 2, -1, -1, of size 4/3: a = 1.5, -0.75, -0.75; row 3 is empty, row 4 alone."""
    a = torch.tensor([1.5, -0.75, -0.75, 0.0, 0.0], dtype=F64)[:, None]
    for xi, phi in ((8.0, 8.0), (0.0, 0.0), (-8.0, -0.8)):
        found = Improvement()(improved([3.0, 0.0, 0.0, 5.0, 1.0], [0, 0, 0, 0, 1], xi))
        torch.testing.assert_close(found, torch.where(MASK, phi * a, 0.0))
    assert torch.equal(found != 0, MASK & (a != 0))  # padding is exactly 0
    cut = Improvement(bound=7.0)(improved([3.0, 0.0, 0.0, 5.0, 1.0], [0, 0, 0, 0, 1], 8.0))[:, 0]
    assert cut.tolist() == pytest.approx([7.0, -6.0, -6.0, 0.0, 0.0])
    cut = Improvement(bound=7.0)(improved([0.0, 3.0, 3.0, 5.0, 1.0], [0, 0, 0, 0, 1], 8.0))[:, 0]
    assert cut.tolist() == pytest.approx([-7.0, 6.0, 6.0, 0.0, 0.0])


def test_equal_outcomes_whose_mean_is_rounded_earn_nothing() -> None:
    """0.1 + 0.1 + 0.1 is not three times 0.1: divided by its own size the difference would count in full."""
    batch = improved([0.1, 0.1, 0.1, 1.0, 0.0, 0.5], [0, 0, 0, 1, 1, 2], 2.0, torch.ones(6, 2).bool())
    assert float(batch.pool(batch.outcome(), "group", "mean")[0]) != 0.1
    assert Improvement().attribution(batch).tolist() == [0.0, 0.0, 0.0, 1.0, -1.0, 0.0]


# -------------------------------------------------------------------- values of items
@pytest.mark.parametrize(
    ("beta", "other", "expected"),
    [(0.5, 0.0, 0.5 * math.log((math.exp(2) + 1) / 2)), (math.inf, 0.0, 0.5), (0.0, -3.0, 1.0)],
)
def test_one_earlier_sample_counts_as_one(beta: float, other: float, expected: float) -> None:
    """Of item 0 one sample, 1, is known and one more comes; items 1 and 2 keep their values, also where nothing was sampled."""
    value, count = torch.tensor([1.0, 7.0, 0.25], dtype=F64), torch.tensor([1.0, 0.0, 4.0], dtype=F64)
    found, total = soft_value(torch.tensor([other], dtype=F64), torch.tensor([0]), beta, value, count)
    assert found.tolist() == [pytest.approx(expected), 7.0, 0.25]
    assert total.tolist() == [2.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.5, 0.5 * math.log((4 * math.exp(0.5) + math.exp(2)) / 5)), (math.inf, 0.4), (0.0, 1.0)]
)
def test_earlier_samples_count_as_many(beta: float, expected: float) -> None:
    """Four of value 1/4, and one of 1, which is the best of them."""
    old = torch.tensor([0.25], dtype=F64), torch.tensor([4.0], dtype=F64)
    found, total = soft_value(torch.tensor([1.0], dtype=F64), torch.tensor([0]), beta, *old)
    assert (float(found), float(total)) == (pytest.approx(expected), 5.0)


def test_samples_are_rows_with_decisions() -> None:
    """Item 0: rewards 1 and 0, beta = 1/2 unless told; the empty row of item 1 is no sample, so nothing is known of it."""
    part = SoftValue()
    memory = Memory({"advantage": part}, 3)
    assert {k: v.tolist() for k, v in memory.of("advantage").items()} == {"value": [0.0] * 3, "count": [0.0] * 3}
    batch = with_items(of_rows([1.0, 0.0, 3.0, 5.0, 3.0], [0] * 5), [0, 0, 2, 1, 2])
    found = part.observe("scored", batch=batch, memory=memory.of("advantage"))
    assert found["value"].tolist() == pytest.approx([0.5 * math.log((math.exp(2) + 1) / 2), 0.0, 3.0])
    assert found["count"].tolist() == [2.0, 0.0, 2.0]
    assert part.moments == {"scored"}


def test_advantage_over_the_value_of_an_item() -> None:
    """Item 1 is the only known one, and stands in for the others; decisions outside the mask have no advantage."""
    batch = with_items(of_rows([1.0, 0.0, 3.0, 5.0, 2.0], [0] * 5), [0, 1, 1, 1, 2])
    memory = {"value": torch.tensor([9.0, 0.5, -4.0], dtype=F64), "count": torch.tensor([0.0, 1.0, 0.0], dtype=F64)}
    found = OptimalAdvantage()(batch, memory)
    expected = torch.tensor([0.5, -0.5, 2.5, 0.0, 1.5], dtype=F64)[:, None]
    assert torch.equal(found, torch.where(MASK, expected, 0.0))
    known = OptimalAdvantage()(batch, {**memory, "count": torch.tensor([1.0, 1.0, 0.0], dtype=F64)})
    assert known[:, 0].tolist() == [-8.0, -0.5, 2.5, 0.0, 2.0 - 4.75]
