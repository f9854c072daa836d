"""Parts that pick a few decisions of a minibatch (Clip-Cov, KL-Cov, Lp-Reg): who is among them, and what then happens to them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.draws import Draws
from polopt.errors import CallError
from polopt.part import Can
from polopt.parts.covariance import centred_product, first, floor_of, share_of
from polopt.parts.penalty.kl_cov import ROUNDING, KLCov
from polopt.parts.penalty.low_probability import LowProbability
from polopt.parts.surrogate.clip import Clip
from polopt.parts.weight.clip_cov import ClipCov
from polopt.registry import get_method
from polopt.stats import FILTERED

F64 = torch.float64


def tensor(*x: float) -> Tensor:
    return torch.tensor([x], dtype=F64)


def flags(*x: int) -> Tensor:
    return torch.tensor([x]).bool()


def at(logp: Tensor, mask: Tensor | None = None, **stats: Tensor) -> Batch:
    """Decisions at the old policy, unless `old` is given."""
    old = stats.pop("old", logp)
    return Batch.of(logp=logp, logp_old=old, mask=mask, stats={f"{k}@minibatch": v for k, v in stats.items()})


# -------------------------------------------------------------------- who is among them
def test_covariances_do_not_see_the_padding() -> None:
    """log pi = -1, -3 and A = 2, -2 as without the rest: C = 2, 2."""
    for dirt in (100.0, math.nan, math.inf):
        found = centred_product(tensor(dirt, -1, -3, dirt), tensor(dirt, 2, -2, dirt), flags(0, 1, 1, 0))
        assert found.tolist() == [[0, 2, 2, 0]]
    assert centred_product(tensor(0, -1, -3, 0), tensor(9, 3, -1, 9), flags(0, 1, 1, 0)).tolist() == [[0, 2, 2, 0]]  # means -2, 1
    assert centred_product(tensor(1, 2), tensor(1, 2), flags(0, 0)).tolist() == [[0, 0]]
    assert centred_product(tensor(1, 2), tensor(1, 2), flags(0, 1)).tolist() == [[0, 0]]  # one decision is its own mean
    half = torch.tensor([[-1.0, -3.0]], dtype=torch.bfloat16)
    assert centred_product(half, half, flags(1, 1)).dtype == torch.float32


@pytest.mark.parametrize(
    ("n", "share", "whole"), [(150, 0.42, 63), (100, 0.53, 53), (900, 0.13, 117), (10, 0.7, 7), (100, 0.29, 29), (22, 13 / 22, 13)]
)
def test_a_share_that_is_a_whole_number_is_that_number(n: int, share: float, whole: int) -> None:
    """In float32 150 x 0.42 is 62.999996, in float64 100 x 0.29 is 28.999999999999996."""
    valid = torch.ones(1, n + 5).bool()
    valid[0, :5] = False
    assert float(floor_of(valid, share)) == float(share_of(valid, share)) == whole
    assert float(share_of(valid, share * (1 - 1e-6))) == whole - 1
    assert float(floor_of(valid, 0.9 / n)) == 0.0
    assert float(share_of(valid, 0.9 / n)) == 1.0
    assert float(share_of(valid, 0.0)) == 0.0


def test_of_equals_the_earlier_are_first() -> None:
    for n in (3, 40, 5000):
        found = first(torch.zeros(2, n), torch.ones(2, n).bool(), torch.tensor(n + 1.0))
        assert found[0].all()
        assert found[1].nonzero().flatten().tolist() == [0]


# -------------------------------------------------------------------- KL-Cov
def test_the_settings_of_kl_cov_and_what_it_declares() -> None:
    assert ROUNDING == 1e-5
    assert (KLCov().coef, KLCov().share) == (1.0, 2e-3)
    assert KLCov().needs == {"logp@now", "logp@old"}
    assert KLCov().requires == {Can.SCORE}


def test_kl_cov_holds_the_highest_covariances() -> None:
    """C = 2, 0.5, 0.5, 2 (rows of mean -2.5 and 0), and of two: the earlier."""
    logp, a = tensor(-1, -2, -3, -4), tensor(4 / 3, 1, -1, -4 / 3)
    batch = at(logp)
    for share, held in ((0.25, [1, 0, 0, 0]), (0.5, [1, 0, 0, 1]), (0.75, [1, 1, 0, 1]), (1.0, [1] * 4), (0.0, [0] * 4)):
        told = KLCov(share=share).survey(batch, {"logp": logp}, a, batch.mask)["held@minibatch"]
        assert told.tolist() == [held]
        assert told.dtype == F64


def test_kl_cov_holds_no_padding() -> None:
    """C = -1 at both decisions: the padding's 0 would be more. Four valid ones of eight and a share of 1/4: one."""
    logp, a = tensor(0, 0, -1, -3, 0), tensor(0, 0, -1, 1, 0)
    valid = flags(0, 0, 1, 1, 0)
    for share, held in ((0.5, [0, 0, 1, 0, 0]), (1.0, [0, 0, 1, 1, 0])):
        assert KLCov(share=share).survey(at(logp), {"logp": logp}, a, valid)["held@minibatch"].tolist() == [held]
    logp, a = tensor(-1, -2, -3, -4, 0, 0, 0, 0), tensor(4 / 3, 1, -1, -4 / 3, 0, 0, 0, 0)
    told = KLCov(share=0.25).survey(at(logp), {"logp": logp}, a, flags(1, 1, 1, 1, 0, 0, 0, 0))
    assert told["held@minibatch"].tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]


