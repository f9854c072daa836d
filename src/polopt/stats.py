"""`Stat` and `View`: one number per decision, computed from logits, and the forward pass it comes from."""

from __future__ import annotations

import functools
import math
import re
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
#: Statistics with numbers: `proxy_logp(0.02)` asks for that of `FAMILIES["proxy_logp"](0.02)`.
FAMILIES: dict[str, Callable[..., StatFn]] = {}
_CALL = re.compile(r"(\w+)\(([^()]*)\)")


def stat(name: str) -> Callable[[StatFn], StatFn]:
    """Register a statistic of logits under `name`."""

    def add(fn: StatFn) -> StatFn:
        STATS[name] = fn
        return fn

    return add


def stat_family(name: str) -> Callable[[Callable[..., StatFn]], Callable[..., StatFn]]:
    """Register a family of statistics: `name(0.02)` is what the decorated function returns for 0.02."""

    def add(fn: Callable[..., StatFn]) -> Callable[..., StatFn]:
        FAMILIES[name] = functools.cache(fn)
        return fn

    return add


def find_stat(name: str) -> StatFn | None:
    """The statistic of logits called `name`, or None; those of families are named like a call with numbers."""
    found = _CALL.fullmatch(name)
    if found is None or found[1] not in FAMILIES:
        return STATS.get(name)
    try:
        numbers = [float(x) for x in found[2].split(",")]
    except ValueError:
        return None
    return FAMILIES[found[1]](*numbers)


def stat_names() -> list[str]:
    """All statistics of logits by name; families with a place for their numbers."""
    return [*STATS, *(f"{name}(...)" for name in FAMILIES)]


@stat("logp")
def logp(logits: Float[Tensor, "N V"], action: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log-probability of the action."""
    return logits.gather(-1, action[:, None]).squeeze(-1) - logits.logsumexp(-1)


@stat("entropy")
def entropy(logits: Float[Tensor, "N V"], action: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Entropy of the distribution, in nats; logits of -inf count as impossible actions."""
    logq = logits.log_softmax(-1)
    return -(logq.exp() * torch.where(logq.isinf(), torch.zeros_like(logq), logq)).sum(-1)


@stat("peak")
def peak(logits: Float[Tensor, "N V"], action: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log-probability of the most likely action."""
    return logits.amax(-1) - logits.logsumexp(-1)


@stat_family("logp_at")
def logp_at(temperature: float) -> StatFn:
    """Log-probability of the action under the distribution at another temperature, softmax(logits / temperature)."""
    return lambda logits, action: logp(logits / temperature, action)


#: Log-probability that stands for "this action was filtered out": far below any other, and finite.
FILTERED = -1e4


def filtered(logits: Float[Tensor, "N V"], share: float) -> Float[Tensor, "N V"]:
    """Logits that keep actions of at least `share` of the largest probability, the rest at -inf (min-p, arXiv 2407.01082).

    The largest is always kept.
    """
    bound = logits.amax(-1, keepdim=True) + (math.log(share) if share else -math.inf)
    return logits.masked_fill(logits < bound, -math.inf)


@stat_family("kept_mass")
def kept_mass(share: float) -> StatFn:
    """Probability of the actions that the min-p filter keeps."""

    def fn(logits: Float[Tensor, "N V"], action: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        kept = filtered(logits.detach(), share).isfinite()
        return logits.softmax(-1).masked_fill(~kept, 0.0).sum(-1)

    return fn


@stat_family("proxy_logp")
def proxy_logp(share: float) -> StatFn:
    """Log-probability of the action under what the min-p filter keeps, renormalised, without gradient; `FILTERED` if it fell."""

    def fn(logits: Float[Tensor, "N V"], action: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        return logp(filtered(logits.detach(), share), action).clamp(min=FILTERED)

    return fn


@stat_family("proxy_kl")
def proxy_kl(share: float) -> StatFn:
    """KL(q || pi) over all actions, q what the min-p filter keeps, renormalised, without gradient: its value is -log kept mass."""

    def fn(logits: Float[Tensor, "N V"], action: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        proxy = filtered(logits.detach(), share).log_softmax(-1)
        gap = torch.where(proxy.isfinite(), proxy - logits.log_softmax(-1), 0.0)
        return (proxy.exp() * gap).sum(-1)

    return fn


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
