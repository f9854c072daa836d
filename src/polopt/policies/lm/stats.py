"""Statistics of tokens from hidden states, in chunks: [B,T,V] never exists, with or without gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polopt.errors import unknown
from polopt.stats import StatFn, find_stat, stat_names

#: Logits held at once (elements): 32 MB in float32. Larger vocabularies are computed in chunks, again in the backward pass.
CHUNK = 1 << 23

Head = Callable[[Tensor], Tensor]


def chunked(
    hidden: Float[Tensor, "N H"],
    action: Int[Tensor, " N"],
    temperature: float | Float[Tensor, " N"],
    head: Head,
    vocabulary: int,
    names: frozenset[str],
    chunk: int = CHUNK,
) -> dict[str, Tensor]:
    """Statistics `names` (of `polopt.stats.STATS`) of `action` under softmax(head(hidden) / temperature), each [N] or [N,m]."""
    order = sorted(names)
    functions: dict[str, StatFn] = {}
    for name in order:
        fn = find_stat(name)
        if fn is None:
            raise unknown("statistic of a language model", name, stat_names())
        functions[name] = fn

    def some(h: Tensor, a: Tensor, t: Tensor | float) -> tuple[Tensor, ...]:
        logits = head(h).float()
        if isinstance(t, Tensor):
            logits = logits / t[:, None]
        elif t != 1:
            logits = logits / t
        return _together(logits, a, functions)

    rows = max(1, chunk // vocabulary)
    n = hidden.shape[0]
    if n <= rows:
        return dict(zip(order, some(hidden, action, temperature), strict=True))
    parts = []
    for i in range(0, n, rows):
        here = slice(i, i + rows)
        t = temperature[here] if isinstance(temperature, Tensor) else temperature
        if torch.is_grad_enabled():
            parts.append(checkpoint(some, hidden[here], action[here], t, use_reentrant=False))
        else:
            parts.append(some(hidden[here], action[here], t))
    return {name: torch.cat([p[k] for p in parts]) for k, name in enumerate(order)}


def _together(logits: Tensor, action: Tensor, functions: Mapping[str, StatFn]) -> tuple[Tensor, ...]:
    """Each statistic; log-probability and entropy share one pass over the logits when both are wanted."""
    if "logp" in functions and "entropy" in functions:
        logq = logits - logits.logsumexp(-1, keepdim=True)
        spread = -(logq.exp() * logq.clamp(min=torch.finfo(logq.dtype).min)).sum(-1)
        both = {"logp": logq.gather(-1, action[:, None]).squeeze(-1), "entropy": spread}
        return tuple(both[name] if name in both else fn(logits, action) for name, fn in functions.items())
    return tuple(fn(logits, action) for fn in functions.values())
