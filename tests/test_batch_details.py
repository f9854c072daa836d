"""Details of pooling: units without members, variances with too few of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polopt.batch import Batch

torch.set_num_threads(1)
NEGATIVE = torch.tensor([[-3.0, -1.0], [-2.0, -5.0], [-4.0, -6.0]])


@pytest.mark.parametrize("how", ["max", "min", "mean", "sum", "std", "var", "count"])
def test_units_without_members_give_zero(how: Any) -> None:
    """A row without decisions, a group of such rows, a batch of them: 0, not the fill of an extreme."""
    batch = Batch.of(mask=torch.tensor([[1, 1], [0, 0], [0, 0]]), group=[0, 1, 1])
    assert batch.pool(NEGATIVE, "row", how)[1:].tolist() == [[0.0, 0.0]] * 2
    assert batch.pool(NEGATIVE, "group", how)[1:].tolist() == [[0.0, 0.0]] * 2
    assert batch.pool(NEGATIVE[:, 0], "group", how)[1:].tolist() == [0.0, 0.0]
    nothing = Batch.of(mask=torch.zeros(3, 2))
    assert nothing.pool(NEGATIVE, "batch", how).tolist() == [[0.0, 0.0]] * 3


def test_extremes_are_of_members_alone() -> None:
    batch = Batch.of(mask=torch.tensor([[1, 0], [1, 1], [0, 1]]), group=[0, 0, 1])
    for by, high, low in (
        ("row", [-3.0, -2.0, -6.0], [-3.0, -5.0, -6.0]),
        ("group", [-2.0, -2.0, -6.0], [-5.0, -5.0, -6.0]),
        ("batch", [-2.0] * 3, [-6.0] * 3),
    ):
        assert batch.pool(NEGATIVE, by, "max")[:, 0].tolist() == high
        assert batch.pool(NEGATIVE, by, "min")[:, 0].tolist() == low


@pytest.mark.parametrize("by", ["row", "group"])
def test_a_variance_needs_more_members_than_it_loses(by: str) -> None:
    """Members 1 and 5: 4 over all, 8 as a sample, and 0 where two degrees of freedom are taken from two."""
    batch = Batch.of(mask=torch.ones(1, 2), group=[0])
    x = torch.tensor([[1.0, 5.0]])
    for ddof, var in ((0, 4.0), (1, 8.0), (2, 0.0), (3, 0.0)):
        assert batch.pool(x, by, "var", ddof=ddof).tolist() == [[var, var]]
        torch.testing.assert_close(batch.pool(x, by, "std", ddof=ddof), torch.full((1, 2), var).sqrt())
