"""The random batches on which proofs are made: hard, always the same, and true to the conditions they name."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.claim import Neutral
from polopt.errors import CallError
from polopt.evidence.proof.batches import CASES, CONDITIONS, random_batches
from polopt.methods.language.dapo import DAPO
from polopt.methods.onpolicy.reinforce_baseline import REINFORCE_BASELINE
from polopt.parts.advantage.gae import GAE


def clean(batch: Batch) -> dict[str, Tensor]:
    return {k: v.masked_fill(~batch.mask, 0.0) for k, v in batch.stats.items()}


@pytest.mark.parametrize("episodes", [True, False])
def test_batches_are_hard_and_always_the_same(episodes):
    batches = random_batches(episodes=episodes)
    random_batches.cache_clear()
    for one, again in zip(batches, random_batches(episodes=episodes), strict=True):
        assert all(torch.equal(x, again.stats[k]) or x.isnan().any() for k, x in one.stats.items())
    assert len(batches) == len(CASES) == 16
    ratio = torch.cat([(b.stat("logp@now") - b.stat("logp@old"))[b.mask].exp() for b in batches])
    for lo, hi in ((0.0, 0.5), (0.5, 0.8), (0.8, 1.2), (1.2, 1.5), (1.5, 5.0), (5.0, 21.0)):
        assert ((ratio > lo) & (ratio <= hi)).sum() >= 2
    assert all(b.stats[k].dtype == b.reward.dtype == torch.float64 for b in batches for k in b.stats)
    assert any(not b.mask.any(1).all() for b in batches)  # an empty row
    assert any((b.mask[:, 1:] & ~b.mask[:, :-1]).any() for b in batches)  # holes
    assert any(b.stat("logp@now").isnan().any() for b in batches)  # padding full of NaN
    assert not any(b.stats[k][b.mask].isnan().any() for b in batches for k in b.stats)
    assert {b.reward.shape[-1] for b in batches} == {1, 2, 3}
    assert any(len(b.group.bincount().unique()) > 1 for b in batches)
    assert all(b.horizon >= b.shape[1] for b in batches)
    for b in batches:
        ends, last = b.terminated | b.truncated, b.mask.flip(1).cumsum(1).flip(1) * b.mask == 1
        assert not (ends & ~b.mask).any()
        if episodes:
            assert torch.equal(ends, last)
        value, after = clean(b)["value@old"], clean(b)["value_next@old"]
        for r in range(b.shape[0]):  # V of the true next state: the next decision's, where the episode goes on
            places = b.mask[r].nonzero().flatten().tolist()
            for t, nxt in pairwise(places):
                assert (after[r, t] == value[r, nxt]) == (not ends[r, t])
    assert all(any(getattr(b, k).any() for b in batches) for k in ("terminated", "truncated"))


def mean_returns(b: Batch) -> Tensor:
    """For each row the mean of the sums of rewards of the rows of its group that have a decision."""
    out = torch.zeros(b.shape[0], dtype=torch.float64)
    totals = {r: float(b.reward[r][b.mask[r]].sum()) for r in range(b.shape[0]) if b.mask[r].any()}
    for r in totals:
        mates = [totals[q] for q in totals if b.group[q] == b.group[r]]
        out[r] = sum(mates) / len(mates)
    return out


STEERED = (("control", 1), ("replaced", 2))


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_hold_and_say_so(name):
    def true_of(b: Batch) -> bool:
        lengths = b.mask.sum(1)
        some = lengths[lengths > 0]
        gap = (b.stat("logp@now") - b.stat("logp@old")).masked_fill(~b.mask, 0.0)
        received = (b.reward.sum(-1) * b.mask).nan_to_num()
        before = torch.cat([torch.zeros(b.shape[0], 1), received.cumsum(1)[:, :-1]], 1)
        last = b.mask & (b.mask.flip(1).cumsum(1).flip(1) == 1)
        return {
            "equal-lengths": lambda: bool((some == some[0]).all()),
            "full-length": lambda: bool((some == b.horizon).all()),
            "one-decision": lambda: bool((some == 1).all()),
            "whole-episodes": lambda: torch.equal(b.terminated, last) and not b.truncated.any(),
            "equal-ratios": lambda: all((g[m] - g[m][0]).abs().max() < 1e-12 for g, m in zip(gap, b.mask, strict=True) if m.any()),
            "on-policy": lambda: not gap.any(),
            "at-reference": lambda: torch.equal(clean(b)["logp@now"], clean(b)["logp@ref"]),
            "long-rows": lambda: torch.equal(b.mask, b.mask[:, : b.shape[1] // 60].repeat(1, 60)) and b.shape[1] >= 60,
            "control-rows": lambda: all(
                k in b.row and torch.equal(b.row[k], (torch.arange(b.shape[0]) % 3 == turn).to(b.row[k])) for k, turn in STEERED
            ),
            "pairs": lambda: b.group.tolist() == [i // 2 for i in range(b.shape[0])],
            "success-or-failure": lambda: (
                b.reward.shape[-1] == 1 and not received[~last].any() and set(received[last].tolist()) <= {0.0, 1.0}
            ),
            "value-is-group-mean": lambda: torch.allclose(
                clean(b)["value@old"], (mean_returns(b)[:, None] - before).masked_fill(~b.mask, 0.0), atol=1e-12
            ),
        }[name]()

    assert all(true_of(b) for b in random_batches((name,)))
    assert sum(true_of(b) for b in random_batches()) <= 5  # else it would be no condition
    assert CONDITIONS[name].words


def test_conditions_combine():
    names = ("one-decision", "equal-lengths", "whole-episodes", "on-policy", "value-is-group-mean")
    for b in random_batches(names, episodes=False):
        assert (b.mask.sum(1) <= 1).all()
        assert torch.equal(b.terminated, b.mask)
        assert torch.equal(clean(b)["logp@now"], clean(b)["logp@old"])


def test_statistics_and_columns_that_a_part_asks_for_are_there():
    (b, *_) = random_batches((), ("surprise@old", "logp@stepped"), ("item", "truncated"))
    assert {"surprise@old", "logp@stepped"} <= set(b.stats)
    assert "item" in b.keys
    assert set(b.row["truncated"].tolist()) <= {0.0, 1.0}


def test_unknown_conditions_are_refused():
    with pytest.raises(CallError, match="did you mean 'on-policy'"):
        random_batches(("onpolicy",))


def test_an_advantage_that_is_generalised_differs_from_returns_where_episodes_are_cut():
    """The condition on whole episodes is needed: with a cut, GAE with gamma = lam = 1 is not the return minus the value."""
    gae, mc = GAE(1.0, 1.0), REINFORCE_BASELINE.advantage
    whole = random_batches(("whole-episodes",))[0]
    torch.testing.assert_close(gae(whole), mc(whole))
    cut = next(b for b in random_batches() if (b.truncated & ~b.terminated).any())
    assert (gae(cut) - mc(cut)).nan_to_num().abs().max() > 0.1
    assert DAPO.neutral["reward.soft-overlong"] == Neutral(own={"cache": 0.0})
