"""The searched clip, detail by detail: what a decision counts, what does not count, and what happens exactly at the bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.part import make_part
from polopt.parts.surrogate.balanced_clip import BalancedClip, stairs

F64 = torch.float64
SMALL = BalancedClip(low_start=0.5, low_max=0.75, low_step=0.25, high_start=1.25, high_max=1.5, high_step=0.25)


def tensor(*x: float) -> Tensor:
    return torch.tensor([x], dtype=F64)


def at(ratio: Tensor, old: Tensor | None = None, mask: Tensor | None = None, **stats: float) -> Batch:
    """Decisions with these ratios; bounds that are the same for all of them."""
    old = torch.zeros_like(ratio) if old is None else old
    known = {f"{k}@minibatch": torch.full_like(ratio, v) for k, v in stats.items()}
    return Batch.of(logp=old + ratio.log(), logp_old=old, mask=mask, stats=known)


def found(part: BalancedClip, batch: Batch, advantage: Tensor, valid: Tensor | None = None) -> tuple[float, float]:
    told = part.survey(batch, {"logp": batch.stat("logp@now")}, advantage, batch.mask if valid is None else valid)
    return float(told["clip_low@minibatch"][0, 0]), float(told["clip_high@minibatch"][0, 0])


@pytest.mark.parametrize(
    ("form", "contribution", "positive", "negative"),
    [
        ("paper", "value", [3.75, 4.25, 4.25], [2.75, 2.75, 3.0]),
        ("paper", "gradient", [0.0, 1.25, 1.25], [2.25, 2.25, 0.0]),
        ("code", "value", [3.75, 3.75, 4.25], [2.75, 3.0, 3.0]),
        ("code", "gradient", [0.0, 0.0, 1.25], [2.25, 0.0, 0.0]),
    ],
)
def test_contributions_in_numbers(form: Any, contribution: Any, positive: list[float], negative: list[float]) -> None:
    """A > 0: r = 1.5 (weight 2) and 1.25; A < 0: r = 0.75 (weight 3) and 0.5. A ratio at its bound has no gradient left."""
    ratio, size = tensor(1.5, 1.25, 0.75, 0.5), tensor(2.0, 1.0, 3.0, 1.0)
    p, n = SMALL.but(form=form, contribution=contribution).contributions(ratio, size, torch.tensor([[True, True, False, False]]))
    assert p.tolist() == positive
    assert n.tolist() == negative


def test_stairs_end_at_the_stop_and_never_pass_it() -> None:
    assert stairs(0.0, 1.0, 0.4) == [0.0, 0.4, 0.8, 1.0]
    assert stairs(0.5, 0.6, 7.0) == [0.5, 0.6]
    assert len(stairs(0.6, 0.9, 0.02)) == 16  # (0.9 - 0.6)/0.02 is 15.000000000000002
    for start, stop, step in ((0.6, 0.9, 0.02), (1.2, 3.0, 0.05), (0.8, 0.95, 0.05), (0.0, 1.0, 0.3)):
        path = stairs(start, stop, step)
        assert path == sorted(set(path))
        assert path[-1] == stop


@pytest.mark.parametrize(("extra", "bounds"), [(0.0, (0.75, 1.5)), (1.5e-8, (0.5, 1.25))])
def test_the_code_divides_by_a_little_more(extra: float, bounds: tuple[float, float]) -> None:
    """P/(N + 1e-8) >= 1 with N = 1: P = 1 does not reach it, P = 1 + 1.5e-8 does."""
    part = SMALL.but(form="code", target=1.0)
    assert found(part, at(tensor(1.0, 1.0)), tensor(1.0 + extra, -1.0)) == bounds


@pytest.mark.parametrize(("target", "bounds"), [(0.5, (0.5, 1.25)), (0.500001, (0.75, 1.5))])
def test_a_share_equal_to_the_target_is_enough(target: float, bounds: tuple[float, float]) -> None:
    assert found(SMALL.but(target=target), at(tensor(1.0, 1.0)), tensor(1.0, -1.0)) == bounds


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("how", ["padding", "left out"])
def test_what_is_not_valid_does_not_count(form: Any, how: str) -> None:
    """Ratios 1 at A = 1 and -1 are balanced; a third decision of A = -9 would not be, nor would NaN in its place."""
    valid = torch.tensor([[True, True, False]])
    old = tensor(-1.0, -1.0, math.nan if how == "padding" else -1.0)
    batch = at(tensor(1.0, 1.0, 1.0), old, valid if how == "padding" else None)
    part = SMALL.but(form=form, target=0.4)
    assert found(part, batch, tensor(1.0, -1.0, -9.0), valid) == (0.5, 1.25)
    if how == "left out":
        assert found(part, batch, tensor(1.0, -1.0, -9.0)) == (0.75, 1.5)


def test_the_paper_weighs_by_the_probability_of_the_sample() -> None:
    """0.9 against 0.1: the positive share is 0.9 on paper and 1/1 in the code."""
    batch, a = at(tensor(1.0, 1.0), tensor(0.9, 0.1).log()), tensor(1.0, -1.0)
    assert found(SMALL.but(target=0.89), batch, a) == (0.5, 1.25)
    assert found(SMALL.but(target=0.91), batch, a) == (0.75, 1.5)
    assert found(SMALL.but(target=0.99, form="code"), batch, a) == (0.5, 1.25)
    assert found(SMALL.but(target=1.01, form="code"), batch, a) == (0.75, 1.5)


def test_cut_is_strict_and_leaves_decisions_without_advantage() -> None:
    """Bounds 0.5 and 2: a ratio at its bound keeps its gradient, A = 0 has none to lose."""
    log = tensor(-2.0, -1.0, 0.0, 1.0, 2.0) * math.log(2)
    batch = Batch.of(
        logp=log, logp_old=torch.zeros_like(log),
        stats={"clip_low@minibatch": torch.full_like(log, math.exp(-math.log(2))),
               "clip_high@minibatch": torch.full_like(log, math.exp(math.log(2)))},
    )  # fmt: skip
    now = {"logp": log}

    def cut(part: BalancedClip, a: float) -> list[bool]:
        return part.cut(batch, now, torch.full_like(log, a))[0].tolist()

    assert cut(BalancedClip(), 1.0) == [False, False, False, False, True]
    assert cut(BalancedClip(), -1.0) == [True, False, False, False, False]
    assert cut(BalancedClip(dual=3.0), -1.0) == [True, False, False, False, True]
    assert cut(BalancedClip(dual=float(log[0, 3].exp())), -1.0) == [True, False, False, False, True]  # a ratio of 2 is at the bound
    assert cut(BalancedClip(dual=3.0), 1.0) == [False, False, False, False, True]
    assert cut(BalancedClip(dual=3.0), 0.0) == cut(BalancedClip(), 0.0) == [False] * 5


def test_the_loss_in_numbers() -> None:
    """Bounds 0.6 and 1.2, dual clip 3."""
    ratio, a = tensor(1.5, 0.5, 1.5, 0.5, 4.0), tensor(2.0, 2.0, -2.0, -2.0, -2.0)
    batch = at(ratio, clip_low=0.6, clip_high=1.2)
    now = {"logp": batch.stat("logp@now")}
    assert BalancedClip()(batch, now, a)[0].tolist() == pytest.approx([-2.4, -1.0, 3.0, 1.2, 8.0])
    assert BalancedClip(dual=3.0)(batch, now, a)[0].tolist() == pytest.approx([-2.4, -1.0, 3.0, 1.2, 6.0])


def test_advantages_of_another_shape_are_refused() -> None:
    batch = at(tensor(1.0, 1.0), clip_low=0.6, clip_high=1.2)
    now = {"logp": batch.stat("logp@now")}
    for call in (
        lambda: BalancedClip()(batch, now, torch.ones(2, 1)),
        lambda: BalancedClip().survey(batch, now, torch.ones(2, 1), batch.mask),
    ):
        with pytest.raises(CallError, match=r"'advantage' has shape \(2, 1\), expected \(1, 2\)"):
            call()


def test_the_settings_of_the_paper_and_what_is_declared() -> None:
    part = BalancedClip()
    assert (part.low_start, part.low_max, part.low_step) == (0.6, 0.9, 0.02)
    assert (part.high_start, part.high_max, part.high_step) == (1.2, 3.0, 0.05)
    assert (part.target, part.form, part.contribution, part.dual) == (0.4, "paper", "value", None)
    assert part.unit_slope
    assert len(part.path()) == 1 + 36 + 15
    assert part.needs == {"logp@now", "logp@old"}


def test_the_settings_of_the_released_script() -> None:
    part = make_part("surrogate", "balanced-clip-code")
    assert isinstance(part, BalancedClip)
    assert (part.low_start, part.low_max, part.low_step) == (0.8, 0.95, 0.05)
    assert (part.high_start, part.high_max, part.high_step) == (1.2, 2.0, 0.05)
    assert (part.target, part.form, part.contribution, part.dual) == (0.5, "code", "value", 3.0)
