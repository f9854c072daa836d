"""The verified difference: with the parts that differ at their neutral values, a method computes what its parent computes.

Losses and gradients are compared on shared random batches in float64. The gradients are those with respect to every
statistic of the present policy (`logp@now`, `value@now`, `entropy@now`, ...): from there to the parameters the way is the
policy's and the same for all methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from polopt.batch import Batch
from polopt.claim import Neutral
from polopt.errors import CallError, PoloptError, unknown
from polopt.evidence.proof import actors
from polopt.evidence.proof.batches import random_batches
from polopt.evidence.proof.sides import Gap, called, changed, loss_parts, losses, neighbours, outside_loss, structure, with_part
from polopt.method import Method
from polopt.part import Can, Part, union

#: Differences up to this count as equal, relative to the parent's number where that is above 1; float64 leaves about 1e-15.
TOLERANCE = 1e-9
#: How many batches show that a part makes a difference as it stands.
PROBES = 8

Status = Literal["settings", "proven", "failed", "none", "swapped"]
How = Literal["neutral", "raw", "swapped"]


@dataclass(frozen=True)
class Line:
    """What was shown of one slot.

    slot: its path; own, parent: names of the parts, "" where one side has none. status: "settings" (one kind of part, settings set
    equal), "proven", "failed", "none" (the method says that no neutral value exists) or "swapped" (none was declared); the last two
    put the parent's part in its place, which proves nothing about it. before: the largest difference that the part makes as it
    stands (None: not measured); loss, gradient: those at the neutral value, each slot for itself (loss None: not promised).
    """

    slot: str
    own: str
    parent: str
    status: Status
    neutral: Neutral | None = None
    before: float | None = None
    loss: float | None = 0.0
    gradient: float = 0.0


@dataclass(frozen=True)
class Proof:
    """The outcome for a method and its parent: one line per slot that differs, and all of them at once.

    max_loss_difference, max_gradient_difference: over all batches, with every slot neutral at once (the loss is left out where a
    neutral value promises gradients alone). bitwise: these differences are exactly 0. swapped: slots for which the parent's part
    was put in; undeclared: those of them of which the method does not say so. outside: settings that act outside the loss. problem:
    why it does not hold, where that is not the failure of a slot.
    """

    child: str
    parent: str
    lines: tuple[Line, ...]
    batches: int
    conditions: tuple[str, ...]
    equal: Literal["loss", "gradient"]
    max_loss_difference: float
    max_gradient_difference: float
    bitwise: bool
    holds: bool
    swapped: tuple[str, ...] = ()
    undeclared: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()  # declared neutral values that no differing slot needs
    outside: tuple[str, ...] = ()
    problem: str = ""


def verify(child: Method, parent: Method | None = None) -> Proof:
    """Prove that `child` differs from `parent` (default: its own) in the parts that differ, and in nothing else.

    Every slot whose part differs in kind is shown to be neutral by itself: with its neutral values, on batches with its conditions
    alone, the other slots that need conditions holding the parent's part. Then all are neutral at once. Raises `CallError` for a
    method without parent and for neutral values that name no slot, setting or condition.
    """
    parent = child.parent if parent is None else parent
    if parent is None:
        raise CallError(f"{child.name} is the root of its family: there is no parent to compare it with")
    return _Link(child, parent).prove()


# -------------------------------------------------------------------- what differs
@dataclass(frozen=True)
class _Change:
    """A slot whose part differs in kind, or that only one side has."""

    path: str
    own: Part | None
    parent: Part | None
    neutral: Neutral | None
    declared: bool

    @property
    def weak(self) -> bool:
        """Whether neutrality holds on some batches only, or for the gradient alone."""
        return self.neutral is not None and (bool(self.neutral.batch) or self.neutral.equal == "gradient")


# -------------------------------------------------------------------- comparing
@dataclass
class _Link:
    """A method and its parent, and the comparisons of them that were made."""

    child: Method
    parent: Method
    changes: dict[str, _Change] = field(default_factory=dict)
    settings: dict[str, tuple[Part, Part]] = field(default_factory=dict)
    declared: Mapping[str, Neutral | None] = field(default_factory=dict)
    differ: bool = False  # whether other losses move other nets
    own_updates: bool = True  # False: the child is compared with the parent's updates
    found: dict[frozenset[str], Gap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mine, theirs = loss_parts(self.child), loss_parts(self.parent)
        # what it declares is meant against its own parent
        declared = self.child.neutral if self.child.parent == self.parent else {}
        for path in dict.fromkeys((*mine, *theirs)):
            own, parent = mine.get(path), theirs.get(path)
            if type(own) is not type(parent):
                self.changes[path] = _Change(path, own, parent, declared.get(path), path in declared)
            elif own is not None and parent is not None and own != parent:
                self.settings[path] = (own, parent)
        for path in declared:
            if path not in (*mine, *theirs, "updates"):
                raise unknown(f"slot in {self.child.name}'s neutral values", path, (*mine, *theirs))
        if declared.get("updates"):
            raise CallError(f"{self.child.name}: the updates have no settings to neutralise, only None can be declared for them")
        self.differ = structure(self.child) != structure(self.parent)
        self.own_updates = not (self.differ and "updates" in declared)
        self.declared = declared

    # ---------------------------------------------------------------- both sides
    def sides(self, how: Mapping[str, How]) -> tuple[Method, Method]:
        """The child and the parent to compare: settings set equal, each differing slot neutral, as it is, or the parent's."""
        child, parent = self.child, self.parent
        for path, (_, other) in self.settings.items():
            child = with_part(child, path, other)
        for path, change in self.changes.items():
            neutral = change.neutral or Neutral()
            where = f"{self.child.name}'s neutral value of '{path}'"
            if how[path] == "swapped":
                child = with_part(child, path, change.parent, neighbours(self.parent, path))
            elif how[path] == "neutral":
                for part, settings, side in ((change.own, neutral.own, "own"), (change.parent, neutral.parent, "parent")):
                    if settings and part is None:
                        raise CallError(f"{where} sets {side}={dict(settings)}, but that side has no such part")
                child = with_part(child, path, changed(change.own, neutral.own, where)) if change.own else child
                parent = with_part(parent, path, changed(change.parent, neutral.parent, where)) if change.parent else parent
        if not self.own_updates:
            child = replace(child, updates=parent.updates)
        return child, parent

    def gap(self, how: Mapping[str, How], conditions: tuple[str, ...], count: int | None = None) -> Gap:
        """Compare the two sides on the batches that fulfil `conditions`."""
        child, parent = self.sides(how)
        methods = (self.child, self.parent, child, parent)
        names = sorted(union(m.needs() for m in methods))
        reads = sorted(union(p.reads for m in methods for p in m.parts().values()))
        episodes = any(Can.EPISODES in m.requires() for m in (self.child, self.parent))
        if any(actors.acts(m) for m in methods):
            batches: Sequence[Batch] = actors.random_transitions(child, len(random_batches()))
        else:
            batches = random_batches(conditions, tuple(names), tuple(reads), episodes=episodes)
        gap = Gap()
        for batch in batches[:count]:
            try:
                gap.add(losses(child, batch), losses(parent, batch))
            except Exception as error:  # a part of the user's own may raise anything on a batch that it does not know
                gap.problem = str(error) if isinstance(error, PoloptError) else f"{type(error).__name__}: {error}"
                gap.loss = gap.gradient = float("inf")
                break
        return gap

    # ---------------------------------------------------------------- steps of the proof
    def neutral(self, weak: frozenset[str]) -> Gap:
        """Compare with all slots neutral that are so everywhere, and with those of `weak`; the others hold the parent's part."""
        if weak not in self.found:
            how: dict[str, How] = {
                path: "neutral" if c.neutral and (path in weak or not c.weak) else "swapped" for path, c in self.changes.items()
            }
            self.found[weak] = self.gap(how, self.conditions(weak))
        return self.found[weak]

    def conditions(self, weak: frozenset[str]) -> tuple[str, ...]:
        """What batches must fulfil for these slots to be neutral."""
        return tuple(dict.fromkeys(b for path in self.changes if path in weak for b in self._neutral(path).batch))

    def equal(self, weak: frozenset[str]) -> Literal["loss", "gradient"]:
        """What is promised when these slots are neutral."""
        return "gradient" if any(self._neutral(path).equal == "gradient" for path in weak) else "loss"

    def agrees(self, weak: frozenset[str]) -> bool:
        """Whether what is promised came true, on batches that have a gradient at all."""
        return _agree(self.neutral(weak), self.equal(weak))

    def line(self, change: _Change) -> Line:
        """What can be shown of one slot by itself."""
        path = change.path
        names = called(change.own), called(change.parent)
        if change.neutral is None:
            return Line(path, *names, "none" if change.declared else "swapped")
        weak = frozenset({path} if change.weak else ())
        gap = self.neutral(weak)
        if not self.agrees(weak):  # is it this slot, or another that is neutral at the same time?
            alone = self.gap({p: "neutral" if p == path else "swapped" for p in self.changes}, change.neutral.batch)
            gap = gap if alone.problem else alone
        status: Status = "proven" if _agree(gap, change.neutral.equal) else "failed"
        loss = gap.loss if change.neutral.equal == "loss" else None
        return Line(path, *names, status, change.neutral, self.before(path), loss, gap.gradient)

    def before(self, path: str) -> float | None:
        """The difference that a slot makes as it stands, others neutral or the parent's; None: it cannot stand alone."""
        how: dict[str, How] = {
            p: "raw" if p == path else "neutral" if c.neutral and not c.weak else "swapped" for p, c in self.changes.items()
        }
        own = self.changes[path].own
        gap = self.gap(how, tuple(getattr(own, "conditions", ())), PROBES)
        return None if gap.problem else max(gap.loss, gap.gradient)

    def prove(self) -> Proof:
        """All slots one by one, then all at once."""
        lines = [self.line(c) for c in self.changes.values()]
        weak = frozenset(path for path, c in self.changes.items() if c.weak)
        if self.differ and self.own_updates and not self.agrees(frozenset()) and not self.neutral(frozenset()).problem:
            other = _Link(self.child, self.parent)
            other.own_updates = False
            if other.agrees(frozenset()):
                return other.prove()
        lines += [Line(path, called(own), called(other), "settings") for path, (own, other) in self.settings.items()]
        if self.differ:
            lines.append(self._updates(weak))
        joint, holds = self.neutral(weak), self.agrees(weak)
        bad = [line.slot for line in lines if line.status == "failed"]
        problem = joint.problem
        if not problem and joint.size <= TOLERANCE:
            problem = "no gradient on any of the batches: nothing is proven"
        elif not (problem or holds or bad):
            problem = "each slot is neutral by itself, but something else differs"
        equal = self.equal(weak)
        loss = joint.loss if equal == "loss" else 0.0
        swapped = tuple(line.slot for line in lines if line.status in ("none", "swapped"))
        return Proof(
            self.child.name,
            self.parent.name,
            tuple(lines),
            len(random_batches()),
            self.conditions(weak),
            equal,
            loss,
            joint.gradient,
            bitwise=loss == joint.gradient == 0.0,
            holds=holds and not bad,
            swapped=swapped,
            undeclared=tuple(line.slot for line in lines if line.status == "swapped"),
            unused=tuple(p for p in self.declared if p not in self.changes and not (p == "updates" and self.differ)),
            outside=outside_loss(self.child, self.parent),
            problem=problem,
        )

    def _updates(self, weak: frozenset[str]) -> Line:
        own, other = ("+".join(u.name for u in m.updates) for m in (self.child, self.parent))
        if not self.own_updates:
            return Line("updates", own, other, "none" if "updates" in self.declared else "swapped")
        gap = self.neutral(weak)
        loss = gap.loss if self.equal(weak) == "loss" else None
        return Line("updates", own, other, "proven" if self.agrees(weak) else "failed", Neutral(), None, loss, gap.gradient)

    def _neutral(self, path: str) -> Neutral:
        return self.changes[path].neutral or Neutral()


def _agree(gap: Gap, equal: Literal["loss", "gradient"]) -> bool:
    """Whether what was promised to be equal is, where there is a gradient at all."""
    return max(gap.loss if equal == "loss" else 0.0, gap.gradient) <= TOLERANCE < gap.size


__all__ = ["TOLERANCE", "Line", "Proof", "verify"]