def test_kl_cov_in_numbers() -> None:
    """coef |d| where held, but for rounding: differences of up to 1e-5 are none, as are those of free decisions."""
    d = tensor(0.5, -0.5, 0.5, 1e-5, 1.2e-5, -1.2e-5, 0.8e-5).requires_grad_()
    batch = at(d, old=torch.zeros_like(d), held=tensor(1, 1, 0, 1, 1, 1, 1))
    loss = KLCov(coef=3.0)(batch, {"logp": d})
    assert loss.tolist()[0] == pytest.approx([1.5, 1.5, 0, 0, 3.6e-5, 3.6e-5, 0], abs=1e-15)
    (slope,) = torch.autograd.grad(loss.sum(), d)
    assert slope.tolist() == [[3, -3, 0, 0, 3, -3, 0]]


# -------------------------------------------------------------------- Clip-Cov
def dropped(part: ClipCov, logp: Tensor, a: Tensor, valid: Tensor | None = None, seed: int = 0, **more: Any) -> list[int]:
    batch = at(logp, **({"old": more.pop("old")} if "old" in more else {}))
    rng = Draws(torch.Generator().manual_seed(seed))
    told = part.survey(batch, {"logp": logp}, a, batch.mask if valid is None else valid, rng, **more)["dropped@minibatch"]
    assert told.dtype == F64
    return [int(x) for x in told[0]]


def test_the_settings_of_clip_cov_and_what_it_declares() -> None:
    part = ClipCov()
    assert (part.share, part.lower, part.upper) == (2e-4, 1.0, 5.0)
    assert part.needs == {"logp@now"}
    assert part.requires == {Can.SCORE}
    same = ClipCov(lower=2.0, upper=2.0)
    assert get_method("clip-cov").but("x", weight=same).weight in (same, (same,))
    with pytest.raises(CallError, match=r"lower = 2\.5 exceeds upper = 2"):
        get_method("clip-cov").but("x", weight=ClipCov(lower=2.5, upper=2.0))


@pytest.mark.parametrize(("size", "candidates"), [(0.9, 0), (1.0, 0), (1.1, 2), (4.9, 2), (5.0, 0), (5.1, 0), (-3.0, 0)])
def test_the_bounds_of_the_covariance_are_outside(size: float, candidates: int) -> None:
    """log pi = 0, -2 and A = C, -C have covariances C, C."""
    assert sum(dropped(ClipCov(share=1.0), tensor(0, -2), tensor(size, -size))) == candidates


def test_what_is_clipped_is_no_candidate() -> None:
    """Ratios e^0.5 at A > 0 and 1 at A < 0: the first is clipped already."""
    logp, a = tensor(0, -2), tensor(2, -2)
    old = logp - tensor(0.5, 0)
    assert dropped(ClipCov(share=1.0), logp, a, old=old, surrogate=Clip(0.2, 0.2)) == [0, 1]
    assert dropped(ClipCov(share=1.0), logp, a, old=old) == [1, 1]
    low = ClipCov(share=1.0, lower=2.5)  # C = 2: nothing is a candidate, clipped or not
    assert dropped(low, logp, a, old=old, surrogate=Clip(0.2, 0.2)) == [0, 0]


