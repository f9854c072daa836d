"""AEPO's sampler in small: what it asks for, how many answers come in, what it remembers, and which columns rows keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import HEATED, OWN, Batch
from polopt.interfaces import Plan, Request
from polopt.part import Can
from polopt.parts.sampler.entropy_control import EntropyControl, is_replaced, mixed

torch.set_num_threads(1)
F64 = torch.float64


def rows(*groups: Sequence[float], **row: Sequence[float]) -> Batch:
    """One group per list, one row of three decisions per outcome; actions number the rows."""
    flat = torch.tensor([r for g in groups for r in g])
    batch = Batch(
        mask=torch.ones(len(flat), 3, dtype=torch.bool), reward=torch.stack([0 * flat, 0 * flat, flat], 1)[..., None],
        action=torch.arange(len(flat))[:, None].expand(-1, 3), row={k: torch.tensor(v) for k, v in row.items()}, horizon=3,
    )  # fmt: skip
    return batch.with_key("group", torch.tensor([k for k, g in enumerate(groups) for _ in g]))


USUAL = rows([1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0])


def drive(part: EntropyControl, h: float, control: Batch | None, usual: Batch = USUAL, prompts: int = 3) -> tuple[Batch, list[Any]]:
    """The batch that the sampler returns, and what it asked for."""
    sampling = part(Plan(prompts, lambda n: list(range(10, 10 + n))), {"entropy": torch.tensor(h, dtype=F64)})
    asked: list[Sequence[Request]] = [next(sampling)]
    try:
        asked.append(sampling.send(usual))
        assert control is not None
        sampling.send(control)
    except StopIteration as stop:
        return stop.value["policy"], [[(r.item, r.count, r.temperature) for r in a] for a in asked]
    raise AssertionError("it asked a third time")


# -------------------------------------------------------------------- declarations
def test_defaults_and_declarations() -> None:
    part = EntropyControl()
    assert (part.group_size, part.target, part.hot, part.cold) == (8, 0.5, 1.2, 0.8)
    assert (part.samples, part.share, part.threshold) == (60, 0.25, 0.05)
    assert part.needs == {"entropy@now"}
    assert part.requires == {Can.GROUPS, Can.REFILL}
    assert part.moments == {"minibatch", "stepped"}
    assert part.host
    assert part.initial() == {"entropy": 0.0, "sum": 0.0, "count": 0.0}
    assert {x.dtype for x in part.initial().values()} == {F64}


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"group_size": 1}, "needs at least 2 samples per prompt to tell right from wrong, but sampler.group_size = 1"),
        ({"group_size": 1, "samples": 0}, None),
        ({"group_size": 2}, None),
        ({"hot": 0.8, "cold": 0.8}, None),
        ({"hot": 0.75}, "hot = 0.75 is below cold = 0.8"),
    ],
)
def test_refusals(chosen: dict[str, Any], words: str | None) -> None:
    assert EntropyControl(**chosen).validate(None, None) == words


# -------------------------------------------------------------------- what it asks for
@pytest.mark.parametrize(("prompts", "share", "again"), [(3, 0.25, 1), (8, 0.25, 2), (7, 0.5, 3), (4, 1.0, 4), (1, 0.01, 1)])
def test_a_share_of_the_prompts_is_asked_again(prompts: int, share: float, again: int) -> None:
    """Rounded down, but one at least."""
    _, asked = drive(EntropyControl(group_size=4, share=share), 0.0, rows([0.0] * 4), prompts=prompts)
    assert asked == [[(10 + i, 4, None) for i in range(prompts)], [(10 + i, 4, 1.2) for i in range(again)]]


@pytest.mark.parametrize(("h", "heat"), [(0.7, 3.0), (0.71, 0.5)])
def test_the_target_itself_is_still_low(h: float, heat: float) -> None:
    _, asked = drive(EntropyControl(group_size=4, target=0.7, hot=3.0, cold=0.5), h, rows([0.0] * 4))
    assert asked[1] == [(10, 4, heat)]


def test_without_samples_nothing_more_is_asked() -> None:
    batch, asked = drive(EntropyControl(group_size=4, samples=0), 0.0, None)
    assert batch is USUAL
    assert len(asked) == 1


# -------------------------------------------------------------------- what comes in
@pytest.mark.parametrize(
    ("h", "samples", "kept"),
    [
        (0.0, 60, [1, 2, 4, 5, 6]), (0.0, 4, [1, 2, 4, 5]), (0.0, 3, [1, 2, 4]), (0.0, 1, [1]),
        (9.0, 60, [1, 2]), (9.0, 4, [1, 2]), (9.0, 3, [1]), (9.0, 1, []),
    ],
)  # fmt: skip
def test_the_first_right_ones_come_in(h: float, samples: int, kept: list[int]) -> None:
    """Rows 1, 2 and 4, 5, 6 are right in groups that also hold wrong ones; above the target half of them, rounded down."""
    control = rows([0.0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1])
    batch, _ = drive(EntropyControl(group_size=4, samples=samples), h, control)
    assert (batch is USUAL) == (not kept)
    if kept:
        s = len(kept)
        assert batch.action[:s, 0].tolist() == kept
        assert batch.action[s:, 0].tolist() == [i for i in range(12) if i >= 4 * (s // 4)]  # whole groups are gone
        assert batch.row["control"].tolist() == [1.0] * s + [0.0] * (12 - 4 * (s // 4))
        assert batch.row["replaced"].tolist() == [0.0] * s + [1.0] * (s % 4) + [0.0] * (12 - s)
        assert batch.group is not None
        assert batch.group.unique().tolist() == list(range(batch.units["group"]))  # no gaps
        assert set(batch.keys) == set()


def test_no_more_come_in_than_there_were() -> None:
    """Five right ones for a batch of four: nothing usual is left."""
    batch, _ = drive(EntropyControl(group_size=4), 0.0, rows([0.0, 1, 1, 0], [1, 1, 1, 0]), usual=rows([0.0, 0, 0, 1]))
    assert batch.action[:, 0].tolist() == [1, 2, 4, 5]
    assert batch.row["control"].tolist() == [1.0] * 4


def test_an_advantage_at_the_threshold_is_not_above_it() -> None:
    """Groups all right have an advantage of exactly 0."""
    assert drive(EntropyControl(group_size=4, threshold=0.0), 0.0, rows([1.0, 1, 1, 1]))[0] is USUAL
    batch, _ = drive(EntropyControl(group_size=4, threshold=0.0), 0.0, rows([1.0, 0, 0, 0]))
    assert int(batch.row["control"].sum()) == 1


def test_right_is_what_has_a_decision_with_an_advantage() -> None:
    """Padding has an advantage of 0: a right row that ends early is as right."""
    short = replace(rows([1.0, 0, 0, 0]), reward=torch.tensor([1.0, 0, 0, 0])[:, None, None] * torch.tensor([1.0, 0, 0])[:, None])
    short = replace(short, mask=torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]]).bool())
    batch, _ = drive(EntropyControl(group_size=4), 0.0, short)
    assert batch.action[0, 0].item() == 0
    assert batch.mask[0].tolist() == [True, False, False]


# -------------------------------------------------------------------- columns of what was put together
def test_columns_of_the_mixture() -> None:
    """All have the temperature of the usual ones; other columns stay those of the rows."""
    usual = replace(USUAL, row={"temperature": torch.full((12,), 0.7), "length": torch.arange(12.0)})
    control = rows([1.0, 1, 1], temperature=[1.2] * 3, length=[20.0, 21, 22])
    batch = mixed(usual, control)
    assert batch.row["temperature"].tolist() == [pytest.approx(0.7)] * 15
    assert batch.row["length"].tolist() == [20, 21, 22, *range(12)]
    assert batch.group is not None
    assert batch.group.tolist() == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4


@pytest.mark.parametrize("usual", [None, OWN, 5])
@pytest.mark.parametrize("control", [None, HEATED])
def test_provenance_of_the_mixture(usual: int | None, control: int | None) -> None:
    """Without a column the usual answers are the policy's own, where the others have one."""

    def of(batch: Batch, source: int | None) -> Batch:
        return batch if source is None else replace(batch, source=torch.full_like(batch.mask, source, dtype=torch.long))

    found = mixed(of(USUAL, usual), of(rows([1.0]), control)).source
    if control is None:
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == [[control] * 3] + [[OWN if usual is None else usual] * 3] * 12


