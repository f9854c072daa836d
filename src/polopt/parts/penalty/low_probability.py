"""Lp-Reg: rare decisions that are about to be punished away are pulled towards a filtered version of the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.part import Can, Part, Range, register_part
from polopt.parts.covariance import first, floor_of
from polopt.parts.shapes import MAX_LOG_RATIO, assert_decisions, keep
from polopt.pooling import not_half
from polopt.stats import FILTERED

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("penalty", "low-probability")
@dataclass(frozen=True)
class LowProbability(Part):
    """coef times a divergence from the proxy q, at rare decisions with negative advantage (Lp-Reg, arXiv 2510.03222).

    q keeps the actions of at least `kappa` times the largest probability, renormalised, so it raises what it keeps; it has no
    gradient. Of the n decisions of the minibatch with A_t < 0 the floor(rho n) least likely are candidates (none if that is 1 or
    less); of these the ones that q keeps are spared.

    form "code" (the released code): q of the policy at the start of the update; spared if d = log q(a_t) - log pi(a_t) > 0, with
    e^d - d - 1. form "paper": q of the present policy, KL(q || pi) over all actions; its gradient in the logits is pi - q.
    """

    coef: Annotated[float, Range(ge=0), "weight of the divergence"] = 1.0
    rho: Annotated[float, Range(ge=0, le=1), "share of the decisions with negative advantage that is looked at, the rarest"] = 0.01
    kappa: Annotated[float, Range(ge=0, le=1), "actions below this share of the largest probability are noise"] = 0.02
    form: Annotated[Literal["code", "paper"], "the drawn action alone, or the whole distribution"] = "code"
    equation: ClassVar[str] = (
        "l_t = beta (e^d - d - 1),  d = log q(a_t) - log pi(a_t) > 0,  A_t < 0, pi(a_t) among the rho n lowest"
    )
    surveys: ClassVar[tuple[str, ...]] = ("spared@minibatch",)
    conditions: ClassVar[tuple[str, ...]] = ("long-rows",)  # of random batches: in small ones rho n is less than one decision

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities now, and what the form takes from the filtered distribution."""
        names = [f"proxy_logp({self.kappa!r})@{'old' if self.form == 'code' else 'now'}"]
        if self.form == "paper":
            names.append(f"proxy_kl({self.kappa!r})@now")
        return frozenset({"logp@now", *names})

    @property
    def requires(self) -> frozenset[Can]:
        """Probabilities of all actions: the filter compares them with the largest."""
        return frozenset({Can.SCORE, Can.ENUMERATE})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse updates without an advantage, whose sign says what is punished."""
        if "surrogate" not in update.terms or method.slots(update).surrogate is None:
            return "needs a surrogate beside it: its advantages say which decisions are punished"
        return None

    def survey(self, batch: Batch, now: Mapping[str, Tensor], advantage: Float[Tensor, "B T"], valid: Tensor) -> dict[str, Tensor]:
        """The decisions that are spared, 1 or 0."""
        logp, target = not_half(now["logp"]), not_half(self._target(batch, now))
        assert_decisions(batch, advantage=advantage, **{"logp@now": logp})
        punished = valid & (advantage < 0)
        count = floor_of(punished, self.rho)
        rare = first(logp, punished, torch.where(count > 1, count, torch.zeros_like(count)))
        kept = logp < target if self.form == "code" else target > FILTERED / 2
        return {"spared@minibatch": (rare & kept).to(logp)}

    def __call__(self, batch: Batch, now: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
        """The penalty of each decision, and how many are spared."""
        spared = batch.stat("spared@minibatch") > 0
        if self.form == "paper":
            name = f"proxy_kl({self.kappa!r})"
            assert_decisions(batch, **{f"{name}@now": now[name]})
            gap = keep(spared, not_half(now[name]))
        else:
            d = keep(spared, not_half(self._target(batch, now)) - not_half(now["logp"])).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            gap = d.exp() - d - 1
        return self.coef * gap, {"spared": spared.sum()}

    def _target(self, batch: Batch, now: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        """log q of the drawn actions, `FILTERED` where q drops them."""
        name, view = f"proxy_logp({self.kappa!r})", "now" if self.form == "paper" else "old"
        found = now[name] if view == "now" else batch.stat(f"{name}@old")
        assert_decisions(batch, **{f"{name}@{view}": found})
        return found.detach()
