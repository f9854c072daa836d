"""Rows of similar length are computed together, finished ones not at all; no number changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_models import policy
from torch import Tensor

from polopt.batch import Batch
from polopt.policies.lm import LMPolicy, fast
from polopt.policies.lm import generate as generating
from polopt.policies.lm import prompts as grouping
from polopt.policies.lm.prompts import LEAST, PADDING, buckets, pad_left

torch.set_num_threads(1)


def padded(lengths: list[int], groups: list[list[int]]) -> int:
    return sum(max(lengths[i] for i in rows) * len(rows) for rows in groups)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=120))
def test_buckets_hold_every_row_once_and_little_padding(lengths: list[int]) -> None:
    groups = buckets(lengths)
    assert sorted(i for rows in groups for i in rows) == list(range(len(lengths)))
    waste = padded(lengths, groups) - sum(lengths)
    assert waste <= max(PADDING * padded(lengths, groups), LEAST * len(groups) * 8)
    if len(groups) == 1:
        assert groups[0] == list(range(len(lengths)))


def test_buckets_of_a_long_tail() -> None:
    """256 log-normal lengths: 70 % of one rectangle is padding, under a tenth of a few groups."""
    lengths = np.random.default_rng(0).lognormal(3.0, 1.0, 256).astype(int).clip(1, 400).tolist()
    assert sum(lengths) < 0.3 * 256 * max(lengths)
    groups = buckets(lengths)
    assert padded(lengths, groups) * 0.9 < sum(lengths)
    assert len(groups) < 24
    assert len(buckets([7] * 50)) == 1


def ragged(p: LMPolicy, rows: int = 40, longest: int = 30) -> Batch:
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 20, (n,), generator=g).tolist() for n in (1, 2, 3, 20, 24)]
    spread = torch.arange(rows) % len(prompts)
    lengths = torch.randint(0, 6, (rows,), generator=g)
    lengths[::7] = longest
    ids, known = pad_left(prompts, 0)
    action = torch.randint(3, 20, (rows, longest), generator=g)
    mask = torch.arange(longest) < lengths[:, None]
    mask[0, 4] = False  # a forced token inside
    return Batch(mask=mask, action=action, context={"prompt": ids[spread], "prompt_mask": known[spread]})


@pytest.mark.parametrize("engine", ["fast", "general"])
def test_groups_change_no_number(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = policy(engine=engine, value=True, model={"max_position_embeddings": 128})
    batch = ragged(p)
    want = frozenset({"logp", "entropy", "value", "value_next"})
    calls: list[int] = []
    real = buckets

    def alone(lengths: Any) -> list[list[int]]:
        return [list(range(len(lengths)))]

    def noted(lengths: Any) -> list[list[int]]:
        calls.append(len(real(lengths)))
        return real(lengths)

    found: list[list[Tensor]] = []
    for way in (alone, noted):
        for module in (fast, grouping, __import__("polopt.policies.lm.engine", fromlist=["engine"])):
            monkeypatch.setattr(module, "buckets", way)
        out = p.evaluate(batch, want)
        sum(v.square().mean() for v in out.values()).backward()  # type: ignore[union-attr]
        nets = p.nets().values()
        found.append(
            [
                *(out[n].detach() for n in sorted(want)),
                *(x.grad.clone() for net in nets for x in net.parameters() if x.grad is not None),
            ]
        )
        for net in nets:
            net.zero_grad()
    assert max(calls) > 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["fast", "general"])
def test_dropping_finished_rows_changes_no_draw(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = policy(engine=engine, max_new_tokens=20)
    spread, limits = torch.arange(40) % 3, torch.randint(1, 21, (40,), generator=torch.Generator().manual_seed(1))
    prompts = [[5, 6, 7], [9], [4] * 12]
    found = []
    for drop in (1, generating.DROP, 1000):  # only when nothing is left, an eighth, at once
        monkeypatch.setattr(generating, "DROP", drop)
        found.append(p.generate(prompts, spread, torch.Generator().manual_seed(0), limits=limits))
    for other in found[1:]:
        assert torch.equal(other.action, found[0].action)
        assert torch.equal(other.mask, found[0].mask)
        torch.testing.assert_close(other.logp, found[0].logp, atol=1e-5, rtol=0)


def test_few_finished_rows_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform lengths from 1 to 40: of the rows of all steps under a tenth was finished (with a half it was a quarter)."""
    p = policy(max_new_tokens=40)
    computed: list[int] = []
    step = fast._FastDecoding.step

    def counted(self: Any, token: Tensor) -> Tensor:
        computed.append(len(token))
        return step(self, token)

    monkeypatch.setattr(fast._FastDecoding, "step", counted)
    limits = torch.randint(1, 41, (200,), generator=torch.Generator().manual_seed(1))
    drawn = p.generate([[5, 6]], [0] * 200, torch.Generator().manual_seed(0), limits=limits)
    needed = int((drawn.mask.sum(1) - 1).sum())
    assert needed > 0.9 * sum(computed)
