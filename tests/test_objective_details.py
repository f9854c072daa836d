"""Details of the loss that are easily wrong: rows that select drops, weights, the sum of terms, diagnostics as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.batch import Batch, Totals
from polopt.part import Part, make_part
from polopt.parts.penalty.entropy import EntropyBonus
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.select.truncated import DropTruncated
from polopt.parts.surrogate.clip import Clip
from polopt.registry import get_method

torch.set_num_threads(1)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
CUT = torch.tensor([0.0, 1.0, 0.0, 0.0])  # the second row leaves the loss
KEPT = [0, 2, 3]
NAMES = ("logp", "logp_old", "logp_ref", "logp_behaviour", "entropy")


def tensors(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: 0.3 * torch.randn(4, 3, generator=g, dtype=torch.float64) - 1 for k in NAMES}


def batch_of(x: Mapping[str, Tensor], rows: list[int] | None = None) -> Batch:
    rows = [0, 1, 2, 3] if rows is None else rows
    return Batch.of(**{k: v[rows] for k, v in x.items()}, mask=MASK[rows], row={"truncated": CUT[rows]}, horizon=3)  # type: ignore[arg-type]


METHOD = get_method("grpo").but("x", select=(DropTruncated(),), penalty=(KLToReference(0.5), EntropyBonus(0.1)))
ADVANTAGE = torch.tensor([[1.0, 2.0, -1.0], [3.0, -2.0, 0.0], [-1.0, 0.5, 2.0], [1.5, 0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("aggregate", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_dropped_rows_leave_the_loss_as_if_they_were_not_there(aggregate: str) -> None:
    """Neither in the numerator, penalties included, nor in the denominators; whatever their advantage is, they have no gradient."""
    x = {k: v.requires_grad_(k in ("logp", "entropy")) for k, v in tensors().items()}
    method = METHOD.but("y", aggregate=make_part("aggregate", aggregate))
    wanted, _ = method.loss(batch_of(x, KEPT), advantage=ADVANTAGE[KEPT])
    for odd in (3.0, math.nan, math.inf):
        found, _ = method.loss(batch_of(x), advantage=torch.where(CUT[:, None] > 0, odd, ADVANTAGE))
        assert math.isclose(found.item(), wanted.item(), rel_tol=1e-12)
        for a, b in zip(
            *(torch.autograd.grad(y, [x["logp"], x["entropy"]], retain_graph=True) for y in (found, wanted)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
            assert a[1].tolist() == [0.0] * 3


def test_terms_add_up() -> None:
    """The loss is the sum of its terms, and each term that of a method that has it alone."""
    batch = batch_of(tensors())
    loss, info = METHOD.loss(batch, advantage=ADVANTAGE)
    terms = {k: float(v) for k, v in info.items() if k.startswith("loss/")}
    assert set(terms) == {"loss/surrogate", "loss/kl-ref", "loss/entropy"}
    assert math.isclose(sum(terms.values()), loss.item(), rel_tol=1e-12)
    alone, _ = METHOD.but("y", penalty=()).loss(batch, advantage=ADVANTAGE)
    assert math.isclose(alone.item(), terms["loss/surrogate"], rel_tol=1e-12)


@dataclass(frozen=True)
class Probability(Part):
    """A weight that would carry gradient: the probability of the decision now."""

    kind: ClassVar[str] = "weight"
    name: ClassVar[str] = "probability"

    def __call__(self, now: Mapping[str, Tensor]) -> Tensor:
        return now["logp"].exp()


@dataclass(frozen=True)
class Again(Probability):
    """The same under another name."""

    name: ClassVar[str] = "again"


def test_weights_multiply_the_surrogate_without_gradient() -> None:
    """l = -w A log pi with w = pi: the slope in log pi is -w A, not -(w A + w A log pi)."""
    x = tensors()
    x["logp"].requires_grad_()
    method = get_method("reinforce").but(
        "x", weight=(Probability(), Again()), aggregate=make_part("aggregate", "token-mean"), penalty=()
    )
    loss, _ = method.but("y", weight=(Probability(),)).loss(batch_of(x), advantage=ADVANTAGE)
    (slope,) = torch.autograd.grad(loss, x["logp"])
    weight = x["logp"].detach().exp()
    torch.testing.assert_close(slope, torch.where(MASK, -weight * ADVANTAGE, 0.0) / MASK.sum(), rtol=1e-12, atol=1e-15)
    twice, _ = method.loss(batch_of(x), advantage=ADVANTAGE)
    wanted = torch.where(MASK, -(weight**2) * ADVANTAGE * x["logp"].detach(), 0.0).sum() / MASK.sum()
    assert math.isclose(twice.item(), wanted.item(), rel_tol=1e-12)


@dataclass(frozen=True)
class Regret(Part):
    """A penalty that reads the reward: its distance to the value now."""

    kind: ClassVar[str] = "penalty"
    name: ClassVar[str] = "regret"

    def __call__(self, batch: Batch, now: Mapping[str, Tensor]) -> Tensor:
        return (now["value"] - batch.scalar_reward()).square()


def test_rewards_carry_no_gradient() -> None:
    """Not even one that was computed from the policy with gradient, where a part on the loss path reads it."""
    value = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    batch = Batch.of(value=value, logp=torch.zeros(4, 3).double(), reward=3 * value, mask=MASK)
    method = get_method("reinforce").but("x", penalty=(Regret(),), aggregate=make_part("aggregate", "token-mean"))
    loss, _ = method.loss(batch, advantage=ADVANTAGE)
    (slope,) = torch.autograd.grad(loss, value)
    torch.testing.assert_close(slope, torch.where(MASK, 2.0 * (1 - 3), 0.0).double() / MASK.sum())


def test_diagnostics_are_means_over_valid_decisions() -> None:
    """Each against its formula; dropped rows and what is outside the mask do not count."""
    x = tensors(1)
    method = METHOD.but("y", surrogate=Clip(0.1, 0.2))
    _, info = method.loss(batch_of({k: torch.where(MASK, v, math.nan) for k, v in x.items()}), advantage=ADVANTAGE)
    keep = (MASK & (CUT[:, None] == 0)).numpy()
    a = {k: v.numpy()[keep] for k, v in x.items()}
    adv = ADVANTAGE.numpy()[keep]
    ratio, d = np.exp(a["logp"] - a["logp_old"]), a["logp_ref"] - a["logp"]
    wanted = {
        "entropy": a["entropy"].mean(),
        "kl_old": (ratio - 1 - np.log(ratio)).mean(),
        "kl_ref": (np.exp(d) - 1 - d).mean(),
        "sampler_gap": np.abs(a["logp_old"] - a["logp_behaviour"]).mean(),
        "clip_pos": ((adv > 0) & (ratio > 1.2)).mean(),
        "clip_neg": ((adv < 0) & (ratio < 0.9)).mean(),
    }
    assert wanted["clip_pos"] > 0
    assert wanted["clip_neg"] > 0
    assert wanted["clip_pos"] != wanted["clip_neg"]
    for name, value in wanted.items():
        assert math.isclose(float(info[name]), value, rel_tol=1e-6), name


def test_diagnostics_of_micro_batches_add_up() -> None:
    x = tensors(1)
    totals = Totals.of(MASK & (CUT[:, None] == 0), 3)
    _, whole = METHOD.loss(batch_of(x), advantage=ADVANTAGE)
    parts = [METHOD.loss(batch_of(x, rows), advantage=ADVANTAGE[rows], totals=totals)[1] for rows in ([0, 1], [2], [3])]
    for name, value in whole.items():
        assert math.isclose(sum(float(p[name]) for p in parts), float(value), rel_tol=1e-6, abs_tol=1e-12), name


def test_totals_count_decisions_and_rows_that_have_one() -> None:
    """Four rows: three, two, no and one valid decisions."""
    totals = Totals.of(torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool(), 5)
    assert (float(totals.decisions), float(totals.rows), totals.horizon) == (6.0, 3.0, 5)
