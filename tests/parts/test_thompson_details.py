"""Thompson sampling of prompts, step by step: what is drawn, who comes last, what is counted and what is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.batch import HEATED, HINTED, OWN, Batch, Clock
from polopt.interfaces import Plan
from polopt.memory import Memory
from polopt.part import Can
from polopt.parts.allocator.thompson import SMALLEST, Thompson, information

torch.set_num_threads(1)
F64 = torch.float64
SURE = 1e9


def memory_of(items: int, **columns: Any) -> dict[str, Tensor]:
    found = dict(Memory({"a": Thompson()}, items).of("a"))
    return {**found, **{k: torch.as_tensor(v, dtype=F64) for k, v in columns.items()}}


def certain(*p: float, **columns: Any) -> dict[str, Tensor]:
    """Beliefs that draw these probabilities."""
    x = torch.tensor(p, dtype=F64)
    return memory_of(len(p), alpha=SURE * x, beta=SURE * (1 - x), **columns)


def never(n: int) -> list[int]:
    raise AssertionError("the stream was asked")


def ask(
    part: Thompson, memory: dict[str, Tensor], prompts: int, asked: Sequence[int] = (), draw: Callable[[int], list[int]] = never,
    seed: int = 0,
) -> list[int]:  # fmt: skip
    plan = Plan(prompts, draw, size=len(memory["alpha"]))
    items, counts = part(plan, prompts, 3, torch.tensor(asked, dtype=torch.long), memory, np.random.default_rng(seed))
    assert counts.tolist() == [3] * prompts
    assert counts.dtype == items.dtype == torch.long
    return items.tolist()


def answered(items: list[int], reward: list[float], update: int = 0, **more: Any) -> Batch:
    """Two decisions each, of which the second has the reward."""
    given = torch.tensor([[0.0, r] for r in reward], dtype=torch.float32)
    batch = Batch.of(reward=given, mask=torch.ones(len(items), 2))
    return replace(batch, keys={"item": torch.tensor(items)}, clock=Clock(update), **more)


def test_declared() -> None:
    part = Thompson()
    assert (part.requires, part.needs, part.moments, part.host) == ({Can.ITEMS}, set(), {"answered", "stepped"}, True)
    assert part.table == {"alpha": 1.0, "beta": 1.0, "last": 0.0, "visits": 0.0}


def test_gains() -> None:
    p = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(information(p), torch.tensor([0, 0.2 * 0.64, 0.125, 0], dtype=F64))
    torch.testing.assert_close(information(p, "variance"), torch.tensor([0, 0.16, 0.25, 0], dtype=F64))


# -------------------------------------------------------------------- choosing
@pytest.mark.parametrize("seed", range(4))
def test_the_largest_drawn_gains_are_asked(seed: int) -> None:
    """One draw per prompt from its belief, in the order of the items."""
    rng = np.random.default_rng(100 + seed)
    alpha, beta = rng.uniform(0.5, 4, 12), rng.uniform(0.5, 4, 12)
    p = np.random.default_rng(seed).beta(alpha, beta)
    found = ask(Thompson(), memory_of(12, alpha=alpha, beta=beta), 5, seed=seed)
    assert found == np.argsort(-p * (1 - p) ** 2)[:5].tolist()


def test_defaults_follow_the_paper_and_leave_the_stream_alone() -> None:
    """p (1-p)^2 prefers 0.3 to 0.5; no prompt comes from the stream, and none was asked too often."""
    memory = certain(0.5, 0.3, 0.01, visits=[9.0, 9.0, 0.0])
    assert ask(Thompson(), memory, 3) == [1, 0, 2]
    assert ask(Thompson(gain="variance"), memory, 3) == [0, 1, 2]


def test_those_that_were_asked_come_later_and_those_at_the_cap_last() -> None:
    """From the best: 0 at the cap, 1 asked twice, 2 asked once, 3 both capped and asked, 4 and 5 neither."""
    p = (0.33, 0.30, 0.25, 0.2, 0.1, 0.05)
    memory = certain(*p, visits=[2.0, 0, 0, 3.0, 1.0, 0.0])
    asked = [1, 2, 1, 3]
    assert ask(Thompson(), memory, 6, asked) == [0, 4, 5, 2, 3, 1]
    assert ask(Thompson(cap=2), memory, 6, asked) == [4, 5, 2, 1, 0, 3]
    assert ask(Thompson(cap=2), memory, 6) == [1, 2, 4, 5, 0, 3]
    assert ask(Thompson(cap=1), memory, 3) == [1, 2, 5]


def test_equal_promises_have_random_ranks() -> None:
    """Also in the second sort: many prompts of the same gain keep the order of one permutation."""
    memory = memory_of(64, alpha=[1e30] * 64)
    rng = np.random.default_rng(7)
    p = rng.beta(memory["alpha"].numpy(), memory["beta"].numpy())
    assert (p == 1.0).all()
    assert ask(Thompson(), memory, 64, seed=7) == rng.permutation(64).tolist()


def test_prompts_from_the_stream_come_first_and_once() -> None:
    """Half of five is two (of a half to the even one); the stream repeats itself, and the belief fills up."""
    wanted: list[int] = []

    def draw(n: int) -> list[int]:
        wanted.append(n)
        return [4, 4, 1][:n]

    memory = certain(0.33, 0.30, 0.25, 0.2, 0.01)
    assert ask(Thompson(uniform=0.5), memory, 5, draw=draw) == [4, 0, 1, 2, 3]
    assert ask(Thompson(uniform=1.0), memory, 3, draw=draw) == [4, 1, 0]
    assert wanted == [2, 3]


@pytest.mark.parametrize(("prompts", "expected"), [(1, [1]), (3, [1, 0, 2]), (4, [1, 0, 2, 1]), (6, [1, 0, 2, 1, 0, 2])])
def test_more_prompts_than_there_are(prompts: int, expected: list[int]) -> None:
    assert ask(Thompson(), certain(0.2, 0.3, 0.9), prompts) == expected


# -------------------------------------------------------------------- beliefs
def test_answers_move_the_belief_of_their_prompt() -> None:
    """Prompt 0: outcomes 1, 0.25, 0 (clipped from -2) and 1 (from 5) of four; prompt 1 is left as it is, 2 has one of one."""
    part, memory = (
        Thompson(lam_s=0.5),
        memory_of(3, alpha=[3.0, 4.0, 2.0], beta=[5.0, 6.0, 8.0], visits=[0.0, 0.0, 0.0], last=[0, 2, 4]),
    )
    found = part.observe("answered", batch=answered([0, 0, 2, 0, 0], [1.0, 0.25, 1.0, -2.0, 5.0], 6), memory=memory)
    assert {k: v.tolist() for k, v in found.items()} == {
        "alpha": [1.5 + 2.25, 4.0, 2.0], "beta": [2.5 + 1.75, 6.0, 4.0], "last": [7.0, 2.0, 7.0], "visits": [1.0, 0.0, 1.0],
    }  # fmt: skip
    assert found["alpha"].dtype == F64


def test_one_hinted_decision_takes_its_row_out() -> None:
    source = torch.tensor([[OWN, OWN], [HINTED, OWN], [OWN, HEATED]])
    found = Thompson(lam_s=1.0).observe("answered", batch=answered([0, 0, 1], [1.0, 1.0, 1.0], source=source), memory=memory_of(3))
    assert found["alpha"].tolist() == [2.0, 1.0, 1.0]
    assert found["last"].tolist() == [1.0, 0.0, 0.0]
    assert found["visits"].tolist() == [1.0, 0.0, 0.0]


def test_beliefs_of_others_drift_at_the_end_of_an_iteration() -> None:
    """Asked in this iteration, the third: none; before it, or never: towards 1, from above and below."""
    memory = memory_of(4, alpha=[3.0, 3.0, 0.2, 1.0], beta=[5.0, 5.0, 1.0, 0.6], last=[3.0, 2.0, 0.0, 4.0])
    found = Thompson(lam_g=0.5).observe("stepped", batch=answered([0], [1.0], 2), memory=memory)
    assert set(found) == {"alpha", "beta"}
    assert found["alpha"].tolist() == pytest.approx([3.0, 2.0, 0.6, 1.0])
    assert found["beta"].tolist() == pytest.approx([5.0, 3.0, 1.0, 0.8])


@pytest.mark.parametrize("moment", ["answered", "stepped"])
def test_no_belief_falls_below_a_floor(moment: Any) -> None:
    memory = memory_of(3, alpha=[1e-4, 1.0, 1e-4], beta=[1.0, 1e-4, 1e-4], last=[1.0] * 3)
    found = Thompson(lam_s=0.0).observe(moment, batch=answered([1], [1.0]), memory=memory)
    assert SMALLEST == 1e-3
    assert found["alpha"].tolist() == [1e-3, 1.0, 1e-3]
    assert found["beta"].tolist() == [1.0, 1e-3, 1e-3]


@pytest.mark.parametrize(
    ("before", "after"), [([0.0, 1, 0, 0], [1.0, 2, 0, 0]), ([0.0, 1, 1, 0], [0.0] * 4), ([2.0, 3, 1, 1], [0.0] * 4)]
)
def test_an_epoch_ends_with_as_many_visits_as_items(before: list[float], after: list[float]) -> None:
    """A visit is a prompt in an iteration, however many answers it gets."""
    batch = answered([0, 0, 0, 1], [1.0] * 4)
    assert Thompson().observe("answered", batch=batch, memory=memory_of(4, visits=before))["visits"].tolist() == after
