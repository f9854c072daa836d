"""Clip-Cov: a few decisions that would cost most entropy are taken out of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.draws import Draws
from polopt.errors import CallError
from polopt.part import Can, Part, Range, register_part
from polopt.parts.covariance import centred_product, first, share_of
from polopt.parts.shapes import assert_decisions

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("weight", "clip-cov")
@dataclass(frozen=True)
class ClipCov(Part):
    """Weight 0 for a random few of the decisions whose covariance is high (arXiv 2505.22617, eq. 11 and 12), 1 for all others.

    With C_t = (log pi_t - mean log pi)(A_t - mean A) over the minibatch, the candidates are decisions with lower < C_t < upper that
    the surrogate does not clip already; max(1, floor(share n)) of them are drawn uniformly, n the valid decisions, none with
    share = 0. They lose their gradient but stay in the denominators. How many that are depends on the minibatch: the paper's 2e-4
    is for a million decisions.
    """

    share: Annotated[float, Range(ge=0, le=1), "of all valid decisions that are dropped, if there are as many candidates"] = 2e-4
    lower: Annotated[float, Range(), "candidates have a higher covariance"] = 1.0
    upper: Annotated[float, Range(), "candidates have a lower covariance"] = 5.0
    equation: ClassVar[str] = "w_t = 0 for max(1, rho n) random t with lb < (log pi_t - mean log pi)(A_t - mean A) < ub, else 1"
    surveys: ClassVar[tuple[str, ...]] = ("dropped@minibatch",)

    @property
    def needs(self) -> frozenset[str]:
        """Log-probabilities now."""
        return frozenset({"logp@now"})

    @property
    def requires(self) -> frozenset[Can]:
        """Log-probabilities of given decisions."""
        return frozenset({Can.SCORE})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse bounds in the wrong order."""
        return f"lower = {self.lower:g} exceeds upper = {self.upper:g}" if self.lower > self.upper else None

    def survey(
        self,
        batch: Batch,
        now: Mapping[str, Tensor],
        advantage: Float[Tensor, "B T"],
        valid: Tensor,
        rng: Draws | None = None,
        surrogate: Part | None = None,
    ) -> dict[str, Tensor]:
        """The decisions that are dropped, 1 or 0. Raises `CallError` without random numbers."""
        if rng is None:
            raise CallError("weight 'clip-cov' draws at random: pass rng=, a torch.Generator")
        assert_decisions(batch, advantage=advantage, **{"logp@now": now["logp"]})
        cov = centred_product(now["logp"], advantage, valid)
        cut = getattr(surrogate, "cut", None)
        candidates = valid & (cov > self.lower) & (cov < self.upper)
        if cut is not None:
            candidates = candidates & ~cut(batch, now, advantage)
        # the k-th valid decision gets the k-th number, so that padding changes nothing
        order = (valid.flatten().cumsum(0) - 1).clamp(min=0)
        luck = rng.uniform(valid.numel())[order].view(valid.shape)
        return {"dropped@minibatch": first(luck, candidates, share_of(valid, self.share)).to(cov)}

    def __call__(self, batch: Batch) -> Float[Tensor, "B T"]:
        """The weight of each decision."""
        dropped = batch.stat("dropped@minibatch")
        return torch.ones_like(dropped) - dropped
