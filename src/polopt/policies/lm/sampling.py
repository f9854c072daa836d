"""From logits to a token: temperature, top-k, nucleus and min-p truncation, and one inverse-CDF draw per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Truncations act in the order temperature, top-k, top-p, min-p (as in transformers)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    greedy: bool = False

    @property
    def truncates(self) -> bool:
        """Whether any token can be excluded."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def truncate(logits: Float[Tensor, "N V"], how: Sampling) -> Float[Tensor, "N V"]:
    """Logits with excluded tokens at -inf.

    top-k keeps the k largest (ties at the boundary stay); top-p the smallest set of most likely tokens whose probability
    reaches p, at least one; min-p those with at least that share of the largest probability (arXiv 2407.01082).
    """
    if 0 < how.top_k < logits.shape[-1]:
        bound = logits.topk(how.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < bound, float("-inf"))
    if how.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= how.top_p
        outside[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), float("-inf"))
    if how.min_p > 0:
        log_bound = logits.amax(-1, keepdim=True) + torch.tensor(how.min_p, device=logits.device).log()
        logits = logits.masked_fill(logits < log_bound, float("-inf"))
    return logits


def draw(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, "N V"], Float[Tensor, "N V"]]:
    """One token per row by inverting the cumulative distribution at `uniform` in [0,1); also log-probabilities and p.

    Draws depend on a row's own logits and uniform number alone, so they do not change with the rows beside it. A token of
    probability 0 is never drawn: the cumulative sum does not rise at it.
    """
    logq = logits - logits.logsumexp(-1, keepdim=True)
    p = logq.exp()
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    place = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = (cdf <= place).sum(-1)
    return token, logq, p


def choose(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, " N"], temperature: float | Float[Tensor, "N 1"], how: Sampling
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Tokens, their log-probability and the entropy (nats) of the distribution they were drawn from, after truncation."""
    if isinstance(temperature, Tensor) or temperature != 1:
        logits = logits / temperature
    if how.greedy:  # a point mass: log-probability and entropy are 0
        zero = logits.new_zeros(logits.shape[0])
        return logits.argmax(-1), zero, zero
    if how.truncates:
        logits = truncate(logits, how)
    token, logq, p = draw(logits, uniform)
    if how.truncates:
        logq = logq.masked_fill(p == 0, 0.0)
    return token, logq.gather(-1, token[:, None]).squeeze(-1), -(p * logq).sum(-1)
