"""How the parts of an update combine into one scalar loss; the same code serves eager, compiled and notebook use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.batch import Batch, Totals
from polopt.columns import missing_message
from polopt.draws import Draws
from polopt.errors import CallError, MissingStatistic
from polopt.memory import Memory
from polopt.part import Part, ask, call
from polopt.pooling import not_half, widened

if TYPE_CHECKING:
    from polopt.interfaces import Nets
    from polopt.method import Method
    from polopt.update import Slots, Update

Diagnostics = dict[str, Tensor]


class Now(dict[str, Tensor]):
    """Statistics of the current policy by name; a missing one is an error that says what to pass."""

    def __missing__(self, name: str) -> Tensor:
        raise MissingStatistic(missing_message(f"{name}@now"))


def shaped(method: Method, batch: Batch, memory: Memory) -> Batch:
    """The batch with its rewards passed through the method's reward parts, in order."""
    for part in method.reward:
        reward = call(part, batch=batch, memory=memory.of(f"reward.{part.name}"))
        batch = replace(batch, reward=checked("reward", part, reward, batch, "BTK"))
    return batch


def advantages(method: Method, update: Update, batch: Batch, memory: Memory) -> Float[Tensor, "B T"]:
    """Advantages of a whole batch with full groups: detached, 0 outside the mask. Raises on NaN or infinite rewards."""
    refuse_bad_rewards(batch)
    with torch.no_grad():
        slots = method.slots(update)
        assert slots.advantage is not None  # `Method.check`
        out = call(slots.advantage, batch=shaped(method, batch, memory), memory=memory.of(slots.path("advantage")))
        out = checked("advantage", slots.advantage, out, batch, "BT", "BTK")
        out = out.squeeze(-1) if out.dim() == 3 and out.shape[-1] == 1 else out
        return torch.where(batch.mask if out.dim() == 2 else batch.mask[..., None], out, torch.zeros_like(out))


def returns(method: Method, update: Update, batch: Batch, memory: Memory) -> Float[Tensor, "B T"]:
    """What the critic regresses to, [B,T]: the advantage part's estimate of the return under the shaped reward."""
    part = method.slots(update).advantage
    estimate = getattr(part, "returns", None)
    if part is None or estimate is None:
        named = part.name if part is not None else "none"
        raise CallError(f"{method.name}: the critic needs a return, but advantage '{named}' estimates none; use gae or n-step")
    with torch.no_grad():
        return checked("advantage", part, estimate(shaped(method, batch, memory)), batch, "BT")


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
        kept = call(part, batch=batch, advantage=advantage, memory=memory.of(slots.path(f"select.{part.name}")))
        valid = valid & checked("select", part, kept, batch, "BT")
    return valid


def surveyed(
    slots: Slots,
    batch: Batch,
    now: Mapping[str, Tensor],
    advantage: Tensor | None,
    valid: Bool[Tensor, "B T"],
    memory: Memory,
    rng: Draws | None = None,
) -> Batch:
    """The batch with what its parts must know of the whole minibatch, as statistics `name@minibatch` [B,T] without gradient.

    A part that compares decisions of the whole minibatch (ranks, bounds that are searched, random choices) has a method
    `survey(batch, now, advantage, valid, memory, rng, surrogate)`, of which it names what it wants, and lists in `surveys` what
    that returns. Micro-batches bring these statistics along; where they are missing, `batch` is the whole minibatch.
    """
    for path, part in slots.acting():
        missing = [n for n in getattr(part, "surveys", ()) if n not in batch.stats]
        if missing:
            with torch.no_grad():
                found = ask(
                    part.survey,  # type: ignore[attr-defined]
                    batch=batch, now={k: v.detach() for k, v in now.items()}, advantage=advantage, valid=valid,
                    memory=memory.of(slots.path(path)), rng=rng, surrogate=slots.surrogate,
                )  # fmt: skip
            batch = batch.adding({n: found[n] for n in missing})
    return batch


def survey(
    slots: Slots, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor | None, memory: Memory, rng: Draws | None = None
) -> dict[str, Tensor]:
    """What parts must know of the whole minibatch `batch`: statistics `name@minibatch`, for its micro-batches to bring along."""
    batch, now = isolated(batch, now)
    valid = valid_decisions(slots, batch, advantage, memory)
    if advantage is not None:
        advantage = advantage.masked_fill(~valid if advantage.dim() == 2 else ~valid[..., None], 0)
    found = surveyed(slots, batch, now, advantage, valid, memory, rng)
    return {k: v for k, v in found.stats.items() if k.endswith("@minibatch")}


def checked(kind: str, part: Part, out: Any, batch: Batch, *forms: str) -> Tensor:
    """The result of a part, or `CallError` when it has none of the `forms` ("", "BT", "BTK": scalar, decisions, channels)."""
    b, t = batch.shape
    if isinstance(out, Tensor) and any(len(f) == out.dim() and (not f or tuple(out.shape[:2]) == (b, t)) for f in forms):
        return out
    shapes = " or ".join({"": "()", "BT": f"({b}, {t})", "BTK": f"({b}, {t}, K)"}[f] for f in forms)
    got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
    raise CallError(f"{kind} '{part.name or type(part).__name__}' returned {got}, expected {shapes} (rows x decisions)")