def test_padding_is_no_candidate_where_zero_is_within_the_bounds() -> None:
    """Its covariance is 0, as that of the decision at the means is."""
    around = ClipCov(share=1.0, lower=-1.0, upper=1.0)
    assert dropped(around, tensor(0, -1, -1, -2), tensor(2, 9, 0, -2), flags(1, 0, 1, 1)) == [0, 0, 1, 0]


def test_padding_is_no_candidate_and_takes_no_number() -> None:
    """Four decisions have C = 2; with share 1/4 one of them leaves: the same one wherever the padding is."""
    logp, a = tensor(0, -2, 0, -2), tensor(2, -2, 2, -2)
    wide, wider = tensor(9, 0, 9, -2, 0, 9, -2), tensor(9, 2, 9, -2, 2, 9, -2)
    valid = flags(0, 1, 0, 1, 1, 0, 1)
    seen = set()
    for seed in range(12):
        plain = dropped(ClipCov(share=0.25), logp, a, seed=seed)
        padded = dropped(ClipCov(share=0.25), wide, wider, valid, seed)
        assert sum(plain) == sum(padded) == 1
        assert [padded[i] for i in (1, 3, 4, 6)] == plain
        seen.add(tuple(plain))
        assert sum(dropped(ClipCov(share=0.5), wide, wider, valid, seed)) == 2  # of four, not of seven
    assert len(seen) == 4


def test_weights_are_zero_or_one() -> None:
    assert ClipCov()(at(tensor(-1, -1, -1), dropped=tensor(0, 1, 0))).tolist() == [[1, 0, 1]]


# -------------------------------------------------------------------- Lp-Reg
def spared(part: LowProbability, logp: Tensor, target: Tensor, a: Tensor, valid: Tensor | None = None) -> list[int]:
    name = f"proxy_logp({part.kappa!r})"
    batch = at(logp)
    now = {"logp": logp}
    if part.form == "code":
        batch = batch.adding({f"{name}@old": target})
    else:
        now[name] = target
    told = part.survey(batch, now, a, batch.mask if valid is None else valid)["spared@minibatch"]
    assert told.dtype == F64
    return [int(x) for x in told[0]]


def test_the_settings_of_lp_reg_and_what_it_declares() -> None:
    part = LowProbability()
    assert (part.coef, part.rho, part.kappa, part.form) == (1.0, 0.01, 0.02, "code")
    assert part.needs == {"logp@now", "proxy_logp(0.02)@old"}
    assert part.but(form="paper").needs == {"logp@now", "proxy_logp(0.02)@now", "proxy_kl(0.02)@now"}
    assert part.requires == {Can.SCORE, Can.ENUMERATE}
    assert part.surveys == ("spared@minibatch",)


@pytest.mark.parametrize(
    ("terms", "surrogate", "refused"), [(("penalty", "surrogate"), 1, False), (("penalty",), 1, True), (("surrogate",), None, True)]
)
def test_lp_reg_needs_a_surrogate_that_is_trained_on(terms: tuple[str, ...], surrogate: Any, refused: bool) -> None:
    method: Any = SimpleNamespace(slots=lambda _: SimpleNamespace(surrogate=surrogate))
    update: Any = SimpleNamespace(terms=terms)
    assert (LowProbability().validate(method, update) is not None) is refused


def test_lp_reg_spares_the_rarest_punished_decisions() -> None:
    """Six with A < 0 (others: A = 0, A > 0), by rarity -6 ... -1; all are raised by the proxy."""
    logp = tensor(-9, -8, -3, -6, -1, -5, -2, -4)
    a = tensor(0, 1, -1, -1, -1, -1, -1, -1)
    for rho, k in ((0.0, 0), (1 / 6, 0), (0.33, 0), (2 / 6, 2), (0.5, 3), (0.84, 5), (1.0, 6)):
        found = spared(LowProbability(rho=rho), logp, logp + 0.1, a)
        assert sorted(float(x) for x in logp[0][torch.tensor(found).bool()]) == [-6, -5, -4, -3, -2, -1][:k]


def test_lp_reg_counts_valid_decisions_alone() -> None:
    logp, a = tensor(-9, -3, -6, -9, -1, -5), -torch.ones(1, 6, dtype=F64)
    assert spared(LowProbability(rho=0.5), logp, logp + 0.1, a, flags(0, 1, 1, 0, 1, 1)) == [0, 0, 1, 0, 0, 1]


