"""GHPO's sampler in small: its first iterations, what counts as a success, and how much of a hint fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from polopt.batch import Batch, Clock
from polopt.errors import CallError
from polopt.interfaces import Plan, Seen
from polopt.part import Can
from polopt.parts.sampler.hints import CONNECTOR, Hints, _replaced

torch.set_num_threads(1)
SOLUTIONS = {5: "abcdefgh", 6: "ijkl", 7: None, 8: "mnopqrst"}


def drive(part: Hints, right: Callable[[int, str], bool], update: int = 0) -> tuple[Batch, list[list[Any]]]:
    """The batch of the sampler, and its requests: both answers to an item are right if `right(item, prompt)`."""
    look = lambda i: Seen("", SOLUTIONS[i], lambda prompt: True)  # noqa: E731
    sampling = part(Plan(4, lambda n: list(SOLUTIONS)[:n], clock=Clock(update), look=look))
    requests, asked = next(sampling), []
    while True:
        asked.append([(r.item, r.count, r.context) for r in requests])
        items = [(r.item, r.context or "") for r in requests for _ in range(r.count)]
        batch = Batch.of(
            reward=torch.tensor([float(right(int(i or 0), c)) for i, c in items]), mask=torch.ones(len(items), 1),
            group=[g for g, r in enumerate(requests) for _ in range(r.count)],
        )  # fmt: skip
        try:
            requests = sampling.send(replace(batch, keys={"item": torch.tensor([int(i or 0) for i, _ in items])}))
        except StopIteration as stop:
            return stop.value["policy"], asked


def wrong(item: int, prompt: str) -> bool:
    return False


PART = Hints(group_size=2, connector="")


# -------------------------------------------------------------------- declarations
def test_defaults_and_declarations() -> None:
    part = Hints()
    assert (part.group_size, part.stages, part.connector, part.channel) == (8, (0.25, 0.5, 0.75), CONNECTOR, 0)
    assert (part.threshold, part.start, part.fixed, part.fixed_share) == (0.0, 0, 0, 0.5)
    assert part.requires == {Can.GROUPS, Can.REFILL, Can.SOLUTIONS}
    assert part.host


def test_settings_at_and_out_of_range() -> None:
    assert Hints(stages=(0.0, 1.0)).stages == (0.0, 1.0)
    for stages in ((-0.1,), (1.1,), (0.5, -1.0), (1.5, 0.5), (2.0,)):
        with pytest.raises(CallError, match="shares of the solution must be between 0 and 1"):
            Hints(stages=stages)
    with pytest.raises(CallError, match="group_size"):
        Hints(group_size=0)


# -------------------------------------------------------------------- which iterations
@pytest.mark.parametrize(
    ("start", "fixed", "update", "shown", "again"),
    [
        (0, 0, 0, False, True),
        (2, 0, 1, False, False), (2, 0, 2, False, True), (2, 0, 3, False, True),
        (0, 2, 1, True, False), (0, 2, 2, False, True),
        (1, 2, 1, True, False), (3, 2, 1, True, False), (3, 2, 2, False, False), (3, 2, 3, False, True),
    ],
)  # fmt: skip
def test_the_first_iterations(start: int, fixed: int, update: int, shown: bool, again: bool) -> None:
    """`fixed` of them show all that have a solution a half of it; none before max(start, fixed) asks again."""
    batch, asked = drive(PART.but(start=start, fixed=fixed), wrong, update)
    assert asked[0] == [(i, 2, SOLUTIONS[i][: len(SOLUTIONS[i]) // 2] if shown and SOLUTIONS[i] else None) for i in SOLUTIONS]  # type: ignore[index, arg-type]
    assert len(asked) == (4 if again else 1)
    if not again:
        assert batch.row["hint"].tolist() == [0.5 * shown] * 4 + [0.0] * 2 + [0.5 * shown] * 2


# -------------------------------------------------------------------- attempts
def test_attempts_by_hand() -> None:
    """5 needs nothing, 6 a half, 7 has no solution, 8 is hopeless; what was asked again stands behind the rest."""
    batch, asked = drive(PART, lambda i, prompt: i == 5 or prompt == "ij")
    assert asked[1:] == [[(6, 2, "i"), (8, 2, "mn")], [(6, 2, "ij"), (8, 2, "mnop")], [(8, 2, "mnopqr")]]
    assert batch.keys["item"].tolist() == [5, 5, 7, 7, 6, 6, 8, 8]
    assert batch.row["hint"].tolist() == [0.0] * 4 + [0.5] * 2 + [0.75] * 2
    assert batch.group is not None
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.units["group"] == 4
    assert set(batch.keys) == {"item"}


def test_stages_that_reveal_nothing_are_passed_over() -> None:
    """0 and a twentieth reveal no letter of any solution; the whole may be shown."""
    batch, asked = drive(PART.but(stages=(0.0, 0.05, 1.0)), wrong)
    assert asked[1:] == [[(5, 2, "abcdefgh"), (6, 2, "ijkl"), (8, 2, "mnopqrst")]]
    assert batch.row["hint"].tolist() == [0.0] * 2 + [1.0] * 6


def test_where_all_are_asked_again_nothing_of_the_first_answers_is_left() -> None:
    """Not even their length."""
    long, short = (Batch.of(reward=torch.zeros(2), mask=torch.ones(2, t), group=[0, 0]) for t in (3, 1))
    assert _replaced(long, [0], short) is short
    both = Batch.of(reward=torch.zeros(3), mask=torch.ones(3, 3), group=[0, 1, 1])
    assert _replaced(both, [1], short).shape == (3, 3)


# -------------------------------------------------------------------- success
def test_success_is_a_sum_over_valid_decisions_above_the_threshold() -> None:
    """Per row, in each group on its own: 0.75 + 0.75 is above 1, exactly 1 is not, and what is masked does not count."""
    first = torch.tensor(
        [[0.75, 0.75, 0.0], [0.0, 0.0, 0.0], [0.5, 0.5, 9.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.25], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0]]
    )
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]])
    batch = Batch.of(reward=torch.stack([first, first - 1], -1), mask=mask, group=[0, 0, 1, 1, 2, 2, 3])
    assert Hints(threshold=1.0)._solved(batch).tolist() == [True, True, False, False, True, True, False]
    assert Hints(threshold=0.25)._solved(batch).tolist() == [True] * 7
    assert not bool(Hints(threshold=0.25, channel=1)._solved(batch).any())
    assert Hints(threshold=-0.25, channel=None)._solved(batch).tolist() == [True, True, True, True, False, False, True]


def test_another_channel_may_tell_success() -> None:
    batch = Batch.of(reward=torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 2.0]]]), mask=torch.ones(3, 1), group=[0, 1, 2])
    assert Hints()._solved(batch).tolist() == [True, False, False]
    assert Hints(channel=1)._solved(batch).tolist() == [False, False, True]
    assert Hints(channel=None)._solved(batch).tolist() == [True, False, True]


# -------------------------------------------------------------------- what fits
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("room", range(12))
def test_as_much_of_a_hint_as_fits(length: int, room: int) -> None:
    """Q, a colon as connector, and what there is room for; without room for a letter there is no hint at all."""
    piece = "abcdefgh"[:length]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = PART.but(connector=":")._fitting(Seen("Q", piece, lambda prompt: len(prompt) <= room), piece)
    fits = max(0, min(length, room - 2))
    assert found == (f"Q:{piece[:fits]}" if fits else None)
    wanted = f"a hint of {length} characters is cut to {fits}: more do not fit into the model's context"
    assert [str(w.message) for w in told] == ([] if fits == length else [wanted])
