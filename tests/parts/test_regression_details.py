"""Regressions on whole rows, detail by detail: which decisions and rows count, who is compared with whom, where the loss is."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.part import Can
from polopt.parts.surrogate.regression import AdvantageRegression, RelativeRegression, at_end, row_advantage, row_log_ratio

F64 = torch.float64
NAN = math.nan


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def flags(*rows: list[int]) -> Tensor:
    return torch.tensor(rows).bool()


def losses(part: Any, batch: Batch, now: Tensor, a: Tensor, valid: Tensor | None = None) -> Tensor:
    valid = batch.mask if valid is None else valid
    if isinstance(part, RelativeRegression):
        batch = batch.adding(part.survey(batch, {"logp": now.detach()}, a, valid))
    out: Tensor = part(batch, {"logp": now}, a, valid)
    return out


# -------------------------------------------------------------------- rows
def test_the_log_ratio_of_a_row_is_a_plain_sum() -> None:
    """Over its own decisions, whatever the padding holds; far beyond the +-20 of single ratios."""
    now = tensor([30, 40, NAN], [1, -2, -3.5]).requires_grad_()
    batch = Batch.of(
        logp=now, logp_old=tensor([0, 0, NAN], [0, 0, 0]), mask=flags([1, 1, 0], [1, 1, 1]),
        stats={"logp@ref": tensor([1, 2, NAN], [0, 0.5, 0])},
    )  # fmt: skip
    assert row_log_ratio(batch, {"logp": now}, "old").tolist() == [70, -4.5]
    ratio = row_log_ratio(batch, {"logp": now}, "ref")
    assert ratio.tolist() == [67, -5]
    assert torch.autograd.grad(ratio.sum(), now)[0].tolist() == [[1, 1, 0], [1, 1, 1]]
    half = torch.full((1, 3), -20.0, dtype=torch.bfloat16)
    assert row_log_ratio(Batch.of(logp=half, logp_old=half), {"logp": half}, "old").dtype == torch.float32
    with pytest.raises(CallError, match=r"'logp@now' has shape \(1, 3\), expected \(2, 3\)"):
        row_log_ratio(batch, {"logp": half}, "old")
    with pytest.raises(CallError, match=r"'logp@ref' has shape \(3, 2\), expected \(2, 3\)"):
        row_log_ratio(batch.adding({"logp@ref": now.T}), {"logp": now}, "ref")


def test_rows_have_the_advantage_of_what_counts_and_one_loss() -> None:
    batch = Batch.of(logp=torch.zeros(3, 4))
    valid = flags([0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0])
    a = tensor([9, 2, 4, 9], [5, 9, 9, 9], [7, 7, 7, 7])
    assert row_advantage(batch, a, valid).tolist() == [3, 5, 0]
    assert at_end(torch.tensor([2.0, 3.0, 4.0]), valid).tolist() == [[0, 0, 2, 0], [3, 0, 0, 0], [0, 0, 0, 0]]


# -------------------------------------------------------------------- A*-PO
def test_the_settings_of_a_star_po_and_what_it_declares() -> None:
    part = AdvantageRegression()
    assert part.beta == 1e-3
    assert part.needs == {"logp@now", "logp@ref"}
    assert part.requires == {Can.SCORE, Can.REFERENCE}
    assert part.rows


def test_the_regression_in_numbers() -> None:
    """(0.5 sum d - A)^2 at the last decision that counts; d of all decisions of the row, also of those that do not."""
    now = tensor([1, 2, 3], [1, -1, 5], [1, 1, 1]).requires_grad_()
    batch = Batch.of(logp=now, mask=flags([1, 1, 1], [1, 1, 0], [1, 1, 1]), stats={"logp@ref": torch.zeros(3, 3, dtype=F64)})
    a = tensor([2, 2, 2], [1.5, 1.5, 8], [3, 3, 3])
    valid = flags([1, 1, 0], [1, 1, 0], [0, 0, 0])
    loss = losses(AdvantageRegression(beta=0.5), batch, now, a, valid)
    assert loss.tolist() == [[0, 1, 0], [0, 2.25, 0], [0, 0, 0]]
    assert torch.autograd.grad(loss.sum(), now)[0].tolist() == [[1, 1, 1], [-1.5, -1.5, 0], [0, 0, 0]]
    assert float(losses(AdvantageRegression(), batch, now, a)[0, 2].detach()) == pytest.approx((6e-3 - 2) ** 2)
    with pytest.raises(CallError, match="'advantage' has shape"):
        losses(AdvantageRegression(), batch, now, a[:, :1])


# -------------------------------------------------------------------- REBEL
GROUP = [0, 1, 0, 1, 0, 1]  # two groups of three, interleaved
RATIO = [0.5, -1.0, 1.5, 0.25, -0.5, 2.0]
SCORE = [1.0, 2.0, 3.0, 0.0, 2.0, 1.0]


def answers(ratio: list[float] = RATIO, group: list[int] = GROUP, steps: int = 4) -> tuple[Batch, Tensor]:
    """Rows with these log-ratios, shared out over unequal numbers of decisions, NaN in the padding."""
    n = len(ratio)
    mask = torch.arange(steps) < (1 + torch.arange(n)[:, None] % steps)
    d = torch.tensor(ratio, dtype=F64)[:, None] / mask.sum(1, keepdim=True)
    old = torch.full((n, steps), -1.0, dtype=F64)
    now = torch.where(mask, old + d, NAN).requires_grad_()
    return Batch.of(logp=now, logp_old=torch.where(mask, old, NAN), mask=mask, group=group), now


def spread(score: list[float], steps: int = 4) -> Tensor:
    return torch.tensor(score, dtype=F64)[:, None].expand(len(score), steps)


def poisoned(score: list[float], valid: Tensor) -> Tensor:
    """These advantages where decisions count; elsewhere others, by which the worst would be the best."""
    return torch.where(valid, spread(score, valid.shape[1]), spread([-100 * x for x in score], valid.shape[1]))


def pairs_of(rows: list[list[int]], eta: float, form: str = "paper") -> list[float]:
    """For each group of rows the mean over its pairs of ((d - d')/eta - (A - A'))^2."""
    e = [d / eta - s for d, s in zip(RATIO, SCORE, strict=True)]
    factor = eta**2 if form == "code" else 1.0
    both = [[(e[i] - e[j]) ** 2 for i, j in itertools.combinations(g, 2)] for g in rows]
    return [factor * sum(x) / len(x) for x in both]


def test_the_settings_of_rebel_and_what_it_declares() -> None:
    part = RelativeRegression()
    assert (part.eta, part.pairs, part.form) == (1.0, "all", "paper")
    assert part.reads == {"group"}
    assert part.needs == {"logp@now", "logp@old"}
    assert part.requires == {Can.SCORE, Can.GROUPS}
    assert part.rows
    assert part.groups
    assert part.surveys == ("centre@minibatch", "share@minibatch")


@pytest.mark.parametrize(("sampler", "refused"), [({}, False), ({"group_size": 1}, True), ({"group_size": 2}, False)])
def test_only_groups_of_one_are_refused(sampler: dict[str, int], refused: bool) -> None:
    method: Any = SimpleNamespace(sampler=SimpleNamespace(**sampler))
    assert (RelativeRegression().validate(method, None) is not None) is refused  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("pairs", ["all", "best-worst"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_groups_in_any_order(eta: float, pairs: Any, form: Any) -> None:
    """The rows' losses add up to three for each group times the mean over its pairs: of all, or of best and worst."""
    rows = [[0, 2, 4], [1, 3, 5]] if pairs == "all" else [[0, 2], [1, 3]]
    first, second = pairs_of(rows, eta, form)
    batch, now = answers()
    loss = losses(RelativeRegression(eta=eta, pairs=pairs, form=form), batch, now, poisoned(SCORE, batch.mask))
    assert float(loss[0::2].sum().detach()) == pytest.approx(3 * first)
    assert float(loss[1::2].sum().detach()) == pytest.approx(3 * second)
    where = (loss != 0).nonzero().tolist()
    assert all(t == i % 4 for i, t in where)  # at the last decision of each row
    (slope,) = torch.autograd.grad(loss.sum(), now)
    assert bool((slope[~batch.mask] == 0).all())
    assert float(slope.nan_to_num().abs().max()) > 0.1


