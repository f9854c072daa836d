"""Surrogates, penalties, the critic, select, weight and aggregates: worked numbers, slopes and edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.batch import Batch, Totals
from polopt.errors import CallError, MissingStatistic
from polopt.objective import Now
from polopt.part import Part, call, make_part
from polopt.parts.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm, TokenMean
from polopt.parts.critic import ValueLoss
from polopt.parts.penalty.entropy import EntropyBonus
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.select.truncated import DropTruncated
from polopt.parts.surrogate.capped_weight import CappedWeight
from polopt.parts.surrogate.clip import Clip, SequenceClip
from polopt.parts.surrogate.score import Ratio, ScoreFunction
from polopt.parts.weight.truncated_importance import TruncatedImportance

torch.set_num_threads(1)
INF = math.inf


def at_ratios(ratios: list[list[float]], mask: list[list[int]] | None = None) -> tuple[Batch, Tensor]:
    """A batch whose probability ratios are these, and its log-probabilities now as a leaf."""
    old = torch.full((len(ratios), len(ratios[0])), -1.5, dtype=torch.float64)
    logp = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    return Batch.of(logp=logp, logp_old=old, mask=None if mask is None else torch.tensor(mask)), logp


def run(part: Part, batch: Batch, **given: Any) -> Tensor:
    now = Now({k.removesuffix("@now"): v for k, v in batch.stats.items() if k.endswith("@now")})
    out: Tensor = call(part, batch=batch, now=now, valid=batch.mask, **given)
    return out


def slope(part: Part, ratio: float, advantage: float) -> tuple[float, float]:
    """(loss, dloss/dlogp) of one decision."""
    batch, logp = at_ratios([[ratio]])
    loss = run(part, batch, advantage=torch.tensor([[advantage]], dtype=torch.float64))
    loss.sum().backward()
    assert logp.grad is not None
    return loss.item(), logp.grad.item()


# -------------------------------------------------------------------- the clip
@pytest.mark.identity(
    "ppo", "grpo", "dapo", "the clip cuts the gradient where A > 0, r > 1 + eps or A < 0, r < 1 - eps, and keeps it elsewhere"
)
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # at the old policy: -A
        (1.1, 2.0, -2.2, -2.2),  # inside
        (1.5, 2.0, -2.4, 0.0),  # gained enough
        (0.5, 2.0, -1.0, -1.0),  # lost probability against the advantage: full pull back
        (0.5, -2.0, 1.6, 0.0),  # lost enough
        (1.5, -2.0, 3.0, 3.0),  # gained against the advantage: full push down
    ],
)
def test_clip_worked_numbers(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    found = slope(Clip(0.2, 0.2), ratio, advantage)
    assert np.allclose(found, (loss, gradient), atol=1e-12)


@pytest.mark.identity("ppo", "the clipped surrogate never exceeds the plain one; with bounds at infinity they are equal")
@settings(max_examples=100, deadline=None)
@given(
    ratio=st.floats(0.05, 8), advantage=st.floats(-3, 3), low=st.floats(0, 1), high=st.floats(0, 2),
    dual=st.none() | st.floats(1.5, 4),
)  # fmt: skip
def test_clip_never_exceeds_the_plain_surrogate(
    ratio: float, advantage: float, low: float, high: float, dual: float | None
) -> None:
    gain = -slope(Clip(low, high), ratio, advantage)[0]
    plain = -slope(Ratio(), ratio, advantage)[0]
    assert gain <= plain + 1e-12
    assert np.allclose(slope(Clip(INF, INF), ratio, advantage), slope(Ratio(), ratio, advantage), atol=1e-12)
    if dual is not None:
        bounded = -slope(Clip(low, high, dual), ratio, advantage)[0]
        assert bounded >= gain - 1e-12
        if advantage < 0:
            assert bounded >= dual * advantage - 1e-12
        else:
            assert math.isclose(bounded, gain, abs_tol=1e-12)


def test_dual_clip_stops_the_push_of_large_ratios() -> None:
    assert np.allclose(slope(Clip(dual=3.0), 2.0, -1.0), (2.0, 2.0))
    assert np.allclose(slope(Clip(dual=3.0), 5.0, -1.0), (3.0, 0.0))
    assert np.allclose(slope(Clip(), 5.0, -1.0), (5.0, 5.0))


@pytest.mark.parametrize("part", [Clip(), Clip(0.1, 0.4, 2.0), SequenceClip(0.1, 0.2), SequenceClip()])
def test_cut_marks_exactly_the_decisions_without_gradient(part: Clip) -> None:
    ratios = [[0.4], [0.85], [0.95], [1.0], [1.05], [1.3], [1.7], [4.0]]
    for sign in (1.0, -1.0):
        batch, logp = at_ratios(ratios)
        advantage = torch.full((8, 1), sign, dtype=torch.float64)
        run(part, batch, advantage=advantage).sum().backward()
        assert logp.grad is not None
        cut = part.cut(batch, Now({"logp": logp.detach()}), advantage)
        assert torch.equal(cut, logp.grad == 0)
        assert bool(cut.any())
        assert not bool(cut.all())


def test_clip_presets_and_bounds() -> None:
    assert make_part("surrogate", "clip-higher") == Clip(0.2, 0.28)
    assert make_part("surrogate", "dual-clip") == Clip(dual=3.0)
    assert make_part("surrogate", "clip", high=INF).describe().endswith("high=inf, dual=None)")
    for bad in ({"low": -0.1}, {"dual": 1.0}, {"high": -1.0}):
        with pytest.raises(CallError, match=r"must be"):
            make_part("surrogate", "clip", **bad)


def test_extreme_log_ratios_stay_finite() -> None:
    logp = torch.tensor([[-1e30, 0.0, -800.0, -5.0]], requires_grad=True)
    batch = Batch.of(logp=logp, logp_old=torch.tensor([[-5.0, -1e30, -1.0, -900.0]]), logp_ref=torch.full((1, 4), -1e20))
    for part in (Clip(), Clip(INF, INF), Ratio(), CappedWeight(), SequenceClip(), KLToReference(1.0, "k3")):
        for sign in (1.0, -1.0):
            logp.grad = None
            loss = run(part, batch, advantage=torch.full((1, 4), sign))
            loss.sum().backward()
            assert bool(loss.isfinite().all()), part
            assert bool(logp.grad.isfinite().all()), part  # type: ignore[union-attr]


# -------------------------------------------------------------------- other surrogates
@pytest.mark.identity("ppo", "trpo", "gspo", "cispo", "at ratio 1 the gradient of a decision is -A, that of the score function")
def test_at_the_old_policy_every_surrogate_has_the_policy_gradient() -> None:
    """r = 1: the gradient of each surrogate in logp is -A (GSPO: the row's mean of A, spread over the row)."""
    for advantage in (0.7, -1.3):
        for part in (ScoreFunction(), Ratio(), Clip(), Clip(0.01, 3.0), Clip(dual=2.0), CappedWeight(), SequenceClip()):
            assert math.isclose(slope(part, 1.0, advantage)[1], -advantage, abs_tol=1e-12), part


@pytest.mark.identity("cispo", "no decision loses its gradient: it is the capped ratio times A")
def test_capped_weight_keeps_every_gradient() -> None:
    loss, gradient = slope(CappedWeight(cap=2.0), 5.0, 3.0)
    assert math.isclose(gradient, -2.0 * 3.0)
    assert math.isclose(loss, -2.0 * 3.0 * (-1.5 + math.log(5.0)))
    assert math.isclose(slope(CappedWeight(cap=2.0), 0.1, 3.0)[1], -0.1 * 3.0)


@pytest.mark.identity("gspo", "the ratio of an answer is the geometric mean of its tokens' ratios")
def test_sequence_ratio_is_the_geometric_mean_of_valid_decisions() -> None:
    batch, logp = at_ratios([[2.0, 0.5, 8.0], [1.1, 1.1, 1.1]], mask=[[1, 1, 0], [1, 1, 1]])
    advantage = torch.ones(2, 3, dtype=torch.float64)
    loss = run(SequenceClip(0.2, 0.2), batch, advantage=advantage)
    np.testing.assert_allclose(loss[0, :2].detach().numpy(), [-1.0, -1.0])
    np.testing.assert_allclose(loss[1].detach().numpy(), [-1.1] * 3)
    loss[0, 0].backward()
    assert logp.grad is not None
    np.testing.assert_allclose(logp.grad[0].numpy(), [-0.5, -0.5, 0.0])


@pytest.mark.identity("gspo", "on answers of one token it is the token clip")
def test_sequence_clip_on_single_decisions_is_the_clip() -> None:
    ratios = [[0.5], [0.9], [1.0], [1.3], [4.0]]
    advantage = torch.tensor([[1.0], [-1.0], [2.0], [-2.0], [1.0]], dtype=torch.float64)
    batch, _ = at_ratios(ratios)
    torch.testing.assert_close(
        run(SequenceClip(0.2, 0.3), batch, advantage=advantage), run(Clip(0.2, 0.3), batch, advantage=advantage)
    )


def test_missing_statistics_name_what_to_pass() -> None:
    only_now = Batch.of(logp=torch.zeros(1, 2))
    only_old = Batch.of(logp_old=torch.zeros(1, 2), logp_ref=torch.zeros(1, 2))
    advantage = torch.ones(1, 2)
    for part in (Clip(), Ratio(), SequenceClip(), CappedWeight()):
        with pytest.raises(MissingStatistic, match="logp_old="):
            run(part, only_now, advantage=advantage)
        with pytest.raises(MissingStatistic, match="logp="):
            run(part, only_old, advantage=advantage)
    with pytest.raises(MissingStatistic, match="logp_ref="):
        run(KLToReference(), only_now)
    with pytest.raises(MissingStatistic, match="entropy="):
        run(EntropyBonus(), only_now)
    with pytest.raises(MissingStatistic, match="logp_behaviour="):
        run(TruncatedImportance(), only_old)
    with pytest.raises(MissingStatistic, match="truncated"):
        run(DropTruncated(), only_now)


def test_wrong_shapes_are_refused_by_name() -> None:
    batch = Batch.of(logp=torch.zeros(2, 3), logp_old=torch.zeros(2, 3))
    for part in (Clip(), ScoreFunction(), Ratio(), SequenceClip(), CappedWeight()):
        with pytest.raises(CallError, match=r"'advantage' has shape \(2,\), expected \(2, 3\)"):
            run(part, batch, advantage=torch.zeros(2))


# -------------------------------------------------------------------- penalties and critic
@pytest.mark.identity("grpo", "the KL estimators k1, k2, k3 and the gradient of k3")
def test_kl_estimators() -> None:
    logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0]], dtype=torch.float64)
    batch = Batch.of(logp=logp, logp_ref=ref)
    d = (ref - logp).detach().numpy()
    for name, wanted in (("k1", -d), ("k2", d**2 / 2), ("k3", np.exp(d) - d - 1)):
        found = run(KLToReference(0.5, name), batch)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.detach().numpy(), 0.5 * wanted, atol=1e-12)
    run(KLToReference(1.0, "k3"), batch).sum().backward()
    assert logp.grad is not None
    np.testing.assert_allclose(logp.grad.numpy(), 1 - np.exp(d), atol=1e-12)