def test_lp_reg_spares_what_the_proxy_raises() -> None:
    """The code: where it is likelier now than in the proxy it is not; on paper every action that the proxy keeps is."""
    logp, a = tensor(-3, -3, -3, -3), -torch.ones(1, 4, dtype=F64)
    target = tensor(-2.9, -3, -3.1, FILTERED)
    assert spared(LowProbability(rho=1.0), logp, target, a) == [1, 0, 0, 0]
    assert spared(LowProbability(rho=1.0, form="paper"), logp, target, a) == [1, 1, 1, 0]
    half = target.bfloat16()  # which rounds the mark of what the proxy drops
    assert float(half[0, 3]) > FILTERED
    assert spared(LowProbability(rho=1.0, form="paper"), logp, half, a) == [1, 1, 1, 0]


def test_the_code_s_divergence_in_numbers() -> None:
    """coef (e^d - d - 1), d at most 20; the proxy has no gradient."""
    d = tensor(0.5, -0.5, 0.5, 25, -25)
    target = tensor(-2, -2, -2, -2, -2).requires_grad_()
    logp = (target.detach() - d).requires_grad_()
    batch = at(logp, spared=tensor(1, 1, 0, 1, 1)).adding({"proxy_logp(0.02)@old": target})
    loss, told = LowProbability(coef=2.0)(batch, {"logp": logp})
    wanted = [2 * (math.exp(x) - x - 1) for x in (0.5, -0.5, 0.0, 20, -20)]
    assert loss.tolist()[0] == pytest.approx(wanted, rel=1e-12)
    assert int(told["spared"]) == 4
    slope, none = torch.autograd.grad(loss.sum(), (logp, target), allow_unused=True)
    assert slope.tolist()[0] == pytest.approx([2 * (1 - math.exp(0.5)), 2 * (1 - math.exp(-0.5)), 0, 0, 0], rel=1e-12)
    assert none is None


def test_the_paper_s_divergence_is_taken_where_spared() -> None:
    kl = tensor(0.3, math.nan, 0.5).requires_grad_()
    loss, told = LowProbability(coef=2.0, form="paper")(at(tensor(-1, -1, -1), spared=tensor(1, 0, 1)), {"proxy_kl(0.02)": kl})
    assert loss.tolist() == [[0.6, 0, 1.0]]
    assert int(told["spared"]) == 2
    assert torch.autograd.grad(loss.sum(), kl)[0].tolist() == [[2, 0, 2]]


# -------------------------------------------------------------------- shapes
def test_other_shapes_are_refused_by_name() -> None:
    logp, wrong, rng = tensor(-1, -2, -3), torch.ones(3, 1, dtype=F64), Draws(torch.Generator())
    proxy, kl = "proxy_logp(0.02)", "proxy_kl(0.02)"
    mask = at(logp).mask
    a = torch.ones(1, 3)
    known = at(logp).adding({f"{proxy}@old": logp})
    marked = at(logp, spared=torch.ones(1, 3))
    paper = LowProbability(form="paper")
    calls: list[tuple[str, Any]] = [
        ("advantage", lambda: KLCov().survey(at(logp), {"logp": logp}, wrong, mask)),
        ("logp@now", lambda: KLCov().survey(at(logp), {"logp": wrong}, a, mask)),
        ("advantage", lambda: ClipCov().survey(at(logp), {"logp": logp}, wrong, mask, rng)),
        ("logp@now", lambda: ClipCov().survey(at(logp), {"logp": wrong}, a, mask, rng)),
        ("advantage", lambda: LowProbability().survey(known, {"logp": logp}, wrong, mask)),
        ("logp@now", lambda: LowProbability().survey(known, {"logp": wrong}, a, mask)),
        (f"{proxy}@old", lambda: LowProbability().survey(at(logp).adding({f"{proxy}@old": wrong}), {"logp": logp}, a, mask)),
        (f"{proxy}@now", lambda: paper.survey(known, {"logp": logp, proxy: wrong}, a, mask)),
        (f"{kl}@now", lambda: paper(marked, {kl: wrong})),
    ]
    for name, call in calls:
        with pytest.raises(CallError) as refused:
            call()
        assert f"'{name}' has shape (3, 1), expected (1, 3)" in str(refused.value)
