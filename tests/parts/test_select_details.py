"""Rows that leave the loss because others stand for them: the one in the middle of its group, and replaced ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.parts.select.middle import DropMiddle
from polopt.parts.select.replaced import DropReplaced

MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]]).bool()


def at(**row: Tensor) -> Batch:
    return Batch.of(logp=torch.zeros(4, 3), mask=MASK, row=row)


@pytest.mark.parametrize(("part", "name"), [(DropMiddle(), "middle"), (DropReplaced(), "replaced")])
def test_marked_rows_leave_and_padding_stays_padding(part: Any, name: str) -> None:
    found = part(at(**{name: torch.tensor([0.0, 1.0, 1.0, 0.0])}))
    assert found.tolist() == (MASK & torch.tensor([[True], [False], [False], [True]])).tolist()
    assert found.dtype == torch.bool
    assert torch.equal(part(at(**{name: torch.zeros(4)})), MASK)
    assert torch.equal(part(at()), MASK)  # without the column
    assert torch.equal(part(at(other=torch.ones(4))), MASK)


def test_the_middle_is_kept_where_that_is_wanted() -> None:
    marked = at(middle=torch.ones(4))
    assert torch.equal(DropMiddle(keep=True)(marked), MASK)
    assert not DropMiddle()(marked).any()
    assert not DropMiddle().keep
    assert DropMiddle().reads == {"middle"}
    assert DropReplaced().conditions == ("control-rows",)