# -------------------------------------------------------------------- what it remembers
def observed(entropy: Tensor, mask: list[list[int]], memory: dict[str, Tensor], **row: Tensor) -> dict[str, Tensor]:
    batch = Batch(mask=torch.tensor(mask).bool(), stats={"entropy@now": entropy}, row=row)
    return {**memory, **EntropyControl().observe("minibatch", batch=batch, memory=memory)}


def told(memory: dict[str, Tensor]) -> tuple[float, float, float]:
    return float(memory["entropy"]), float(memory["sum"]), float(memory["count"])


def test_the_mean_entropy_of_two_minibatches() -> None:
    """Of valid decisions in rows that were not replaced: 1 + 2 + 4, then 8 alone; afterwards the sums begin again."""
    part, bad = EntropyControl(), math.nan
    entropy = torch.tensor([[1.0, 2.0, bad], [bad, 64.0, 64.0], [4.0, bad, bad]])
    memory = {**part.initial(), "entropy": torch.tensor(0.25, dtype=F64)}
    memory = observed(entropy, [[1, 1, 0], [1, 1, 1], [1, 0, 0]], memory, replaced=torch.tensor([0.0, 1.0, 0.0]))
    assert told(memory) == (0.25, 7.0, 3.0)
    memory = observed(torch.tensor([[8.0, 9.0, 9.0]]), [[1, 0, 0]], memory)
    assert told(memory) == (0.25, 15.0, 4.0)
    memory |= part.observe("stepped", batch=None, memory=memory)
    assert told(memory) == (3.75, 0.0, 0.0)
    memory |= part.observe("stepped", batch=None, memory=memory)
    assert told(memory) == (3.75, 0.0, 0.0)  # of an update without decisions nothing is known
    assert part.observe("drawn", batch=None, memory=memory) == {}


def test_one_decision_is_enough() -> None:
    memory = observed(torch.tensor([[0.5, 9.0]]), [[1, 0]], EntropyControl().initial())
    assert told({**memory, **EntropyControl().observe("stepped", batch=None, memory=memory)}) == (0.5, 0.0, 0.0)


def test_rows_are_replaced_as_wholes() -> None:
    assert is_replaced(USUAL).shape == (12, 1)
    assert not bool(is_replaced(USUAL).any())
    assert is_replaced(replace(USUAL, row={"replaced": torch.tensor([1.0, 0.0, 1.0])})).tolist() == [[True], [False], [True]]
