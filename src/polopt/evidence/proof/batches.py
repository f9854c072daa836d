"""Random batches on which two methods are compared, and the named conditions under which parts of different form agree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from polopt.batch import Batch
from polopt.columns import last_valid, next_valid
from polopt.errors import unknown

Stage = Literal["mask", "ends", "content"]
STAGES: tuple[Stage, ...] = ("mask", "ends", "content")
#: Statistics that every batch has; others are drawn when a part needs them.
USUAL = (
    "logp@now", "logp@old", "logp@ref", "logp@behaviour", "entropy@now", "value@now", "value@old", "value_next@old",
)  # fmt: skip
F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """What one random batch is like: rows x decisions, rows per group (0: unequal, one alone), and what makes it hard.

    holes: places inside rows where the policy did not decide; empty: a row without a decision; dirty: NaN outside the mask;
    far: probability ratios up to e^3; outcome: one reward of 0 or 1 at the end of a row; alike: all of them 1.
    """

    rows: int
    steps: int
    size: int = 2
    holes: bool = False
    empty: bool = False
    dirty: bool = False
    far: bool = False
    channels: int = 1
    outcome: bool = False
    alike: bool = False


CASES = (
    Case(6, 5, 3), Case(8, 4, 4, outcome=True), Case(6, 7, 0), Case(5, 6, 0, empty=True), Case(4, 8, holes=True),
    Case(4, 3, dirty=True), Case(6, 5, 3, far=True), Case(6, 4, 3, channels=2), Case(1, 1, 1), Case(4, 1),
    Case(6, 6, 3, outcome=True, alike=True), Case(8, 9, 0, holes=True, dirty=True, channels=2, outcome=True),
    Case(2, 12, far=True), Case(9, 5, 3, empty=True, dirty=True, outcome=True), Case(12, 3, 4, far=True, channels=2),
    Case(7, 16, 0, holes=True, empty=True, dirty=True, far=True, channels=3),
)  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """A property that a batch is given: its description in words, and how it comes about, at which stage of drawing."""

    words: str
    stage: Stage
    apply: Callable[[Batch], Batch]


#: By name, in the order in which they act within a stage.
CONDITIONS: dict[str, Condition] = {}


def condition(name: str, words: str, stage: Stage) -> Callable[[Callable[[Batch], Batch]], Callable[[Batch], Batch]]:
    """Register a condition: at stage "mask" the batch has mask, groups, horizon; at "ends" also ends; at "content" all."""

    def add(fn: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
        CONDITIONS[name] = Condition(words, stage, fn)
        return fn

    return add


# -------------------------------------------------------------------- conditions
@condition("equal-lengths", "rows of one length", "mask")
def equal_lengths(batch: Batch) -> Batch:
    """Every row that has a decision has its first n, n shorter than the padded row where that can be."""
    t = batch.shape[1]
    return replace(batch, mask=batch.mask.any(1)[:, None] & (torch.arange(t) < max(1, t - 1)))


@condition("full-length", "rows as long as the generation limit", "mask")
def full_length(batch: Batch) -> Batch:
    """Every row that has a decision has as many as it could have had."""
    return replace(batch, mask=batch.mask.any(1)[:, None].expand(batch.shape).clone(), horizon=batch.shape[1])


@condition("one-decision", "rows of one decision", "mask")
def one_decision(batch: Batch) -> Batch:
    """Only the first decision of each row remains."""
    return replace(batch, mask=batch.mask & (batch.mask.cumsum(1) == 1))


@condition("whole-episodes", "whole episodes that ended by termination", "ends")
def whole_episodes(batch: Batch) -> Batch:
    """Each row is one episode, terminated at its last decision: nothing is bootstrapped."""
    return replace(batch, terminated=last_valid(batch.mask), truncated=torch.zeros_like(batch.mask))


@condition("equal-ratios", "the same probability ratio at every decision of a row", "content")
def equal_ratios(batch: Batch) -> Batch:
    """Off-policy, but a row's decisions became more likely by one factor; on-policy and single decisions are cases of it."""
    gap = batch.pool(batch.stat("logp@now") - batch.stat("logp@old"), "row", "mean")
    return batch.adding({"logp@now": batch.stat("logp@old") + gap})


