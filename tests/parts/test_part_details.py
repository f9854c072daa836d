"""Details of parts that are easily wrong: masks, gradients, the defaults of the papers at work, and what lies at the edges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from part_cases import ADVANTAGES, IDS, MASK, batch_of, run, tensors
from torch import Tensor

from polopt.batch import Batch, Totals
from polopt.errors import CallError, MissingStatistic
from polopt.objective import Now
from polopt.part import Part, call, make_part
from polopt.parts.advantage.gae import GAE, NStep
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.advantage.running_mean import RunningMean
from polopt.parts.advantage.scan import discounted_sum, standardised
from polopt.parts.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm, TokenMean
from polopt.parts.critic import ValueLoss
from polopt.parts.penalty.adaptive_kl import AdaptiveKL
from polopt.parts.penalty.entropy import EntropyBonus
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.reward.kl import KLInReward
from polopt.parts.reward.overlong import SoftOverlong
from polopt.parts.surrogate.capped_weight import CappedWeight
from polopt.parts.surrogate.clip import Clip, SequenceClip
from polopt.parts.surrogate.score import Ratio
from polopt.parts.weight.truncated_importance import TruncatedImportance

torch.set_num_threads(1)


# -------------------------------------------------------------------- masks and gradients
def spoiled(x: Mapping[str, Tensor], bad: float) -> dict[str, Tensor]:
    return {k: torch.where(MASK, v, bad) for k, v in x.items()}


@pytest.mark.parametrize("part", ADVANTAGES, ids=IDS[: len(ADVANTAGES)])
def test_advantages_and_returns_are_zero_outside_the_mask_and_without_gradient(part: Part) -> None:
    x = tensors()
    x["value@old"].requires_grad_()
    x["value_next@old"].requires_grad_()
    wanted = [run(part, batch_of(x), x)]
    dirty = batch_of(spoiled(x, math.nan))
    found = [run(part, dirty, x)]
    if hasattr(part, "returns"):
        wanted.append(part.returns(batch_of(x)))
        found.append(part.returns(dirty))
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b)
        assert bool((a[~MASK] == 0).all())
        assert bool((a[MASK] != 0).any())
        assert not a.requires_grad


@pytest.mark.parametrize("part", [KLInReward(), KLInReward(form="sequence"), TruncatedImportance()])
def test_reward_and_weight_parts_carry_no_gradient(part: Part) -> None:
    for name in ("logp@old", "logp@ref", "logp@behaviour"):
        x = tensors()
        x[name].requires_grad_()
        assert not run(part, batch_of(x), x).requires_grad


def test_garbage_outside_the_mask_reaches_no_reward_and_no_weight() -> None:
    x = tensors()
    dirty = {**spoiled(x, math.nan), "reward": x["reward"]}
    for part in (KLInReward(), KLInReward(form="sequence"), TruncatedImportance()):
        assert torch.equal(run(part, batch_of(dirty), dirty), run(part, batch_of(x), x))
    assert run(TruncatedImportance(), batch_of(dirty), dirty)[~MASK].tolist() == [1.0] * 4


def test_surrogates_of_the_ratio_ignore_garbage_outside_the_mask() -> None:
    """The ratio outside the mask is 1, whatever stands there: no NaN enters a mean over the row."""
    x = tensors()
    dirty = {**spoiled(x, math.nan), "advantage": x["advantage"]}
    for part in (Ratio(), Clip(), SequenceClip()):
        a, b = run(part, batch_of(dirty), dirty), run(part, batch_of(x), x)
        assert torch.equal(a[MASK], b[MASK])
    assert torch.equal(run(Ratio(), batch_of(dirty), dirty)[~MASK], -x["advantage"][~MASK])


def test_a_weight_follows_the_clamped_log_ratio() -> None:
    """Differences beyond 20 are cut before exp: e^20 above, e^-20 below."""
    old = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    batch = Batch.of(logp_old=old, logp_behaviour=torch.tensor([[-30.0, 30.0]], dtype=torch.float64))
    weight = run(TruncatedImportance(cap=1e12), batch, {"advantage": old})
    np.testing.assert_allclose(weight.numpy(), [[math.exp(20), math.exp(-20)]], rtol=1e-12)
    x = {"logp@now": torch.tensor([[30.0, -30.0]]).double(), "advantage": torch.ones(1, 2).double()}
    ratio = run(Ratio(), Batch.of(logp_old=old), x)
    np.testing.assert_allclose(ratio.numpy(), [[-math.exp(20), -math.exp(-20)]], rtol=1e-12)


# -------------------------------------------------------------------- defaults at work
def at(ratio: float, advantage: float, part: Part) -> float:
    """Loss of one decision at this ratio; its log-probability now is -1."""
    x = {"logp@now": torch.tensor([[-1.0]]).double(), "advantage": torch.tensor([[advantage]]).double()}
    batch = Batch.of(logp=x["logp@now"], logp_old=x["logp@now"] - math.log(ratio))
    return run(part, batch, x).item()


@pytest.mark.parametrize(
    ("part", "ratio", "advantage", "loss"),
    [
        (Clip(), 2.0, 1.0, -1.2),  # PPO's epsilon 0.2 on both sides
        (Clip(), 0.5, -1.0, 0.8),
        (Clip(), 1e3, -1.0, 1e3),  # no dual clip
        (make_part("surrogate", "clip-higher"), 2.0, 1.0, -1.28),  # DAPO
        (make_part("surrogate", "clip-higher"), 0.5, -1.0, 0.8),
        (make_part("surrogate", "dual-clip"), 10.0, -1.0, 3.0),  # Ye et al.: c = 3
        (SequenceClip(), 2.0, 1.0, -1.0004),  # GSPO: 3e-4 and 4e-4
        (SequenceClip(), 0.5, -1.0, 0.9997),
        (CappedWeight(), 10.0, 1.0, 5.0),
        (CappedWeight(), 4.0, 1.0, 4.0),
    ],
)
def test_surrogates_with_the_bounds_of_their_papers(part: Part, ratio: float, advantage: float, loss: float) -> None:
    assert math.isclose(at(ratio, advantage, part), loss, rel_tol=1e-12)


def line(**more: Any) -> Batch:
    """Three decisions, then termination; the only reward, 1, comes last, and all values are 0."""
    zero = torch.zeros(1, 3, dtype=torch.float64)
    return Batch.of(
        reward=torch.tensor([[0.0, 0.0, 1.0]]).double(), stats={"value@old": zero, "value_next@old": zero},
        terminated=torch.tensor([[0, 0, 1]]), **more,
    )  # fmt: skip


def test_defaults_of_advantages() -> None:
    np.testing.assert_allclose(GAE()(line())[0].numpy(), [(0.99 * 0.95) ** 2, 0.99 * 0.95, 1.0], rtol=1e-12)
    np.testing.assert_allclose(NStep()(line())[0].numpy(), [0.99**2, 0.99, 1.0], rtol=1e-12)
    assert MonteCarlo()(line())[0].tolist() == [1.0, 1.0, 1.0]  # no discount, no baseline, not standardised
    first = replace(line(), reward=torch.tensor([[[1.0], [0.0], [0.0]]]).double())
    assert MonteCarlo()(first)[0].tolist() == [1.0, 0.0, 0.0]  # a decision answers for what follows it
    above = first.adding({"value@old": torch.full((1, 3), 5.0).double()})
    assert MonteCarlo()(above)[0].tolist() == [1.0, 0.0, 0.0]


def test_group_defaults_are_those_of_grpo() -> None:
    """Sample deviation of the own group plus 1e-4; without scale, the distance from the mean alone."""
    batch = Batch.of(reward=torch.tensor([0.0, 1.0, 0.0, 4.0]).double(), group=[0, 0, 1, 1], mask=torch.ones(4, 1))
    found = GroupBaseline()(batch)[:, 0].numpy()
    wanted = [sign * half / (2**0.5 * half + 1e-4) for half in (0.5, 2.0) for sign in (-1, 1)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    for name, values in (("group-mean", [-0.5, 0.5, -2.0, 2.0]), ("leave-one-out", [-1.0, 1.0, -4.0, 4.0])):
        assert make_part("advantage", name)(batch)[:, 0].tolist() == values
    assert make_part("advantage", "return")(line())[0].tolist() == [1.0, 1.0, 1.0]
    early = replace(line(), reward=torch.tensor([[[1.0], [0.0], [0.0]]]).double())
    assert make_part("advantage", "return")(early)[0].tolist() == [1.0, 1.0, 1.0]


def test_defaults_of_penalties_and_critic() -> None:
    x = {"logp@now": torch.tensor([[-1.0]]).double(), "entropy@now": torch.tensor([[2.0]]).double(),
         "value@now": torch.tensor([[3.0]]).double(), "advantage": torch.zeros(1, 1)}  # fmt: skip
    batch = Batch.of(
        logp=x["logp@now"], logp_ref=torch.tensor([[-1.5]]).double(), logp_old=torch.tensor([[-1.5]]).double(),
        stats={"return@old": torch.tensor([[1.0]]).double(), "value@old": torch.tensor([[1.0]]).double()},
    )  # fmt: skip
    assert math.isclose(run(EntropyBonus(), batch, x).item(), -0.01 * 2.0)  # A3C
    assert math.isclose(run(KLToReference(), batch, x).item(), 0.04 * (math.exp(-0.5) + 0.5 - 1))  # GRPO: beta 0.04, k3
    assert run(ValueLoss(), batch, x).item() == 0.5 * 4.0  # no clip of the value
    adaptive = AdaptiveKL()
    assert math.isclose(run(adaptive, batch, x).item(), math.exp(0.5) - 1 - 0.5)  # weight 1 at the start
    for shift, factor in ((0.11, 0.5), (0.12, 1.0), (0.165, 1.0), (0.18, 2.0)):  # d = 0.0063, 0.0075, 0.0144, 0.0172; target 0.01
        moved = batch.adding({"logp@stepped": batch.stats["logp@old"] + shift})
        assert float(adaptive.observe("stepped", batch=moved, memory={"beta": torch.tensor(1.0)})["beta"]) == factor


def test_defaults_of_rewards_and_weights() -> None:
    mask = torch.arange(20)[None] < torch.tensor([[5], [16], [17], [20]])
    reward = torch.zeros(4, 20, dtype=torch.float64)
    batch = Batch.of(reward=reward, mask=mask, horizon=20)  # a fifth of the limit is soft: 4 of 20 decisions
    np.testing.assert_allclose(SoftOverlong()(batch)[..., 0].sum(1).numpy(), [0.0, 0.0, -0.25, -1.0], atol=1e-12)
    old, ref = torch.tensor([[-1.0, -1.0]]).double(), torch.tensor([[-2.0, -1.0]]).double()
    gap = Batch.of(reward=torch.tensor([1.0]).double(), logp_old=old, logp_ref=ref, logp_behaviour=old - 3)
    np.testing.assert_allclose(KLInReward()(gap)[0, :, 0].numpy(), [-0.05, 1.0], atol=1e-12)
    assert TruncatedImportance()(gap).tolist() == [[2.0, 2.0]]


def test_the_running_mean_keeps_nine_tenths() -> None:
    part = RunningMean()
    memory = part.initial()
    for outcome in (10.0, 20.0):
        batch = Batch.of(reward=torch.tensor([outcome]), mask=torch.ones(1, 1))
        memory |= part.observe("scored", batch=batch, memory=memory)
    assert math.isclose(float(memory["baseline"]), 0.9 * 10 + 0.1 * 20, rel_tol=1e-6)
    assert int(memory["batches"]) == 2
    assert part.moments == {"scored"}


# -------------------------------------------------------------------- advantages, worked out
@pytest.mark.parametrize("part", [GAE(0.9, 0.8), NStep(0.9), MonteCarlo(0.9), MonteCarlo(0.9, "value")])
def test_standardising_is_that_of_the_plain_advantages(part: Any) -> None:
    batch = batch_of(tensors())
    plain = part(batch)
    values = plain[MASK].numpy()
    wanted = (values - values.mean()) / (values.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(replace(part, standardise=True)(batch)[MASK].numpy(), wanted, rtol=1e-10)


def test_standardised_by_hand() -> None:
    tiny = torch.tensor([[1e-8, 3e-8]], dtype=torch.float64)  # deviation sqrt(2) 1e-8, to which 1e-8 is added
    both = Batch.of(mask=torch.ones(1, 2))
    np.testing.assert_allclose(standardised(tiny, both).numpy(), [[-1 / (2**0.5 + 1), 1 / (2**0.5 + 1)]], rtol=1e-9)
    np.testing.assert_allclose(standardised(tiny, both, eps=2e-8).numpy(), [[-1 / (2**0.5 + 2), 1 / (2**0.5 + 2)]], rtol=1e-9)
    pair = Batch.of(mask=torch.tensor([[1, 1, 0]]))
    assert standardised(torch.tensor([[2.0, 2.0, 9.0]]), pair).tolist() == [[0.0, 0.0, 0.0]]
    one = Batch.of(mask=torch.tensor([[1, 0]]))
    assert standardised(torch.tensor([[5.0, 0.0]]), one)[0, 0] == 5.0  # one decision has no deviation, whatever the padding
    two_rows = Batch.of(mask=torch.tensor([[1, 0], [1, 0]]))
    assert np.allclose(standardised(torch.tensor([[1.0, 7.0], [3.0, 7.0]]), two_rows), [[-(0.5**0.5), 0.0], [0.5**0.5, 0.0]])


def test_sums_need_one_factor_for_each_decision() -> None:
    with pytest.raises(ValueError, match=r"x \(2, 3\) and carry \(2, 1\) differ"):
        discounted_sum(torch.ones(2, 3), torch.ones(2, 1))


def test_running_mean_counts_rows_with_a_decision() -> None:
    """Rows of nothing do not pull the mean down, and the first batch sets it whatever came before."""
    part = RunningMean(decay=0.5)
    batch = Batch.of(reward=torch.tensor([4.0, 8.0, 0.0]), mask=torch.tensor([[1, 1], [1, 0], [0, 0]]))
    first = part.observe("scored", batch=batch, memory=part.initial())
    assert (float(first["baseline"]), int(first["batches"])) == (6.0, 1)
    assert part(batch, first).tolist() == [[-2.0, -2.0], [2.0, 0.0], [0.0, 0.0]]
    empty = Batch.of(reward=torch.tensor([4.0]), mask=torch.zeros(1, 2))
    same = part.observe("scored", batch=empty, memory=first)
    assert (float(same["baseline"]), int(same["batches"])) == (6.0, 1)
    start = part.observe("scored", batch=empty, memory=part.initial())
    assert (float(start["baseline"]), int(start["batches"])) == (0.0, 0)


def test_a_batch_without_flags_ends_nowhere_else() -> None:
    """A collector may leave out either flag: what is there still ends the sum, what is not ends nothing."""
    flag = torch.tensor([[False, True, False]])
    batch = replace(line(), reward=torch.ones(1, 3, 1, dtype=torch.float64))
    values = batch.adding({"value_next@old": torch.full((1, 3), 10.0).double()})
    for terminated, truncated, wanted in (
        (None, None, [33.0, 22.0, 11.0]), (None, flag, [22.0, 11.0, 11.0]), (flag, None, [12.0, 1.0, 11.0]),
    ):  # fmt: skip
        ended = replace(values, terminated=terminated, truncated=truncated)
        assert GAE(1.0, 1.0)(ended)[0].tolist() == wanted


def test_rows_that_do_not_differ_have_no_advantage() -> None:
    """Alike within what divides, or within what is subtracted: exactly 0, also where the other one is of the batch."""
    batch = Batch.of(reward=torch.tensor([0.1, 0.1, 0.1, 0.0, 4.0]), group=[0, 0, 0, 1, 1], mask=torch.ones(5, 1))
    for part in (GroupBaseline("batch", "group"), GroupBaseline("group", "batch"), GroupBaseline("none", "group")):
        found = part(batch)[:, 0]
        assert found[:3].tolist() == [0.0] * 3
        assert bool((found[3:] != 0).any())


# -------------------------------------------------------------------- penalties and rewards
def test_the_adaptive_penalty_counts_valid_decisions() -> None:
    """Divergence is a mean over valid decisions; what stands elsewhere, be it NaN, does not count."""
    part = AdaptiveKL(target=0.01, beta0=4.0)
    old = torch.full((1, 4), -1.0, dtype=torch.float64)
    stepped = old + torch.tensor([[0.2, 0.0, math.nan, 9.0]])
    batch = Batch.of(logp_old=old, stats={"logp@stepped": stepped}, mask=torch.tensor([[1, 1, 0, 0]]))
    # d = (e^0.2 - 1 - 0.2) / 2 = 0.0107: between 0.01 / 1.5 and 0.015; the sum, 0.0214, would be above
    assert float(part.observe("stepped", batch=batch, memory=part.initial())["beta"]) == 4.0
    assert part.moments == {"stepped"}


def test_the_adaptive_penalty_at_its_bounds() -> None:
    """One decision counts; a divergence of exactly target / 1.5 or 1.5 target changes nothing."""
    old = torch.full((1, 2), -1.0, dtype=torch.float64)
    batch = Batch.of(logp_old=old, stats={"logp@stepped": old + math.log(2.0)}, mask=torch.tensor([[1, 0]]))
    d = float((batch.stats["logp@stepped"] - old)[0, 0])
    kl = float(torch.tensor(d, dtype=torch.float64).exp()) - 1 - d  # 1 - log 2
    assert (1.5 * kl) / 1.5 == kl
    assert 1.5 * (kl / 1.5) == kl
    for target, beta in ((1.5 * kl, 1.0), (1.51 * kl, 0.5), (kl / 1.5, 1.0), (kl / 1.51, 2.0)):
        assert float(AdaptiveKL(target, 1.0).observe("stepped", batch=batch, memory={"beta": torch.tensor(1.0)})["beta"]) == beta


def test_the_value_clip_on_both_sides() -> None:
    """The larger of both errors counts: of the value itself, and of the value kept within 1/2 of the old one."""
    stats = {"value@old": torch.tensor([[1.0, 1.0, 1.0]]), "return@old": torch.tensor([[-1.0, 3.0, 1.0]])}
    batch = Batch.of(value=torch.tensor([[0.0, 2.0, 1.25]]), stats=stats)
    x = {"value@now": batch.stats["value@now"], "advantage": torch.zeros(1, 3)}
    assert run(ValueLoss(1.0, clip=0.5), batch, x).tolist() == [[1.5**2, 1.5**2, 0.25**2]]


@pytest.mark.parametrize("form", ["token", "sequence"])
def test_only_the_first_channel_pays_for_the_divergence(form: Any) -> None:
    x = tensors()
    channels = torch.stack([x["reward"], 2 * x["reward"], 3 * x["reward"]], -1)
    batch = replace(batch_of(x), reward=channels)
    shaped = KLInReward(0.5, form)(batch)
    assert torch.equal(shaped[..., 1:], channels[..., 1:])
    gap = torch.where(MASK, x["logp@old"] - x["logp@ref"], 0.0)
    np.testing.assert_allclose((channels - shaped)[..., 0].sum(1).numpy(), 0.5 * gap.sum(1).numpy(), rtol=1e-10)
    with pytest.raises(MissingStatistic, match="reward="):
        KLInReward()(replace(batch, reward=None))


def test_overlong_at_the_limit_and_at_the_smallest_one() -> None:
    """|y| = L costs 1, as does more; L = 1 is a limit, L = 0 is none."""
    batch = Batch.of(reward=torch.zeros(3, dtype=torch.float64), mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]), horizon=2)
    assert SoftOverlong(cache=0.5)(batch)[..., 0].sum(1).tolist() == [-1.0, -1.0, 0.0]
    one = Batch.of(reward=torch.zeros(1), mask=torch.ones(1, 1), horizon=1)
    assert SoftOverlong(cache=0.5)(one).flatten().tolist() == [-1.0]
    assert SoftOverlong(cache=0.0)(one).flatten().tolist() == [0.0]
    three = replace(batch, reward=torch.ones(3, 3, 3, dtype=torch.float64))
    shaped = SoftOverlong(cache=0.5)(three)
    assert shaped.shape == (3, 3, 3)
    assert torch.equal(shaped[..., 1:], three.reward[..., 1:])  # type: ignore[index]


# -------------------------------------------------------------------- aggregates
def test_a_length_beats_the_horizon_and_totals_beat_the_batch() -> None:
    valid = torch.ones(2, 3).bool()
    loss = torch.ones(2, 3)

    def found(part: Part, horizon: int, whole: int) -> float:
        return float(
            call(part, loss=loss, batch=Batch.of(mask=valid, horizon=horizon), valid=valid, totals=Totals.of(valid, whole))
        )

    assert found(SeqMeanTokenSumNorm(length=4), 5, 6) == 0.75
    assert found(SeqMeanTokenSumNorm(), 5, 6) == 0.5
    assert math.isclose(found(SeqMeanTokenSumNorm(), 5, 0), 0.6, rel_tol=1e-6)
    assert found(SeqMeanTokenSumNorm(), 1, 0) == 3.0
    with pytest.raises(CallError, match=r"horizon = 0"):
        found(SeqMeanTokenSumNorm(), 0, 0)


@pytest.mark.parametrize("part", [TokenMean(), SeqMeanTokenMean(), SeqMeanTokenSum(), SeqMeanTokenSumNorm(length=1)])
def test_a_loss_of_nothing_is_zero_and_that_of_one_decision_its_own(part: Part) -> None:
    for valid, wanted in ((torch.zeros(2, 3).bool(), 0.0), (torch.tensor([[1, 0, 0], [0, 0, 0]]).bool(), 5.0)):
        loss = (5.0 * valid).requires_grad_()
        found = call(part, loss=loss, batch=Batch.of(mask=valid, horizon=4), valid=valid, totals=Totals.of(valid))
        found.backward()
        assert found.item() == wanted
        assert loss.grad is not None
        assert bool(loss.grad.isfinite().all())


# -------------------------------------------------------------------- which decisions are cut
def test_what_the_dual_clip_cuts() -> None:
    """Beyond the dual bound a negative advantage has no gradient; at zero advantage nothing is cut."""
    old = torch.zeros(1, 6, dtype=torch.float64)
    now = Now({"logp": torch.tensor([[0.5, 1.5, 2.5, 5.0, 5.0, 0.1]]).double().log()})
    batch = Batch.of(logp_old=old)
    advantage = torch.tensor([[-1.0, -1.0, -1.0, -1.0, 0.0, 0.0]]).double()
    assert Clip().cut(batch, now, advantage).tolist() == [[True, False, False, False, False, False]]
    assert Clip(dual=2.0).cut(batch, now, advantage).tolist() == [[True, False, True, True, False, False]]
    assert Clip(dual=2.0).cut(batch, now, -advantage).tolist() == [[False, True, True, True, False, False]]


@pytest.mark.parametrize("part", [Clip(0.0, 0.0), SequenceClip(0.0, 0.0)])
def test_a_ratio_at_the_bound_is_not_cut(part: Any) -> None:
    """Even between bounds of width 0 the ratio 1 has its whole gradient, -A."""
    old = torch.zeros(2, 1, dtype=torch.float64)
    logp = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[2.0], [-3.0]]).double()
    batch = Batch.of(logp_old=old)
    run(part, batch, {"logp@now": logp, "advantage": advantage}).sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [[-2.0], [3.0]]
    assert part.cut(batch, Now({"logp": logp.detach()}), advantage).tolist() == [[False], [False]]


def test_a_ratio_at_the_dual_bound_is_not_cut() -> None:
    """There both sides of the maximum are equal, and half of the gradient remains."""
    logp = torch.tensor([[2.0]], dtype=torch.float64).log().requires_grad_()
    assert logp.exp().item() == 2.0
    batch, down = Batch.of(logp_old=torch.zeros(1, 1, dtype=torch.float64)), torch.tensor([[-1.0]], dtype=torch.float64)
    run(Clip(dual=2.0), batch, {"logp@now": logp, "advantage": down}).sum().backward()
    assert logp.grad is not None
    assert logp.grad.item() == 1.0
    assert not bool(Clip(dual=2.0).cut(batch, Now({"logp": logp.detach()}), down).any())


def test_each_side_of_the_sequence_clip_has_its_own_bound() -> None:
    """3e-4 below and 4e-4 above: 1.00035 is inside, 0.99965 is not."""
    logp = torch.tensor([[1.00035], [1.00045], [0.99965], [0.99975]], dtype=torch.float64).log()
    batch, now = Batch.of(logp_old=torch.zeros(4, 1).double()), Now({"logp": logp})
    sign = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]).double()
    assert SequenceClip().cut(batch, now, sign).flatten().tolist() == [False, True, True, False]
    loss = run(SequenceClip(), batch, {"logp@now": logp, "advantage": sign}).flatten()
    np.testing.assert_allclose(loss.numpy(), [-1.00035, -1.0004, 0.9997, 0.99975], rtol=1e-12)
