"""`Update`: which terms move which nets, how often and by which rule; the slots that parts fill."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from polopt.part import Part, Range, check_fields

#: Slots that one update fills; an `Update` may override any of them.
UPDATE_SLOTS = ("advantage", "select", "weight", "surrogate", "penalty", "target", "critic", "actor", "multiplier", "aggregate")
#: Slots that hold several parts.
PLURAL = ("reward", "select", "weight", "penalty", "after")
SLOTS = ("allocator", "sampler", "decoder", "explore", "source", "reward", *UPDATE_SLOTS)
#: Slots that may be empty.
OPTIONAL = ("allocator", "decoder", "explore", "advantage", "surrogate", "target", "critic", "actor", "multiplier")
#: Losses that an update adds up: slots that hold them.
TERMS = ("surrogate", "penalty", "critic", "actor", "multiplier")


@dataclass(frozen=True)
class Update:
    """Which terms, on which batch, move which nets, how often, by which rule, and what follows. An iteration is a tuple of these.

    on: the name of the batch in what the source returns. terms: slots whose losses are added up. minibatch counts rows
    (decisions where the policy's decisions are independent); None is the whole batch. every counts rounds of updates: an
    iteration on fresh batches is one, a replay makes as many as its ratio of updates to data asks for. With `every` n an update
    on fresh batches runs in rounds 1, n+1, 2n+1, .. (the first batch is used), one on transitions in rounds n, 2n, .. (a delayed
    actor waits for its critic). after: what follows each of its steps (slow copies move). Any of the slots may be overridden.
    """

    name: str = "policy"
    on: str = "policy"
    trains: tuple[str, ...] = ("policy", "value")
    terms: tuple[str, ...] = ("surrogate", "penalty", "critic")
    epochs: Annotated[int, Range(ge=1), "passes over the batch"] = 1
    minibatch: Annotated[int | None, Range(ge=1), "rows or decisions per gradient step; none: the whole batch"] = None
    minibatches: Annotated[int | None, Range(ge=1), "gradient steps per epoch, if minibatch is not set"] = None
    target_kl: Annotated[float | None, Range(gt=0), "stop the epochs when KL to the old policy exceeds this"] = None
    every: Annotated[int, Range(ge=1), "run in every n-th round: 1, n+1, .. on fresh batches, n, 2n, .. of a replay"] = 1
    after: tuple[Part, ...] = ()
    rule: Part = field(default_factory=lambda: default_rule())
    advantage: Part | None = None
    select: tuple[Part, ...] | None = None
    weight: tuple[Part, ...] | None = None
    surrogate: Part | None = None
    penalty: tuple[Part, ...] | None = None
    target: Part | None = None
    critic: Part | None = None
    actor: Part | None = None
    multiplier: Part | None = None
    aggregate: Part | None = None

    def __post_init__(self) -> None:
        check_fields(self, f"updates.{self.name}")

    def moves(self, copies: Collection[str]) -> tuple[str, ...]:
        """Those of the slow copies `copies` that follow its steps."""
        rules: Any = self.after
        return tuple(dict.fromkeys(name for part in rules for name in part.moves(copies)))


def default_rule() -> Part:
    """Plain gradient descent with Adam, the default rule."""
    from polopt.parts.rule.descend import Descend

    return Descend()


@dataclass(frozen=True)
class Slots:
    """The parts that act in one update, after its overrides."""

    advantage: Part | None
    select: tuple[Part, ...]
    weight: tuple[Part, ...]
    surrogate: Part | None
    penalty: tuple[Part, ...]
    target: Part | None
    critic: Part | None
    actor: Part | None
    multiplier: Part | None
    aggregate: Part
    terms: tuple[str, ...]
    update: str = ""
    own: frozenset[str] = frozenset()  # slots that the update overrides

    def path(self, slot: str) -> str:
        """Where the part in `slot` ("advantage", "penalty.kl") keeps its memory: apart, if the update overrides the slot."""
        return f"updates.{self.update}.{slot}" if slot.partition(".")[0] in self.own else slot

    def acting(self) -> Iterator[tuple[str, Part]]:
        """(slot path, part) of every part that is called in this update's loss."""
        if "surrogate" in self.terms and self.surrogate is not None:
            for slot in ("select", "weight"):
                yield from ((f"{slot}.{p.name}", p) for p in getattr(self, slot))
            yield "surrogate", self.surrogate
        if "penalty" in self.terms:
            yield from ((f"penalty.{p.name}", p) for p in self.penalty)
        if "critic" in self.terms and self.critic is not None:
            if self.target is not None:
                yield "target", self.target
            yield "critic", self.critic
        for slot in ("actor", "multiplier"):
            if slot in self.terms and getattr(self, slot) is not None:
                yield slot, getattr(self, slot)
        yield "aggregate", self.aggregate
