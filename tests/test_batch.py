"""`Batch.of` and its refusals, `pool` against loops, joining, cutting and flattening."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.batch import Batch, Totals
from polopt.columns import last_valid, next_valid, own_flags, place_reward
from polopt.errors import CallError, MissingStatistic
from polopt.registry import get_method

torch.set_num_threads(1)


def random_batch(seed: int, b: int = 5, t: int = 4, groups: int = 3, device_dtype: torch.dtype = torch.float64) -> Batch:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, t, generator=g) < 0.6
    batch = Batch.of(
        stats={"x@old": torch.randn(b, t, generator=g, dtype=device_dtype)},
        mask=mask,
        group=torch.randint(0, groups, (b,), generator=g),
        keys={"episode": torch.randint(0, 2, (b,), generator=g)},
        reward=torch.randn(b, generator=g, dtype=device_dtype),
    )
    return replace(batch, segment=torch.randint(0, t, (b, t), generator=g))


# -------------------------------------------------------------------- making one
def test_outcome_reward_lands_on_the_last_valid_decision() -> None:
    mask = [[1, 1, 0], [1, 0, 1], [0, 0, 0]]
    batch = Batch.of(reward=torch.tensor([2.0, 3.0, 5.0]), mask=torch.tensor(mask))
    assert batch.reward is not None
    assert batch.reward[..., 0].tolist() == [[0, 2, 0], [0, 0, 3], [0, 0, 0]]
    assert batch.outcome().tolist() == [2, 3, 0]
    assert batch.terminated is not None
    assert batch.terminated.tolist() == [[False, True, False], [False, False, True], [False] * 3]
    assert batch.lengths().tolist() == [2, 2, 0]


def test_channels_add_up_in_the_outcome() -> None:
    batch = Batch.of(reward=torch.tensor([[[1.0, 10.0], [2.0, 20.0]]]), mask=torch.tensor([[1, 0]]))
    assert batch.outcome().tolist() == [11.0]
    assert batch.scalar_reward().tolist() == [[11.0, 22.0]]


def test_what_is_outside_the_mask_never_counts() -> None:
    nan = math.nan
    batch = Batch.of(reward=torch.tensor([[1.0, nan], [nan, 2.0]]), mask=torch.tensor([[1, 0], [0, 1]]))
    assert batch.outcome().tolist() == [1.0, 2.0]
    empty = Batch.of(reward=torch.tensor([1.0, nan]), mask=torch.tensor([[1, 1], [0, 0]]))
    assert empty.outcome().tolist() == [1.0, 0.0]
    infinite = Batch.of(reward=torch.tensor([math.inf, 0.0]), mask=torch.ones(2, 3))
    assert infinite.outcome().tolist() == [math.inf, 0.0]  # not NaN: the message about it must show the true number


def test_value_serves_as_old_value_and_is_shifted_for_the_next_state() -> None:
    value = torch.tensor([[1.0, 2.0, 3.0, 9.0]], requires_grad=True)
    batch = Batch.of(value=value, mask=torch.tensor([[1, 0, 1, 0]]))
    assert not batch.stat("value@old").requires_grad
    assert batch.stat("value_next@old").tolist() == [[3.0, 3.0, 0.0, 0.0]]
    given_next = Batch.of(value=value, value_next=torch.zeros(1, 4), stats={"value@old": torch.full((1, 4), 7.0)})
    assert given_next.stat("value_next@old").sum() == 0
    assert given_next.stat("value@old").sum() == 28


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        ({}, True),
        ({"terminated": [[0, 1, 0, 1]]}, True),
        ({"terminated": [True], "truncated": [True]}, True),  # cut by a limit, but judged: the outcome ends the return
        ({"terminated": [[0, 1, 0, 0]]}, False),  # the row goes on
        ({"truncated": [[0, 0, 0, 1]]}, False),
        ({"terminated": [[0, 0, 0, 1]], "truncated": [[0, 1, 0, 0]]}, False),  # a cut inside the row
        ({"terminated": [[0, 0, 1, 0]], "mask": [[1, 1, 0, 0]]}, True),  # the end stands behind tool text
        ({"terminated": [[0, 0, 0, 0]], "mask": [[0, 0, 0, 0]]}, True),  # nothing was decided
    ],
)
def test_the_next_value_is_guessed_only_where_nothing_is_bootstrapped(arguments: dict[str, object], known: bool) -> None:
    value = torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    given = {k: torch.tensor(v) for k, v in arguments.items()}
    batch = Batch.of(value=value, reward=torch.zeros(1, 4), **given)
    assert ("value_next@old" in batch.stats) == known
    for name in ("ppo", "a2c"):
        if not known:
            with pytest.raises(MissingStatistic, match="value_next="):
                get_method(name).advantages(batch)
        batch_without = Batch.of(reward=torch.zeros(1, 4), **given)
        with pytest.raises(MissingStatistic, match=r"pass value= "):
            get_method(name).advantages(batch_without)
    assert "value_next@old" in Batch.of(value=value, value_next=value, **given).stats


def test_ends_may_be_given_per_row() -> None:
    batch = Batch.of(mask=torch.tensor([[1, 1, 0], [1, 1, 1]]), terminated=[True, False], truncated=torch.tensor([0, 1]))
    assert batch.terminated is not None
    assert batch.truncated is not None
    assert batch.terminated.tolist() == [[False, True, False], [False] * 3]
    assert batch.truncated.tolist() == [[False] * 3, [False, False, True]]


def test_everything_moves_to_the_device_of_the_statistics() -> None:
    there = torch.device("meta")
    batch = Batch.of(
        logp=torch.zeros(2, 3, device=there), mask=torch.ones(2, 3), reward=torch.zeros(2), terminated=torch.zeros(2, 3),
        truncated=torch.zeros(2), row={"length": torch.zeros(2)},
    )  # fmt: skip
    for x in (batch.mask, batch.reward, batch.terminated, batch.truncated, batch.row["length"]):
        assert x is not None
        assert x.device == there


def test_ends_default_only_when_none_is_given() -> None:
    mask = torch.tensor([[1, 1, 0]])
    flags = torch.tensor([[0, 1, 0]])
    cut = Batch.of(mask=mask, truncated=flags)
    assert cut.terminated is not None
    assert cut.terminated.sum() == 0
    ended = Batch.of(mask=mask, terminated=flags)
    assert ended.truncated is not None
    assert ended.truncated.sum() == 0


def test_horizon_is_the_limit_not_the_width() -> None:
    assert Batch.of(mask=torch.ones(2, 3)).horizon == 3
    assert Batch.of(mask=torch.ones(2, 3), horizon=10).horizon == 10
    assert Batch.of(mask=torch.ones(2, 3)).pad(7).horizon == 3


def test_group_ids_are_renumbered() -> None:
    batch = Batch.of(mask=torch.ones(4, 1), group=[70, 3, 70, 9], keys={"role": torch.tensor([5, 5, 5, 5])})
    assert batch.group is not None
    assert batch.group.tolist() == [2, 0, 2, 1]
    assert batch.units == {"group": 3, "role": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"logp": torch.zeros(3)}, ["logp@now", "(3,)"]),
        ({"logp": torch.zeros(2, 3), "logp_old": torch.zeros(2, 4)}, ["disagree", "(2, 4)"]),
        ({"logp": torch.zeros(2, 3), "mask": torch.ones(3, 2)}, ["mask", "(3, 2)", "(2, 3)"]),
        ({"logp": torch.zeros(2, 3), "reward": torch.zeros(3)}, ["reward", "(3,)", "(2,)"]),
        ({"logp": torch.zeros(2, 3), "group": [0, 1, 2]}, ["group", "(3,)", "(2,)"]),
        ({"reward": torch.zeros(3)}, ["mask"]),
        ({"mask": torch.ones(3)}, ["mask", "(3,)", "[B,T]"]),
        ({"mask": torch.ones(3), "reward": torch.zeros(3)}, ["mask", "(3,)", "[B,T]"]),
        ({"mask": torch.ones(2, 3), "terminated": torch.ones(3)}, ["terminated", "(3,)", "(2, 3)", "(2,)"]),
        ({"mask": torch.ones(2, 3), "truncated": torch.ones(2, 1)}, ["truncated", "(2, 1)", "(2, 3)"]),
        ({"mask": torch.ones(2, 3), "row": {"length": torch.ones(3)}}, ["row['length']", "(3,)", "(2, ...)"]),
        ({"mask": torch.ones(2, 3), "row": {"heat": 1.0}}, ["row['heat']", "()"]),
        ({"mask": torch.ones(2, 3), "group": torch.tensor([1.0, math.nan])}, ["group", "nan", "finite"]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(CallError) as error:
        Batch.of(**arguments)  # type: ignore[arg-type]
    assert all(w in str(error.value) for w in words)


def test_a_missing_statistic_names_the_argument() -> None:
    batch = Batch.of(logp=torch.zeros(1, 1))
    for name, argument in [("logp@old", "logp_old="), ("logp@ref", "logp_ref="), ("odd@old", "stats={'odd@old'")]:
        with pytest.raises(MissingStatistic, match=r"never recomputed") as error:
            batch.stat(name)
        assert argument in str(error.value)
    with pytest.raises(MissingStatistic, match="reward="):
        batch.outcome()
    with pytest.raises(MissingStatistic, match="group="):
        batch.pool(torch.zeros(1), "group")
    with pytest.raises(MissingStatistic, match="segment"):
        batch.pool(torch.zeros(1, 1), "segment")


# -------------------------------------------------------------------- pool
def by_loops(x: np.ndarray, member: np.ndarray, unit: np.ndarray, how: str, loo: bool, ddof: int) -> np.ndarray:
    """The same statistic, one member at a time."""
    out = np.zeros_like(x)
    for i in range(len(x)):
        mine = [j for j in range(len(x)) if unit[j] == unit[i] and member[j] and not (loo and j == i)]
        values = x[mine]
        if how == "count":
            out[i] = len(mine)
        elif how == "sum":
            out[i] = values.sum()
        elif how in ("mean", "max", "min"):
            out[i] = getattr(np, how)(values) if len(mine) else 0.0
        elif len(mine) > ddof:
            out[i] = getattr(np, how)(values, ddof=ddof)
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    by=st.sampled_from(["row", "batch", "group", "episode", "segment"]),
    how=st.sampled_from(["mean", "sum", "std", "var", "max", "min", "count"]),
    loo=st.booleans(),
    ddof=st.integers(0, 1),
    rows=st.booleans(),
)
def test_pool_is_the_statistic_of_each_unit(seed: int, by: str, how: str, loo: bool, ddof: int, rows: bool) -> None:
    batch = random_batch(seed)
    b, t = batch.shape
    loo = loo and how in ("mean", "sum")
    rows = rows and by not in ("row", "segment")
    assert batch.group is not None
    assert batch.segment is not None
    per_row = {"row": torch.arange(b), "batch": torch.zeros(b), "group": batch.group, "episode": batch.keys["episode"]}
    x = batch.stats["x@old"]
    if rows:
        x, member, unit = x[:, 0], batch.mask.any(1), per_row[by]
    elif by == "segment":
        member, unit = batch.mask, torch.arange(b)[:, None] * 100 + batch.segment
    else:
        member, unit = batch.mask, per_row[by][:, None].expand(b, t)
    found = batch.pool(x, by, how, leave_one_out=loo, ddof=ddof)  # type: ignore[arg-type]
    wanted = by_loops(x.flatten().numpy(), member.flatten().numpy(), unit.flatten().numpy(), how, loo, ddof)
    # leaving one out of a unit is defined for its members only
    keep = member.flatten().numpy() if loo else np.ones(len(wanted), bool)
    assert found.shape == x.shape
    np.testing.assert_allclose(found.flatten().numpy()[keep], wanted[keep], atol=1e-12)


def test_pool_ignores_nan_outside_the_mask_and_its_gradient() -> None:
    x = torch.tensor([[1.0, math.nan, 3.0]], requires_grad=True)
    batch = Batch.of(mask=torch.tensor([[1, 0, 1]]))
    mean = batch.pool(x, "row")
    assert mean.tolist() == [[2.0, 2.0, 2.0]]
    mean[0, 0].backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.5, 0.0, 0.5]]


def test_std_of_equal_members_has_a_finite_gradient() -> None:
    x = torch.ones(1, 3, requires_grad=True)
    Batch.of(mask=torch.ones(1, 3)).pool(x, "row", "std").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_pool_takes_its_own_members() -> None:
    batch = Batch.of(mask=torch.ones(1, 3))
    x = torch.tensor([[1.0, 2.0, 6.0]])
    assert batch.pool(x, "row", valid=torch.tensor([[True, True, False]])).tolist() == [[1.5, 1.5, 1.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_and_sums_beyond_its_digits(dtype: torch.dtype) -> None:
    n = 3000  # half precision cannot tell 2049 from 2048, bfloat16 not 257 from 256
    batch = Batch.of(mask=torch.ones(n, 1), group=torch.zeros(n).long())
    x = torch.ones(n, dtype=dtype)
    for how, wanted in (("count", n), ("sum", n), ("mean", 1.0), ("std", 0.0), ("max", 1.0)):
        for by in ("group", "batch"):
            found = batch.pool(x, by, how)  # type: ignore[arg-type]
            assert found.dtype == torch.float32
            assert float(found[0]) == wanted
    reward = place_reward(torch.ones(1, n, dtype=dtype), torch.ones(1, n, dtype=torch.bool))
    assert float(reward.sum()) == n
    assert float(Batch.of(reward=torch.ones(1, n, dtype=dtype)).outcome()) == n


def test_pool_refuses_what_has_no_meaning() -> None:
    batch = random_batch(0)
    x = batch.stats["x@old"]
    for how in ("max", "std", "count"):
        with pytest.raises(CallError, match="leave_one_out"):
            batch.pool(x, "group", how, leave_one_out=True)  # type: ignore[arg-type]
    with pytest.raises(CallError, match=r"\[B\]"):
        batch.pool(x[:, 0], "row")
    with pytest.raises(CallError, match="median"):
        batch.pool(x, "group", "median")  # type: ignore[arg-type]
    with pytest.raises(MissingStatistic, match="nowhere"):
        batch.pool(x, "nowhere")


# -------------------------------------------------------------------- cutting and joining
def test_cat_pads_right_and_keeps_groups_apart() -> None:
    def one(t: int, p: int, value: float) -> Batch:
        made = Batch.of(
            logp_old=torch.full((2, t), value), reward=torch.tensor([1.0, 2.0]), group=[0, 1], mask=torch.ones(2, t), horizon=t
        )
        return replace(made, action=torch.full((2, t), int(value)), context={"prompt": torch.full((2, p), int(value))})

    whole = Batch.cat([one(2, 3, 1.0), one(4, 1, 2.0)])
    assert whole.shape == (4, 4)
    assert whole.mask.sum(1).tolist() == [2, 2, 4, 4]
    assert whole.group is not None
    assert whole.group.tolist() == [0, 1, 2, 3]
    assert whole.units["group"] == 4
    assert whole.outcome().tolist() == [1, 2, 1, 2]
    assert whole.context["prompt"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 2], [0, 0, 2]]
    assert whole.action[0].tolist() == [1, 1, 0, 0]
    assert whole.horizon == 4


def test_cat_of_nothing_is_refused() -> None:
    with pytest.raises(CallError, match="empty"):
        Batch.cat([])


def test_cat_refuses_groups_in_only_some_batches() -> None:
    with_groups, without = Batch.of(mask=torch.ones(2, 3), group=[0, 1]), Batch.of(mask=torch.ones(2, 3))
    for batches in ([with_groups, without], [without, with_groups]):
        with pytest.raises(CallError, match="group="):
            Batch.cat(batches)
    assert Batch.cat([without, without]).group is None


def test_cat_keeps_the_keys_that_all_have() -> None:
    ids = torch.tensor([0, 1])
    one, two = (Batch.of(mask=torch.ones(2, 3), keys=k) for k in ({"item": ids, "role": ids}, {"item": ids}))
    for batches in ([one, two], [two, one]):
        whole = Batch.cat(batches)
        assert set(whole.keys) == set(whole.units) == {"item"}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 4))
def test_rows_and_cat_are_inverse(seed: int, cut: int) -> None:
    batch = random_batch(seed)
    again = Batch.cat([batch.rows(slice(0, cut)), batch.rows(slice(cut, None))])
    assert torch.equal(again.mask, batch.mask)
    assert torch.equal(again.stats["x@old"], batch.stats["x@old"])
    assert torch.equal(again.outcome(), batch.outcome())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_decisions_keeps_every_valid_decision_with_its_row(seed: int) -> None:
    batch = random_batch(seed)
    flat = batch.decisions()
    n = int(batch.mask.sum())
    assert flat.shape == (n, 1)
    assert torch.equal(flat.stats["x@old"].flatten(), batch.stats["x@old"][batch.mask])
    assert batch.group is not None
    assert flat.group is not None
    assert torch.equal(flat.group, batch.group[:, None].expand(batch.shape)[batch.mask])
    assert bool(flat.mask.all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000))
def test_last_and_next_valid(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 6, generator=g) < 0.5
    x = torch.randn(4, 6, generator=g)
    last, after = last_valid(mask), next_valid(x, mask)
    for i in range(4):
        valid = [t for t in range(6) if mask[i, t]]
        assert last[i].nonzero().flatten().tolist() == valid[-1:]
        for t in range(6):
            later = [k for k in valid if k > t]
            assert float(after[i, t]) == (float(x[i, later[0]]) if later else 0.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000))
def test_flags_belong_to_the_last_valid_decision_before(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mask, flags = (torch.rand(4, 6, generator=g) < p for p in (0.5, 0.3))
    found = own_flags(flags, mask)
    for i in range(4):
        wanted = set()
        for t in flags[i].nonzero().flatten().tolist():
            wanted |= set([k for k in range(t + 1) if mask[i, k]][-1:])
        assert set(found[i].nonzero().flatten().tolist()) == wanted


def test_totals_count_valid_decisions_and_rows() -> None:
    totals = Totals.of(torch.tensor([[True, True], [False, False], [True, False]]))
    assert (float(totals.decisions), float(totals.rows)) == (3.0, 2.0)