@pytest.mark.identity("grpo", "k3 is an unbiased estimate of KL(pi || ref) and never negative")
def test_k1_and_k3_are_unbiased_and_k3_is_not_negative() -> None:
    """Enumerated over a small distribution: sum p k1 = sum p k3 = KL(p || q)."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    batch = Batch.of(logp=p[None], logp_ref=q[None])
    kl = float((p.exp() * (p - q)).sum())
    for name in ("k1", "k3"):
        assert math.isclose(float((p.exp() * run(KLToReference(1.0, name), batch)[0]).sum()), kl, abs_tol=1e-12)  # type: ignore[arg-type]
    assert bool((run(KLToReference(1.0, "k3"), batch) >= 0).all())


def test_entropy_bonus_is_rewarded() -> None:
    batch = Batch.of(entropy=torch.tensor([[2.0, 1.0]]))
    assert run(EntropyBonus(0.5), batch).tolist() == [[-1.0, -0.5]]


@pytest.mark.identity("ppo-lm", "the larger of the plain and the clipped squared error of the value")
def test_value_loss_plain_and_clipped() -> None:
    value = torch.tensor([[1.0, 3.0, 0.0]], requires_grad=True)
    batch = Batch.of(
        value=value, stats={"return@old": torch.tensor([[2.0, 2.0, 2.0]]), "value@old": torch.tensor([[1.0, 1.0, 1.0]])}
    )
    assert run(ValueLoss(0.5), batch).tolist() == [[0.5, 0.5, 2.0]]
    clipped = run(ValueLoss(1.0, clip=0.5), batch)
    # second: clipped value 1.5 gives 0.25 < 1; third: clipped value 0.5 gives 2.25 < 4
    assert clipped.tolist() == [[1.0, 1.0, 4.0]]
    inside = Batch.of(value=torch.tensor([[1.9]]), stats={"return@old": torch.tensor([[2.0]]), "value@old": torch.tensor([[0.0]])})
    assert math.isclose(run(ValueLoss(1.0, clip=0.5), inside).item(), 1.5**2, rel_tol=1e-6)
    assert ValueLoss().needs == {"value@now"}
    assert ValueLoss(clip=0.2).needs == {"value@now", "value@old"}


# -------------------------------------------------------------------- select and weight
def test_truncated_rows_leave() -> None:
    batch = Batch.of(mask=torch.tensor([[1, 1], [1, 0]]), row={"truncated": torch.tensor([1.0, 0.0])})
    assert run(DropTruncated(), batch).tolist() == [[False, False], [True, False]]


def test_truncated_importance() -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0]])
    behaviour = torch.tensor([[-1.0, -3.0, -0.5]])
    batch = Batch.of(logp_old=old, logp_behaviour=behaviour)
    np.testing.assert_allclose(run(TruncatedImportance(2.0), batch).numpy(), [[1.0, 2.0, math.exp(-0.5)]], rtol=1e-6)


# -------------------------------------------------------------------- aggregates
AGGREGATES = [TokenMean(), SeqMeanTokenMean(), SeqMeanTokenSum(), SeqMeanTokenSumNorm(), SeqMeanTokenSumNorm(length=7)]


def by_rows(name: str, rows: list[list[float]], length: int) -> float:
    """Aggregates of lists of valid losses."""
    rows = [r for r in rows if r]
    if not rows:
        return 0.0
    return {
        "token-mean": sum(map(sum, rows)) / sum(map(len, rows)),
        "seq-mean-token-mean": sum(sum(r) / len(r) for r in rows) / len(rows),
        "seq-mean-token-sum": sum(map(sum, rows)) / len(rows),
        "seq-mean-token-sum-norm": sum(map(sum, rows)) / len(rows) / length,
    }[name]


@pytest.mark.identity("dr-grpo", "dapo", "grpo", "rloo", "how decisions add up: per token, per answer, per constant length")
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), part=st.sampled_from(AGGREGATES), p=st.sampled_from([0.0, 0.2, 0.6, 1.0]))
def test_aggregates_are_what_they_say_and_add_up(seed: int, part: Part, p: float) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=g, dtype=torch.float64)
    valid = torch.rand(5, 4, generator=g) < p
    batch = Batch.of(mask=valid, horizon=9)
    totals, loss = Totals.of(valid), torch.where(valid, x, 0.0)
    whole = call(part, loss=loss, batch=batch, valid=valid, totals=totals)
    length = getattr(part, "length", None) or 9
    wanted = by_rows(part.name, [x[i][valid[i]].tolist() for i in range(5)], length)
    assert math.isclose(float(whole), wanted, abs_tol=1e-12)
    cut = sum(
        float(call(part, loss=loss[s], batch=batch.rows(s), valid=valid[s], totals=totals))
        for s in (slice(0, 1), slice(1, 4), slice(4, 5))
    )
    assert math.isclose(cut, float(whole), abs_tol=1e-12)


def test_row_sum_norm_needs_a_length() -> None:
    batch = Batch.of(mask=torch.ones(1, 2), horizon=0)
    with pytest.raises(CallError, match="horizon"):
        call(SeqMeanTokenSumNorm(), loss=torch.zeros(1, 2), batch=batch, valid=batch.mask, totals=Totals.of(batch.mask))
