"""Helpers of parts that work on transitions: discounts, pools of members, expectations over actions."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from fake_nets import FakeNets, linear, transitions
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.parts.transitions import Pool, discount, expected, following, of_actions, pooled, rewards, seen, taken, valued

F64 = torch.float64


def rows(**columns: Any) -> Batch:
    """Two rows of three decisions, the second row's folded over three steps each; two reward channels."""
    made: dict[str, Any] = {
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "reward": torch.arange(12.0, dtype=F64).view(2, 3, 2),
        "terminated": torch.tensor([[False, True, False], [False, False, True]]),
        "truncated": torch.tensor([[False, False, True], [True, False, False]]),
        "obs": torch.arange(12.0).view(2, 3, 2),
        "next_obs": torch.arange(12.0).view(2, 3, 2) + 100,
        "action": torch.arange(6.0).view(2, 3, 1),
        "row": {"steps": torch.tensor([1.0, 3.0], dtype=F64)},
    }
    return Batch(**{**made, **columns})


def test_decisions_are_listed_row_by_row() -> None:
    batch = rows()
    assert rewards(batch).tolist() == [1.0, 5.0, 9.0, 13.0, 17.0, 21.0]
    assert seen(batch).tolist() == [[2.0 * k, 2.0 * k + 1] for k in range(6)]
    assert following(batch).tolist() == [[2.0 * k + 100, 2.0 * k + 101] for k in range(6)]
    assert taken(batch).tolist() == [[float(k)] for k in range(6)]
    assert taken(rows(action=torch.arange(6).view(2, 3))).tolist() == [*range(6)]
    torch.testing.assert_close(discount(batch, 0.9), torch.tensor([0.9, 0.0, 0.9, 0.729, 0.729, 0.0], dtype=F64))

    batch = rows(row={})
    g = discount(batch, 0.9)
    assert g.dtype == torch.get_default_dtype()
    torch.testing.assert_close(g, 0.9 * torch.tensor([1.0, 0, 1, 1, 1, 0]))
    ended = torch.tensor([[False], [False], [True]])
    one = transitions(3, terminated=ended, row={"steps": torch.tensor([1.0, 3.0, 2.0], dtype=F64)})
    torch.testing.assert_close(discount(one, 0.9), torch.tensor([0.9, 0.729, 0.0], dtype=F64))


def test_what_a_batch_lacks_is_named() -> None:
    with pytest.raises(CallError, match="no next observations"):
        following(rows(next_obs=None))
    with pytest.raises(CallError, match="which decisions ended an episode"):
        discount(rows(terminated=None), 0.9)


POOLS: dict[Pool, list[float]] = {"first": [2.0, -1.0], "min": [1.0, -1.0], "mean": [3.0, 0.5]}
OF_ACTIONS: dict[Pool, list[list[float]]] = {
    "first": [[1.0, 3.0], [0.0, -2.0]], "min": [[0.0, 2.0], [-1.0, -2.0]], "mean": [[7 / 3, 11 / 3], [1.0, 0.0]],
}  # fmt: skip


def test_pools_by_hand() -> None:
    """[3,2,2]: three members' two atoms (or actions) of two decisions; every pool that can be chosen."""
    values = torch.tensor([[[1.0, 3.0], [0.0, -2.0]], [[0.0, 2.0], [4.0, 2.0]], [[6.0, 6.0], [-1.0, 0.0]]])
    assert set(get_args(Pool)) == set(POOLS) == set(OF_ACTIONS)
    for how, found in POOLS.items():
        torch.testing.assert_close(pooled(values, how), torch.tensor(found))
        torch.testing.assert_close(pooled(values[:, :1], how), torch.tensor(found[:1]))  # a single decision
        torch.testing.assert_close(of_actions(values, how), torch.tensor(OF_ACTIONS[how]))
        assert pooled(torch.tensor([[[1.0], [5.0]]]), how).tolist() == [1.0, 5.0]  # one member, one atom


def test_members_that_are_not_read_are_not_computed() -> None:
    def never(o: Tensor, a: Tensor | None) -> Tensor:
        raise AssertionError("was asked")

    made, (o, a) = FakeNets(nets={"critic": [linear(2.0), never]}), torch.randn(2, 4, 1, dtype=F64)
    torch.testing.assert_close(valued(made, "critic", o, a, pool="first"), o[:, 0] + 2 * a[:, 0])
    with pytest.raises(AssertionError, match="was asked"):
        valued(made, "critic", o, a, pool="min")


def test_expectation_by_hand() -> None:
    log_probs = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]], dtype=F64).log()
    x = torch.tensor([[4.0, 8.0, math.inf], [-1.0, 2.0, math.nan]], dtype=F64)
    torch.testing.assert_close(expected(log_probs, x), torch.tensor([7.0, 0.5], dtype=F64))