def test_rows_that_do_not_count_are_no_partners() -> None:
    """Row 4 has left the loss: of the first group 0 and 2 remain; of the second one row alone, which has no loss."""
    batch, now = answers()
    valid = batch.mask & torch.tensor([1, 0, 1, 1, 0, 0]).bool()[:, None]
    for pairs in ("all", "best-worst"):
        part = RelativeRegression(pairs=pairs)
        told = part.survey(batch, {"logp": now.detach()}, spread(SCORE), valid)
        assert told["share@minibatch"].shape == told["centre@minibatch"].shape == batch.shape
        assert told["share@minibatch"][:, 0].tolist() == [4, 0, 4, 0, 0, 0]  # 2 n / (n - 1)
        e = [d - s for d, s in zip(RATIO, SCORE, strict=True)]
        assert told["centre@minibatch"][[0, 2], 0].tolist() == pytest.approx([(e[0] + e[2]) / 2] * 2)
        assert bool(told["centre@minibatch"].isfinite().all())
        assert float(told["centre@minibatch"][3, 0]) == pytest.approx(e[3])  # alone it is the mean
        loss = losses(part, batch, now, spread(SCORE), valid)
        assert float(loss.sum().detach()) == pytest.approx(2 * (e[0] - e[2]) ** 2)


