"""How the parts of an update combine into one scalar loss; the same code serves eager, compiled and notebook use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from polopt.batch import Batch, Totals, missing_message
from polopt.errors import CallError, MissingStatistic
from polopt.memory import Memory
from polopt.part import Part, call

if TYPE_CHECKING:
    from polopt.method import Method, Slots, Update

Diagnostics = dict[str, Tensor]


class Now(dict[str, Tensor]):
    """Statistics of the current policy by name; a missing one is an error that says what to pass."""

    def __missing__(self, name: str) -> Tensor:
        raise MissingStatistic(missing_message(f"{name}@now"))


def shaped(method: Method, batch: Batch, memory: Memory) -> Batch:
    """The batch with its rewards passed through the method's reward parts, in order."""
    from dataclasses import replace

    for part in method.reward:
        batch = replace(batch, reward=call(part, batch=batch, memory=memory.of(f"reward.{part.name}")))
    return batch


def advantages(method: Method, update: Update, batch: Batch, memory: Memory) -> Float[Tensor, "B T"]:
    """Advantages of a whole batch with full groups: detached, 0 outside the mask. Raises on NaN or infinite rewards."""
    refuse_bad_rewards(batch)
    with torch.no_grad():
        slots = method.slots(update)
        out = call(slots.advantage, batch=shaped(method, batch, memory), memory=memory.of(_slot(method, update, "advantage")))
        out = out.squeeze(-1) if out.dim() == 3 and out.shape[-1] == 1 else out
        return torch.where(batch.mask if out.dim() == 2 else batch.mask[..., None], out, torch.zeros_like(out))


def returns(method: Method, update: Update, batch: Batch, memory: Memory) -> Float[Tensor, "B T"]:
    """What the critic regresses to, [B,T]: the advantage part's estimate of the return under the shaped reward."""
    part = method.slots(update).advantage
    estimate = getattr(part, "returns", None)
    if estimate is None:
        raise CallError(f"{method.name}: the critic needs a return, but advantage '{part.name}' estimates none; use gae or n-step")
    with torch.no_grad():
        found: Tensor = estimate(shaped(method, batch, memory))
        return found


def refuse_bad_rewards(batch: Batch) -> None:
    """Raise `CallError` naming the first NaN or infinite reward on a valid decision."""
    if batch.reward is None:
        return
    bad = ~batch.reward.isfinite().all(-1) & batch.mask
    if bool(bad.any()):
        row, t = (int(i) for i in bad.nonzero()[0])
        raise CallError(f"reward[{row}, {t}] = {batch.reward[row, t].tolist()} is not finite; fix the reward function")


def valid_decisions(slots: Slots, batch: Batch, advantage: Tensor | None, memory: Memory) -> Bool[Tensor, "B T"]:
    """Decisions that count, in numerator and denominator: mask and every select part."""
    valid = batch.mask
    for part in slots.select:
        valid = valid & call(part, batch=batch, advantage=advantage, memory=memory.of(f"select.{part.name}"))
    return valid


def loss(
    method: Method,
    update: Update,
    batch: Batch,
    now: Mapping[str, Tensor],
    advantage: Tensor | None,
    totals: Totals | None,
    memory: Memory,
    rng: Generator | None = None,
) -> tuple[Tensor, Diagnostics]:
    """Sum of the update's terms, each aggregated over valid decisions with the denominators `totals`."""
    slots = method.slots(update)
    now = Now(now)
    valid = valid_decisions(slots, batch, advantage, memory)
    totals = Totals.of(valid) if totals is None else totals
    if slots.critic is not None and "critic" in update.terms and "return@old" not in batch.stats:
        batch = batch.adding({"return@old": returns(method, update, batch, memory)})

    def run(slot: str, part: Part) -> Tensor:
        out: Tensor = call(
            part, batch=batch, now=now, advantage=advantage, memory=memory.of(_slot(method, update, slot)), rng=rng, valid=valid
        )
        return out.sum(-1) if out.dim() == 3 else out

    def add_up(per_decision: Tensor) -> Tensor:
        # torch.where, not a product: a masked-out inf or NaN must not reach the sum or its gradient
        clean = torch.where(valid, per_decision, torch.zeros_like(per_decision))
        out: Tensor = call(slots.aggregate, loss=clean, batch=batch, valid=valid, totals=totals)
        return out

    terms: dict[str, Tensor] = {}
    if "surrogate" in update.terms:
        per_decision = run("surrogate", slots.surrogate)
        for part in slots.weight:
            per_decision = per_decision * run(f"weight.{part.name}", part).detach()
        terms["surrogate"] = add_up(per_decision)
    if "penalty" in update.terms:
        for part in slots.penalty:
            terms[part.name] = add_up(run(f"penalty.{part.name}", part))
    if "critic" in update.terms and slots.critic is not None:
        terms["critic"] = add_up(run("critic", slots.critic))
    if not terms:
        raise CallError(f"{method.name}: update '{update.name}' has no active term among {update.terms}")
    total = torch.stack(list(terms.values())).sum()
    with torch.no_grad():
        info = {f"loss/{k}": v.detach() for k, v in terms.items()}
        info |= diagnose(slots, batch, now, advantage, valid, totals)
    return total, info


def diagnose(
    slots: Slots, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor | None, valid: Tensor, totals: Totals
) -> Diagnostics:
    """Diagnostics that add up over micro-batches: each is a sum over valid decisions divided by all valid decisions.

    kl_old, kl_ref: the k3 estimate (r - 1) - log r of KL(now || old) at the sampled actions; clip_pos, clip_neg: share of
    decisions with positive / negative advantage whose gradient the surrogate cuts.
    """
    n = totals.decisions.clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(valid, x, torch.zeros_like(x)).sum() / n

    out: Diagnostics = {}
    if "entropy" in now:
        out["entropy"] = mean(now["entropy"])
    for view, sign in (("old", -1.0), ("ref", 1.0)):
        if "logp" in now and f"logp@{view}" in batch.stats:
            d = sign * (batch.stats[f"logp@{view}"] - now["logp"])
            out[f"kl_{view}"] = mean(d.exp() - 1 - d)
    if "logp" in now and "logp@behaviour" in batch.stats and "logp@old" in batch.stats:
        out["sampler_gap"] = mean((batch.stats["logp@old"] - batch.stats["logp@behaviour"]).abs())
    cut = getattr(slots.surrogate, "cut", None)
    if cut is not None and advantage is not None and "logp" in now:
        where = cut(batch, now, advantage)
        out["clip_pos"] = mean((where & (advantage > 0)).to(now["logp"].dtype))
        out["clip_neg"] = mean((where & (advantage < 0)).to(now["logp"].dtype))
    return out


def _slot(method: Method, update: Update, slot: str) -> str:
    """Memory path of a slot: the update's own if it overrides the method's part."""
    return f"updates.{update.name}.{slot}" if getattr(update, slot.partition(".")[0], None) is not None else slot
