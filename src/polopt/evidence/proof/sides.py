"""Two methods side by side: which parts act in their losses, changing those, and how far losses and gradients are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError, unknown
from polopt.evidence.proof import actors
from polopt.method import Method
from polopt.part import Part, union
from polopt.paths import Leaf, Slot, method_leaves
from polopt.update import PLURAL, UPDATE_SLOTS, Update

T = TypeVar("T", Method, Update)
#: Slots whose parts act in the loss.
IN_LOSS = ("reward", *UPDATE_SLOTS)


def loss_parts(method: Method) -> dict[str, Part]:
    """Parts by slot path that act in losses, those that updates override included."""
    return {path: part for path, part in method.parts().items() if _slot(path) in IN_LOSS}


def _slot(path: str) -> str:
    return path.split(".")[2 if path.startswith("updates.") else 0]


def structure(method: Method) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Which losses move which nets."""
    return [(tuple(sorted(u.terms)), tuple(sorted(u.trains))) for u in method.updates]


def outside_loss(child: Method, parent: Method) -> tuple[str, ...]:
    """Settings that differ but act outside the loss: who samples, how often and by which rule is stepped."""
    mine, theirs = method_leaves(child), method_leaves(parent)
    common = {u.name for u in child.updates} & {u.name for u in parent.updates}
    found: list[str] = []
    replaced: list[str] = []  # whole parts, which stand for their settings
    for path in dict.fromkeys((*mine, *theirs)):
        keys = path.split(".")
        inner = keys[0] == "updates"
        if (inner and keys[1] not in common) or (keys[2] if inner else keys[0]) in (*IN_LOSS, "terms", "trains"):
            continue
        a, b = mine.get(path), theirs.get(path)
        if keys[0] in ("stages", "repeat") and (a is None or b is None):  # a whole stage; other methods run once
            stage = ".".join(keys[:2])
            found += [stage] if len(keys) > 1 and stage not in found else []
            continue
        if any(path.startswith(f"{p}.") for p in replaced) or (a and b and (a.value == b.value or _same_kind(a, b))):
            continue
        if a and isinstance(a.type, Slot):
            replaced.append(path)
        found.append(".".join(keys[2:]) if inner and len(common) == 1 else path)
    return tuple(found)


def _same_kind(a: Leaf, b: Leaf) -> bool:
    """Whether two slots hold the same kind of part: its settings have paths of their own."""
    return isinstance(a.type, Slot) and type(a.value) is type(b.value)


def called(part: Part | None) -> str:
    """The name of a part, "" for none."""
    return "" if part is None else part.name or type(part).__name__


# -------------------------------------------------------------------- changing methods
def with_part(method: Method, path: str, part: Part | None, order: tuple[str, ...] = ()) -> Method:
    """The method with `part` at a slot path, or without the part there; `order`: names of parts that share a plural slot."""
    keys = path.split(".")
    if keys[0] == "updates":
        updates = tuple(_placed(u, ".".join(keys[2:]), part, order) if u.name == keys[1] else u for u in method.updates)
        return replace(method, updates=updates)
    return _placed(method, path, part, order)


def _placed(owner: T, path: str, part: Part | None, order: tuple[str, ...]) -> T:
    slot, _, name = path.partition(".")
    if slot not in PLURAL:
        return replace(owner, **cast(Any, {slot: part}))
    parts = list(getattr(owner, slot) or ())
    at = next((i for i, p in enumerate(parts) if p.name == name), None)
    if part is None:
        parts = [p for p in parts if p.name != name]
    elif at is not None:
        parts[at] = part
    else:  # behind those that stand before it on the other side
        before = order[: order.index(name)] if name in order else ()
        parts.insert(1 + max((i for i, p in enumerate(parts) if p.name in before), default=-1), part)
    emptied = None if isinstance(owner, Update) else ()
    return replace(owner, **cast(Any, {slot: tuple(parts) or emptied}))


def changed(part: Part, settings: Mapping[str, Any], where: str) -> Part:
    """The part with other settings; `CallError`, with `where` they come from, for unknown names and numbers out of range."""
    known = [f.name for f in fields(part)]
    for name in settings:
        if name not in known:
            raise unknown(f"setting in {where}: {part.kind} '{part.name}' has none called", name, known)
    try:
        return part.but(**settings)
    except CallError as error:
        raise CallError(f"{where}: {error}") from None


# -------------------------------------------------------------------- comparing
@dataclass
class Gap:
    """The largest differences over batches; `size`: the largest entry of the parent's gradients."""

    loss: float = 0.0
    gradient: float = 0.0
    size: float = 0.0
    problem: str = ""

    def add(self, mine: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
        """Include a batch: differences relative to the parent's numbers where those are above 1; NaN counts as infinite."""
        self.loss = max(self.loss, _apart(mine[0], theirs[0]))
        for name, gradient in theirs[1].items():
            self.gradient = max(self.gradient, _apart(mine[1][name], gradient))
            self.size = max(self.size, float(gradient.abs().max()))


def _apart(a: Tensor, b: Tensor) -> float:
    largest = float((a - b).abs().max())
    return largest / max(1.0, float(b.abs().max())) if largest == largest else float("inf")


def losses(method: Method, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses of all updates, and its gradients by `name@now`.

    An update's gradient counts where it trains the net that the statistic comes from: "value..." is the value's, and so on for nets
    with names of their own; all others are the policy's. Where parts ask networks themselves, gradients are those of the
    parameters of small random networks (`actors`).
    """
    if actors.acts(method):
        return actors.losses(method, batch)
    leaves = {k: v.detach().clone().requires_grad_() for k, v in batch.stats.items() if k.endswith("@now")}
    nets = union(frozenset(u.trains) for u in method.updates) | {"value"}
    gradients = {k: torch.zeros_like(v) for k, v in leaves.items()}
    total = torch.zeros((), dtype=torch.float64)
    memory = method.memory(batch.units.get("item", 0))
    for u in method.updates:
        loss, _ = method.loss(batch.adding(leaves), memory, update=u.name, rng=torch.Generator().manual_seed(1))
        total = total + loss.detach()
        if not loss.requires_grad:
            continue
        for (name, _), g in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True):
            net = next((n for n in sorted(nets - {"policy"}) if name.startswith(n)), "policy")
            if g is not None and net in u.trains:
                gradients[name] += g
    return total, gradients


def neighbours(method: Method, path: str) -> tuple[str, ...]:
    """Names of the parts that share a plural slot, in order."""
    head = path.rpartition(".")[0]
    return tuple(p.name for other, p in method.parts().items() if other.rpartition(".")[0] == head)


__all__ = ["IN_LOSS", "Gap", "called", "changed", "loss_parts", "losses", "neighbours", "outside_loss", "structure", "with_part"]