@pytest.mark.parametrize("pairs", ["all", "best-worst"])
def test_a_group_of_which_nothing_counts_has_no_gradient(pairs: Any) -> None:
    batch, now = answers()
    valid = batch.mask & torch.tensor([1, 0] * 3).bool()[:, None]
    loss = losses(RelativeRegression(pairs=pairs), batch, now, spread(SCORE), valid)
    assert loss[1::2].tolist() == [[0.0] * 4] * 3
    (slope,) = torch.autograd.grad(loss.sum(), now)
    assert slope[1::2].tolist() == [[0.0] * 4] * 3
    assert float(slope[0::2].abs().max()) > 0.1


def test_answers_of_one_decision() -> None:
    batch, now = answers([0.5, -1.0], [0, 0], steps=1)
    for pairs in ("all", "best-worst"):
        loss = losses(RelativeRegression(pairs=pairs), batch, now, spread([1.0, 2.0], 1))
        assert float(loss.sum().detach()) == pytest.approx(2 * (1.5 + 1.0) ** 2)


@pytest.mark.parametrize(
    ("score", "taken"),
    [
        ([1.0, 3.0, 3.0, 0.0, 0.0], [0, 1, 0, 0, 1]),  # the first of the best, the last of the worst
        ([1.0, 1.0, 1.0, 1.0, 1.0], [1, 0, 0, 0, 1]),
        ([0.0, 3.0, 1.0, 3.0, 2.0], [1, 1, 0, 0, 0]),
        ([-1.0, -3.0, -2.0, -3.0, -2.0], [1, 0, 0, 1, 0]),
        ([2.0, -1.0, 5.0, 0.0, 1.0], [0, 1, 1, 0, 0]),
    ],
)
def test_the_best_and_the_worst(score: list[float], taken: list[int]) -> None:
    batch, now = answers(RATIO[:5], [0] * 5)
    told = RelativeRegression(pairs="best-worst").survey(batch, {"logp": now.detach()}, spread(score), batch.mask)
    assert told["share@minibatch"][:, 0].tolist() == [10.0 * x for x in taken]
    valid = batch.mask & ~torch.tensor(taken).bool()[:, None]  # without these two: others
    told = RelativeRegression(pairs="best-worst").survey(batch, {"logp": now.detach()}, spread(score), valid)
    rest = [i for i in range(5) if not taken[i]]
    best = max(rest, key=lambda i: (score[i], -i))
    worst = min(rest, key=lambda i: (score[i], -i))
    assert told["share@minibatch"][:, 0].tolist() == [6.0 * (i in (best, worst)) for i in range(5)]


def test_the_centre_is_held_fixed_and_shapes_are_checked() -> None:
    """-2 at both ends: d/dd of 2 (e - e')^2 is 4 (e - e')."""
    batch, now = answers([1.0, -1.0], [0, 0])
    loss = losses(RelativeRegression(), batch, now, spread([0.0, 0.0]))
    assert float(loss.sum().detach()) == pytest.approx(2 * 2.0**2)
    assert torch.autograd.grad(loss.sum(), now)[0][:, 0].tolist() == pytest.approx([8.0, -8.0])
    known = batch.adding({k: torch.ones(batch.shape) for k in ("centre@minibatch", "share@minibatch")})
    with pytest.raises(CallError, match="'advantage' has shape"):
        RelativeRegression()(known, {"logp": now}, spread([0.0, 0.0], 1), batch.mask)
