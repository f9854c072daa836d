"""Parts in their variants, a batch with ends and masked decisions, and a call that notes which statistics a part reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.draws import Draws
from polopt.objective import Now
from polopt.part import Part, ask, call
from polopt.parts.advantage.beta_normalised import BetaNormalised
from polopt.parts.advantage.decoupled import Decoupled
from polopt.parts.advantage.gae import GAE, NStep
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.advantage.median import MedianBaseline
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.advantage.running_mean import RunningMean
from polopt.parts.critic import ValueLoss
from polopt.parts.penalty.adaptive_kl import AdaptiveKL
from polopt.parts.penalty.entropy import EntropyBonus
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.penalty.kl_cov import KLCov
from polopt.parts.penalty.low_probability import LowProbability
from polopt.parts.reward.conditioned import Conditioned
from polopt.parts.reward.kl import KLInReward
from polopt.parts.reward.overlong import SoftOverlong
from polopt.parts.select.truncated import DropTruncated
from polopt.parts.surrogate.balanced_clip import BalancedClip
from polopt.parts.surrogate.capped_weight import CappedWeight
from polopt.parts.surrogate.clip import Clip, SequenceClip
from polopt.parts.surrogate.score import Ratio, ScoreFunction
from polopt.parts.surrogate.soft_gate import SoftGate
from polopt.parts.weight.truncated_importance import TruncatedImportance

STATS = ("logp@now", "value@now", "entropy@now", "logp@old", "logp@ref", "logp@behaviour", "value@old", "value_next@old")
MORE = ("proxy_logp(0.02)@old", "proxy_logp(0.02)@now", "proxy_kl(0.02)@now")
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 1]]).bool()

ADVANTAGES: list[Part] = [
    GAE(0.9, 0.8), GAE(0.9, 0.8, standardise=True), NStep(0.9), NStep(0.9, standardise=True), MonteCarlo(0.9),
    MonteCarlo(0.9, "value"), MonteCarlo(0.9, "value", standardise=True), MonteCarlo(credit="whole"), RunningMean(),
    GroupBaseline(), GroupBaseline(scale="batch"), GroupBaseline("leave-one-out", "none"), GroupBaseline("batch", "batch"),
    GroupBaseline("batch", "group"), GroupBaseline("none", "none"), BetaNormalised(low=-50.0, high=50.0), Decoupled(),
    MedianBaseline(), MedianBaseline("mean", "std"),
]  # fmt: skip
OTHERS: list[Part] = [
    KLInReward(), KLInReward(form="sequence"), SoftOverlong(), TruncatedImportance(), ScoreFunction(), Ratio(), Clip(),
    Clip(dual=2.0), SequenceClip(), CappedWeight(), EntropyBonus(), KLToReference(), AdaptiveKL(), ValueLoss(), ValueLoss(clip=0.2),
    DropTruncated(), SoftGate(), KLCov(share=0.3), Conditioned(), BalancedClip(),
    LowProbability(rho=1.0), LowProbability(rho=1.0, form="paper"),
]  # fmt: skip
EVERY = [*ADVANTAGES, *OTHERS]
IDS = [p.describe() for p in EVERY]


def tensors(shape: tuple[int, ...] = (3, 4), seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, generator=g, dtype=torch.float64) for name in (*STATS, "return@old", "advantage", "reward", *MORE)
    }


def batch_of(x: Mapping[str, Tensor], mask: Tensor = MASK, **more: Any) -> Batch:
    ends = torch.zeros(*mask.shape).bool()
    ends[0, 2] = True
    stats = {k: v for k, v in x.items() if "@" in k}
    batch = Batch.of(
        reward=x["reward"], mask=mask, terminated=ends, truncated=torch.zeros_like(ends), stats=stats, group=[0, 0, 1],
        row={"truncated": torch.tensor([0.0, 1.0, 0.0])}, horizon=4,
    )  # fmt: skip
    return replace(batch, **more)


class Noted(Now):
    """Statistics that note which of them are read."""

    def __init__(self, table: Mapping[str, Tensor], read: set[str], view: str = "") -> None:
        super().__init__(table)
        self.read, self.view = read, view

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name + self.view)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name + self.view)
        return super().get(name, default)


def run(part: Part, batch: Batch, x: Mapping[str, Tensor], read: set[str] | None = None) -> Tensor:
    """Call a part as `objective` does."""
    now = Noted(
        {k.removesuffix("@now"): v for k, v in x.items() if k.endswith("@now")}, read if read is not None else set(), "@now"
    )
    given: dict[str, Any] = {"now": now, "advantage": x["advantage"], "memory": part.initial(), "valid": batch.mask}
    if part.surveys:
        rng = Draws(torch.Generator().manual_seed(0))
        found = ask(part.survey, batch=batch, **given, rng=rng, surrogate=Clip())  # type: ignore[attr-defined]
        batch = replace(batch, stats=Noted({**batch.stats, **found}, set() if read is None else read))
    found = call(part, batch=batch, **given)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out
