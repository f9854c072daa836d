"""`Stat` and `View`: one number per decision, computed from logits, and the forward pass it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.errors import CallError

StatFn = Callable[[Tensor, Tensor], Tensor]  # (logits [N,V], action [N]) -> [N] or [N,m]


@dataclass(frozen=True)
class View:
    """Which forward pass: whose parameters, under which context.

    params: "now" (with gradient), "old" (the same parameters at the start of the update, without gradient) or "ref" (the
    frozen reference). context: "scored" (what the trained log-probability conditions on) or "sampled".
    """

    params: Literal["now", "old", "ref"] = "now"
    context: str = "scored"


NOW, OLD, REF = View("now"), View("old"), View("ref")
VIEWS = {"now": NOW, "old": OLD, "ref": REF}

#: Statistics that any policy with logits can compute; a paper may register further ones in its own file.
STATS: dict[str, StatFn] = {}


def stat(name: str) -> Callable[[StatFn], StatFn]:
    """Register a statistic of logits under `name`."""

    def add(fn: StatFn) -> StatFn:
        STATS[name] = fn
        return fn

    return add


@stat("logp")
def logp(logits: Float[Tensor, "N V"], action: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log-probability of the action."""
    return logits.gather(-1, action[:, None]).squeeze(-1) - logits.logsumexp(-1)


@stat("entropy")
def entropy(logits: Float[Tensor, "N V"], action: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Entropy of the distribution, in nats; logits of -inf count as impossible actions."""
    logq = logits.log_softmax(-1)
    return -(logq.exp() * torch.where(logq.isinf(), torch.zeros_like(logq), logq)).sum(-1)


def split(names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Group `name@view` needs by view: `{"now": {"logp", "entropy"}, "ref": {"logp"}}`."""
    out: dict[str, set[str]] = {}
    for full in names:
        name, sep, view = full.partition("@")
        if not sep:
            raise CallError(f"need '{full}' has no view; write name@now, name@old, name@ref or name@behaviour")
        out.setdefault(view, set()).add(name)
    return {view: frozenset(found) for view, found in out.items()}


#: What must be in the batch before a statistic of the present policy can be computed.
PREREQUISITES = {"kl@now": frozenset({"dist@old"})}


def with_prerequisites(names: Iterable[str]) -> frozenset[str]:
    """`names` and what they build on: the KL to the old policy needs the old distribution."""
    found = frozenset(names)
    return found.union(*(PREREQUISITES.get(n, frozenset()) for n in found))
