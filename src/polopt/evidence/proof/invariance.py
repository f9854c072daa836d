"""Invariance: losses and gradients do not change with the cut into micro-batches, nor with padding, on random batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from polopt import objective
from polopt.batch import Batch
from polopt.draws import Draws
from polopt.evidence.proof import actors
from polopt.evidence.proof.batches import random_batches
from polopt.memory import Memory
from polopt.method import Method
from polopt.part import Can, union
from polopt.stats import split
from polopt.update import Update

TOLERANCE = 1e-9  # relative to the largest entry, in float64
CUTS = ((1,), (2, 5), (1, 2, 3, 4))


@dataclass(frozen=True)
class Invariance:
    """Largest relative deviation of a loss or of a gradient's entry, and where it arose."""

    error: float
    where: str = ""
    batches: int = 0

    @property
    def ok(self) -> bool:
        """Whether it is rounding."""
        return self.error <= TOLERANCE


def check(method: Method, *, count: int = 16) -> Invariance:
    """The largest deviation over `count` random batches, all updates of the method, several cuts and paddings.

    Micro-batches get the advantages of the whole batch and its totals, as in a run.
    """
    if actors.acts(method):
        return Invariance(0.0, "one draw is one batch: it is neither cut nor padded")
    worst = Invariance(0.0, batches=count)
    for i, batch in enumerate(batches(method, count)):
        for update in method.updates:
            whole = evaluated(method, update, batch, [slice(None)])
            variants = {f"cut at {', '.join(map(str, c))}": evaluated(method, update, batch, _rows(batch, c)) for c in CUTS}
            variants |= {f"padded {w}": evaluated(method, update, p, [slice(None)]) for w, p in padded(batch).items()}
            for words, found in variants.items():
                error = deviation(whole, found)
                if not error <= worst.error:
                    worst = Invariance(error, f"batch {i}, update '{update.name}', {words}", count)
    return worst


def batches(method: Method, count: int) -> Sequence[Batch]:
    """Random batches with everything that the method's parts read."""
    extra = tuple(sorted(method.needs() - {"return@old"}))
    reads = tuple(sorted(union(p.reads for p in method.parts().values()) - {"group"}))
    conditions = tuple(dict.fromkeys(c for p in method.parts().values() for c in getattr(p, "conditions", ())))
    return random_batches(conditions, extra, reads, episodes=Can.EPISODES in method.requires() or _grouped(method), count=count)


def _grouped(method: Method) -> bool:
    return Can.GROUPS in method.requires()


def evaluated(method: Method, update: Update, batch: Batch, cuts: Sequence[slice]) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradient in every statistic of the present policy) of the whole update batch, added up over pieces of rows."""
    memory = method.memory(batch.units.get("item", 0))
    leaves = {k: v.detach().clone().requires_grad_() for k, v in batch.stats.items() if k.endswith("@now")}
    batch = replace(batch, stats={**batch.stats, **leaves})
    slots = method.slots(update)
    advantage = objective.advantages(method, update, batch, memory) if "surrogate" in update.terms else None
    if "critic" in update.terms and slots.critic is not None:
        batch = batch.adding({"return@old": objective.returns(method, update, batch, memory)})
    totals = method.totals(batch, memory, update=update.name)
    batch = surveyed(method, update, batch, advantage, memory)
    total = torch.zeros((), dtype=torch.float64)
    for rows in cuts:
        piece, given = batch.rows(rows), None if advantage is None else advantage[rows]
        now = {n: piece.stats[f"{n}@now"] for n in split(method.needs(update)).get("now", frozenset())}
        loss, _ = objective.loss(method, update, piece, now, given, totals, memory)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach().double()
    b, t = batch.shape
    return total, {k: torch.zeros(b, t) if x.grad is None else x.grad for k, x in leaves.items()}


def surveyed(method: Method, update: Update, batch: Batch, advantage: Tensor | None, memory: Memory) -> Batch:
    """The batch with what parts must know of the whole of it, from the same random numbers in every call."""
    now = {n: batch.stats[f"{n}@now"].detach() for n in split(method.needs(update)).get("now", frozenset())}
    rng = Draws(torch.Generator().manual_seed(1))
    return batch.adding(objective.survey(method.slots(update), batch, now, advantage, memory, rng))


def _rows(batch: Batch, cuts: Sequence[int]) -> list[slice]:
    places = [0, *(c for c in cuts if c < batch.shape[0]), batch.shape[0]]
    return [slice(a, b) for a, b in pairwise(places)]


def padded(batch: Batch) -> dict[str, Batch]:
    """The batch with more columns, and with more rows, that the mask leaves out; what stands there is garbage."""
    b, t = batch.shape
    wide = batch.pad(t + 3)
    tail = batch.rows(slice(0, min(2, b)))
    empty = replace(tail, mask=torch.zeros_like(tail.mask), group=None if tail.group is None else tail.group * 0)
    rows = Batch.cat([replace(batch, final=None), empty])
    if batch.group is not None and rows.group is not None:
        ids = torch.cat([batch.group, torch.full((empty.shape[0],), batch.units["group"], dtype=batch.group.dtype)])
        rows = replace(rows, group=ids, units={**rows.units, "group": batch.units["group"] + 1})
    return {"by columns": wide, "by rows": rows}


def deviation(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Largest difference of the losses and of gradients on the rows and columns of `a`, relative to the largest entry."""
    gaps = [abs(float(a[0] - b[0]))]
    for name, grad in a[1].items():
        rows, steps = grad.shape[:2]
        inside, outside = b[1][name][:rows, :steps], b[1][name].clone()
        outside[:rows, :steps] = 0
        gaps += [float((grad - inside).abs().max()), float(outside.abs().max())]
    if not all(map(math.isfinite, gaps)):
        return math.inf
    return max(gaps) / max(1.0, abs(float(a[0])), *(float(g.abs().max()) for g in a[1].values()))


__all__ = ["TOLERANCE", "Invariance", "check"]