def isolated(batch: Batch, now: Mapping[str, Tensor]) -> tuple[Batch, Now]:
    """Only `now` carries gradient, and what is outside the mask, perhaps NaN, is 0: 0 times NaN would spoil every gradient.

    Half precision becomes float32.
    """
    outside = ~batch.mask

    def clean(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.shape[:2] != outside.shape:
            return x  # a wrong shape is refused, by its name, by the part that reads it
        return widened(x).masked_fill(outside.view(*outside.shape, *[1] * (x.dim() - 2)), 0.0)

    stats = {k: clean(v if k.endswith("@now") else v.detach()) for k, v in batch.stats.items()}
    reward = None if batch.reward is None else batch.reward.detach()
    return replace(batch, stats=stats, reward=reward), Now({k: clean(v) for k, v in now.items()})


def loss(
    method: Method,
    update: Update,
    batch: Batch,
    now: Mapping[str, Tensor],
    advantage: Tensor | None,
    totals: Totals | None,
    memory: Memory,
    rng: Draws | None = None,
    nets: Nets | None = None,
) -> tuple[Tensor, Diagnostics]:
    """Sum of the update's terms, each aggregated over valid decisions with the denominators `totals`.

    Gradients flow to `now` and to the networks `nets` alone; a critic's target is computed without gradient. A part may
    return diagnostics (scalars by name) beside its result. What stands outside the valid decisions, be it NaN, reaches neither
    loss nor gradient.
    """
    slots = method.slots(update)
    batch, now = isolated(batch, now)
    advantage = None if advantage is None else advantage.detach()
    valid = valid_decisions(slots, batch, advantage, memory)
    if advantage is not None:
        advantage = advantage.masked_fill(~valid if advantage.dim() == 2 else ~valid[..., None], 0)
    totals = Totals.of(valid, batch.horizon) if totals is None else totals
    critic = slots.critic if "critic" in update.terms else None
    if critic is not None and slots.target is None and "return@old" not in batch.stats:
        batch = batch.adding({"return@old": returns(method, update, batch, memory)})
    batch = surveyed(slots, batch, now, advantage, valid, memory, rng)
    told: Diagnostics = {}
    target: Tensor | None = None

    def asked(slot: str, part: Part) -> Any:
        found = call(
            part, batch=batch, now=now, advantage=advantage, memory=memory.of(slots.path(slot)), rng=rng, valid=valid,
            nets=nets, target=target, built=memory.built.get(slots.path(slot)),
        )  # fmt: skip
        if isinstance(found, tuple):
            found, more = found
            told.update({k: v.detach() for k, v in more.items()})  # scalars; `name@drawn` for the updates that follow
        return found

    def run(slot: str, part: Part) -> Tensor:
        found = asked(slot, part)
        kind = slot.partition(".")[0]
        out = checked(kind, part, found, batch, "BT") if kind == "weight" else checked(kind, part, found, batch, "BT", "BTK")
        return out.sum(-1) if out.dim() == 3 else out

    def add_up(per_decision: Tensor) -> Tensor:
        # torch.where, not a product: a masked-out inf or NaN must not reach the sum or its gradient
        clean = torch.where(valid, per_decision, torch.zeros_like(per_decision))
        found = call(slots.aggregate, loss=clean, batch=batch, valid=valid, totals=totals)
        return checked("aggregate", slots.aggregate, found, batch, "")

    terms: dict[str, Tensor] = {}
    if "surrogate" in update.terms and slots.surrogate is not None:
        per_decision = run("surrogate", slots.surrogate)
        for part in slots.weight:
            per_decision = per_decision * run(f"weight.{part.name}", part).detach()
        terms["surrogate"] = add_up(per_decision)
    if "penalty" in update.terms:
        for part in slots.penalty:
            terms[part.name] = add_up(run(f"penalty.{part.name}", part))
    if critic is not None:
        if slots.target is not None:
            with torch.no_grad():
                target = checked("target", slots.target, asked("target", slots.target), batch, "BT", "BTK")
        terms["critic"] = add_up(run("critic", critic))
    for slot in ("actor", "multiplier"):
        part = getattr(slots, slot)
        if slot in update.terms and part is not None:
            terms[slot] = add_up(run(slot, part))
    if not terms:
        raise CallError(f"{method.name}: update '{update.name}' has no active term among {update.terms}")
    total = torch.stack(list(terms.values())).sum()
    with torch.no_grad():
        info = {f"loss/{k}": v.detach() for k, v in terms.items()}
        info |= told | diagnose(slots, batch, now, advantage, valid, totals)
    return total, info


def diagnose(
    slots: Slots, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor | None, valid: Tensor, totals: Totals
) -> Diagnostics:
    """Diagnostics that add up over micro-batches: each is a sum over valid decisions divided by all valid decisions.

    kl_old: the estimate (r - 1) - log r, r = now/old, of KL(old || now) at the decisions that old took, unbiased; kl_ref: the same
    with r = ref/now, of KL(now || ref), unbiased while now is old. clip_pos, clip_neg: share of decisions with positive / negative
    advantage whose gradient the surrogate cuts.
    """
    n = totals.decisions.clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(valid, not_half(x), 0.0).sum() / n

    out: Diagnostics = {}
    if "entropy" in now:
        out["entropy"] = mean(now["entropy"])
    for view, sign in (("old", -1.0), ("ref", 1.0)):
        if "logp" in now and f"logp@{view}" in batch.stats:
            d = (sign * (not_half(batch.stats[f"logp@{view}"]) - not_half(now["logp"]))).clamp(-20, 20)
            out[f"kl_{view}"] = mean(d.exp() - 1 - d)
    if "logp" in now and "logp@behaviour" in batch.stats and "logp@old" in batch.stats:
        out["sampler_gap"] = mean((batch.stats["logp@old"] - batch.stats["logp@behaviour"]).abs())
    cut = getattr(slots.surrogate, "cut", None)
    if cut is not None and advantage is not None and "logp" in now:
        where = cut(batch, now, advantage)
        out["clip_pos"] = mean((where & (advantage > 0)).to(now["logp"].dtype))
        out["clip_neg"] = mean((where & (advantage < 0)).to(now["logp"].dtype))
    return out