@condition("on-policy", "the policy at the start of the update", "content")
def on_policy(batch: Batch) -> Batch:
    """The log-probabilities are those at the start of the update: ratios are 1."""
    return batch.adding({"logp@now": batch.stat("logp@old").clone()})


@condition("at-reference", "the policy at the reference", "content")
def at_reference(batch: Batch) -> Batch:
    """The log-probabilities are those of the reference."""
    return batch.adding({"logp@now": batch.stat("logp@ref").clone()})


@condition("pairs", "groups of two", "mask")
def pairs(batch: Batch) -> Batch:
    """Rows form groups of two, the last one perhaps of one."""
    return batch.with_key("group", torch.arange(batch.shape[0]) // 2)


@condition("long-rows", "rows of hundreds of decisions", "mask")
def long_rows(batch: Batch) -> Batch:
    """Every row is its own mask sixty times over, so that shares of a percent are more than one decision."""
    return replace(batch, mask=batch.mask.repeat(1, 60), horizon=60 * batch.horizon)


@condition("control-rows", "rows that steer the entropy in the place of others", "content")
def control_rows(batch: Batch) -> Batch:
    """Every third row came in, the one behind it went out."""
    turn = torch.arange(batch.shape[0]) % 3
    return replace(batch, row={**batch.row, "control": (turn == 1).to(F64), "replaced": (turn == 2).to(F64)})


@condition("value-is-group-mean", "a value that predicts the mean return of the group", "content")
def value_is_group_mean(batch: Batch) -> Batch:
    """V(s_t) is the mean return of the row's group less what the row has received before t."""
    received = torch.where(batch.mask, batch.scalar_reward(), 0.0)
    before = received.cumsum(1) - received
    return batch.adding({"value@old": batch.pool(batch.outcome(), "group", "mean")[:, None] - before})


@condition("success-or-failure", "one reward of 0 or 1 for each row", "content")
def success_or_failure(batch: Batch) -> Batch:
    """The rewards are one channel: 1 at the last decision of rows whose rewards were positive in sum, 0 elsewhere."""
    won = (batch.outcome() > 0).to(F64)
    return replace(batch, reward=torch.where(last_valid(batch.mask), won[:, None], 0.0)[..., None])


# -------------------------------------------------------------------- drawing
@functools.lru_cache(maxsize=64)
def random_batches(
    conditions: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    reads: tuple[str, ...] = (),
    *,
    episodes: bool = True,
    count: int = len(CASES),
) -> tuple[Batch, ...]:
    """`count` batches in float64, the same in every call: off-policy, with and without hard features (`CASES`).

    conditions: names in `CONDITIONS`. extra, reads: statistics `name@view`, and keys or columns, that parts ask for. episodes: rows
    are whole episodes (terminated, cut or both at their last decision), else fragments with ends anywhere. Raises `CallError` for
    unknown conditions.
    """
    for name in conditions:
        if name not in CONDITIONS:
            raise unknown("batch condition", name, CONDITIONS)
    return tuple(_draw(i, CASES[i % len(CASES)], conditions, extra, reads, episodes) for i in range(count))


def _draw(index: int, case: Case, conditions: Sequence[str], extra: Sequence[str], reads: Sequence[str], episodes: bool) -> Batch:
    rng = torch.Generator().manual_seed(7919 + index)
    batch = _apply("mask", conditions, _skeleton(case, rng))
    batch = _apply("ends", conditions, _with_ends(batch, rng, episodes))
    batch = _with_content(batch, case, rng, [*USUAL, *(n for n in extra if n not in USUAL)], reads)
    batch = _with_next_values(_apply("content", conditions, batch), rng)
    return _dirtied(batch) if case.dirty else batch


def _apply(stage: Stage, conditions: Sequence[str], batch: Batch) -> Batch:
    for name, found in CONDITIONS.items():
        if name in conditions and found.stage == stage:
            batch = found.apply(batch)
    return batch


def _skeleton(case: Case, rng: Generator) -> Batch:
    """Mask, groups and horizon."""
    b, t = case.rows, case.steps
    lengths = torch.randint(1, t + 1, (b,), generator=rng)
    mask = torch.arange(t) < lengths[:, None]
    if case.holes:
        mask = mask & (torch.rand(b, t, generator=rng) > 0.3)
    if case.empty:
        mask[1] = False
    ids = torch.arange(b) // case.size if case.size else (torch.arange(b).sqrt().long())  # groups of 1, 3, 5
    return Batch(mask=mask, horizon=t + int(torch.randint(0, 3, (), generator=rng))).with_key("group", ids)


def _with_ends(batch: Batch, rng: Generator, episodes: bool) -> Batch:
    """Ends of episodes: at the last decision alone, or anywhere and perhaps not there."""
    last, kind = last_valid(batch.mask), torch.rand(batch.shape, generator=rng)
    if episodes:
        return replace(batch, terminated=last & (kind < 0.7), truncated=last & (kind > 0.5))
    some = batch.mask & (last | (torch.rand(batch.shape, generator=rng) < 0.2))
    return replace(batch, terminated=some & (kind < 0.4), truncated=some & (kind > 0.7))


def _with_content(batch: Batch, case: Case, rng: Generator, names: Sequence[str], reads: Sequence[str]) -> Batch:
    """Rewards, statistics, keys and columns."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=F64)

    b, t = batch.shape
    reward = normal(b, t, case.channels)
    if case.outcome:
        right = torch.ones(b, dtype=F64) if case.alike else (reward[:, 0, 0] > 0).to(F64)
        reward = torch.where(last_valid(batch.mask)[..., None], right[:, None, None], torch.zeros_like(reward))
    old, value = -0.05 - normal(b, t).abs(), normal(b, t)
    spread = {"now": 1.0 if case.far else 0.25, "ref": 0.5, "behaviour": 0.05}
    stats: dict[str, Tensor] = {}
    for full in names:
        name, _, view = full.partition("@")
        noise = normal(b, t)
        if name == "logp":
            stats[full] = old if view == "old" else old + (spread.get(view, 0.3) * noise).clamp(-3, 3)
        elif name == "value":
            stats[full] = value if view == "old" else value + 0.3 * noise
        else:
            stats[full] = noise.abs() if name.startswith(("entropy", "kl")) else noise
    keys = {name: torch.arange(b) // 2 for name in reads if name not in ("group", "truncated")}
    cut = torch.zeros_like(batch.mask) if batch.truncated is None else batch.truncated
    row = {"truncated": cut.any(1).to(F64), **{name: normal(b) for name in keys}}
    batch = replace(batch, reward=reward, stats=stats, row=row)
    for name, ids in keys.items():
        batch = batch.with_key(name, ids)
    return batch


def _with_next_values(batch: Batch, rng: Generator) -> Batch:
    """Values of the true next state: that of the next decision inside an episode, one of their own at its end."""
    stats = {}
    for full in sorted(n for n in batch.stats if n.startswith("value_next@")):
        value = batch.stats.get(full.replace("value_next@", "value@"))
        fresh: Float[Tensor, "B T"] = torch.randn(batch.shape, generator=rng, dtype=F64)
        end: Bool[Tensor, "B T"] = last_valid(batch.mask)
        for flags in (batch.terminated, batch.truncated):
            end = end if flags is None else end | flags
        stats[full] = fresh if value is None else torch.where(end, fresh, next_valid(value, batch.mask))
    return batch.adding(stats)


def _dirtied(batch: Batch) -> Batch:
    """NaN wherever the policy did not decide."""
    outside = ~batch.mask
    stats = {k: v.masked_fill(outside, torch.nan) for k, v in batch.stats.items()}
    assert batch.reward is not None
    return replace(batch, stats=stats, reward=batch.reward.masked_fill(outside[..., None], torch.nan))


__all__ = ["CASES", "CONDITIONS", "Condition", "condition", "random_batches"]
