"""`Method`: a value made of parts, written as its difference from its parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from polopt import objective
from polopt.batch import Batch, Totals
from polopt.claim import Floor, Miniature, Neutral
from polopt.draws import Draws
from polopt.errors import CallError, Misfit, unknown
from polopt.memory import Memory
from polopt.part import REASONS, Can, Net, Part, union
from polopt.update import OPTIONAL, PLURAL, SLOTS, TERMS, UPDATE_SLOTS, Slots, Update

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polopt.interfaces import Nets

#: What describes a method without acting in it; a child does not inherit it.
DESCRIPTION: dict[str, Any] = {
    "title": "", "paper": "", "year": None, "family": "", "doc": "", "claim": "", "builds_on": (), "card": None,
    "miniature": None, "neutral": {}, "floor": None,
}  # fmt: skip


def default_source() -> Part:
    """Train on what was just sampled, the default source."""
    from polopt.parts.source import Fresh

    return Fresh()


@dataclass(frozen=True)
class Method:
    """A published (or your own) way of improving a policy: parts in slots, and updates. Made with `.but(...)`."""

    name: str
    sampler: Part
    aggregate: Part
    advantage: Part | None = None
    surrogate: Part | None = None
    allocator: Part | None = None  # which items are sampled, and how often; none: those of the shuffled stream, equally often
    decoder: Part | None = None
    explore: Part | None = None  # how actions differ from the policy's own while experience is collected
    source: Part = field(default_factory=lambda: default_source())
    reward: tuple[Part, ...] = ()
    select: tuple[Part, ...] = ()
    weight: tuple[Part, ...] = ()
    penalty: tuple[Part, ...] = ()
    target: Part | None = None
    critic: Part | None = None
    actor: Part | None = None
    multiplier: Part | None = None
    updates: tuple[Update, ...] = field(default_factory=lambda: (Update(),))
    title: str = ""
    paper: str = ""  # arXiv id or citation
    year: int | None = None
    family: str = ""
    doc: str = ""
    claim: str = ""
    builds_on: tuple[str, ...] = ()
    card: int | None = None  # number in the catalogue of papers
    miniature: Miniature | None = None  # the experiment that tests its claim
    neutral: Mapping[str, Neutral | None] = field(default_factory=dict)  # by slot: when a part makes no difference; None: never
    floor: Floor | None = None  # what it must at least learn
    parent: Method | None = field(default=None, repr=False)
    changes: tuple[str, ...] = ()  # what was replaced when it was made from its parent

    # ---------------------------------------------------------------- deriving
    def but(self, name: str, **changes: Any) -> Method:
        """A child of this method that differs in `changes`: slots, descriptive fields, or fields of its main update.

        `GRPO.but("mine", surrogate=Clip(high=0.28), epochs=2)`. Descriptive fields are not inherited. Raises
        `CallError` for unknown names and for parts in the wrong slot.
        """
        own = {f.name for f in fields(self)} - {"name", "parent", "changes"}
        inner = {f.name for f in fields(Update)} - {"name", *UPDATE_SLOTS}
        for key in changes:
            if key not in own | inner:
                raise unknown(f"slot or setting in {self.name}.but(...)", key, own | inner)
        direct = {k: v for k, v in changes.items() if k in own}
        for slot in SLOTS:
            if slot in direct:
                direct[slot] = _fit(slot, direct[slot])
        updates = tuple(direct.get("updates", self.updates))
        nested = {k: v for k, v in changes.items() if k in inner}
        if nested:
            at = _main(updates)
            updates = (*updates[:at], replace(updates[at], **nested), *updates[at + 1 :])
        described = {**DESCRIPTION, "family": self.family}
        child = replace(
            self,
            **{**described, **direct, "updates": updates},
            name=name,
            parent=self,
            changes=tuple(k for k in changes if k not in described),
        )
        child.check()
        return child

    def set(self, path: str, value: Any) -> Method:
        """The same method with one nested setting changed: "surrogate", "surrogate.high", "updates.critic.epochs", "epochs"."""
        from polopt.overrides import apply_override

        return apply_override(self, path, value)

    # ---------------------------------------------------------------- reading
    def update(self, name: str | None = None) -> Update:
        """An update by name; by default the main one: the first on what was just sampled, which plain settings belong to."""
        if name is None and self.updates:
            return self.updates[_main(self.updates)]
        for u in self.updates:
            if u.name == name:
                return u
        raise unknown(f"update of {self.name}", name or "(first)", [u.name for u in self.updates])

    def slots(self, update: Update) -> Slots:
        """The parts acting in `update`: the method's own where the update does not override them."""
        chosen = {s: getattr(self, s) if getattr(update, s) is None else getattr(update, s) for s in UPDATE_SLOTS}
        own = frozenset(s for s in UPDATE_SLOTS if getattr(update, s) is not None)
        return Slots(**chosen, terms=update.terms, update=update.name, own=own)

    def parts(self) -> dict[str, Part]:
        """Every part by slot path ("advantage", "penalty.kl", "updates.policy.rule")."""
        found: dict[str, Part] = {}
        for slot in SLOTS:
            value = getattr(self, slot)
            found |= {f"{slot}.{p.name}": p for p in value} if slot in PLURAL else ({slot: value} if value else {})
        for u in self.updates:
            found[f"updates.{u.name}.rule"] = u.rule
            found |= {f"updates.{u.name}.after.{p.name}": p for p in u.after}
            for slot in UPDATE_SLOTS:
                value = getattr(u, slot)
                if value is not None:
                    many = value if slot in PLURAL else (value,)
                    found |= {f"updates.{u.name}.{slot}{'.' + p.name if slot in PLURAL else ''}": p for p in many}
        return found

    def chain(self) -> list[Method]:
        """From the root of the family to this method."""
        return [*(self.parent.chain() if self.parent else []), self]

    def needs(self, update: Update | None = None) -> frozenset[str]:
        """Statistics `name@view` that the parts of `update` (default: all updates), samplers, rewards and advantages need."""
        updates = self.updates if update is None else (update,)
        acting = union(union(p.needs for _, p in self.slots(u).acting()) | u.rule.needs for u in updates)
        before = union(p.needs for p in (self.allocator, self.sampler, self.decoder, *self.reward) if p is not None)
        before |= union(a.needs for u in updates if (a := self.slots(u).advantage) is not None)
        if any(u.target_kl is not None for u in updates):
            acting |= {"logp@old", "logp@now"}  # the divergence that stops the epochs is estimated from them
        return acting | before - {"return@old"}

    def requires(self) -> frozenset[Can]:
        """Capabilities that policy and task must offer."""
        return union(_requires(p) for p in self.parts().values())

    def nets(self) -> frozenset[str]:
        """Networks beyond the policy that its parts ask for ("value")."""
        return union(p.nets for p in self.parts().values())

    def networks(self) -> dict[str, Net]:
        """Networks that its parts ask for in full, by name; two parts that ask for one name must agree on it."""
        found: dict[str, Net] = {}
        for path, part in self.parts().items():
            for net in part.networks:
                if found.setdefault(net.name, net) != net:
                    raise CallError(f"{self.name}: {path} asks for {net}, another part for {found[net.name]}")
        return found

    def copies(self) -> frozenset[str]:
        """Nets of which some part reads the slow copy."""
        return union(p.copies for p in self.parts().values())

    # ---------------------------------------------------------------- refusing
    def check(self) -> None:
        """Raise `CallError` if the parts cannot work together."""
        for slot in SLOTS:
            _fit(slot, getattr(self, slot))
        names = [u.name for u in self.updates]
        if len(set(names)) < len(names):
            raise CallError(f"{self.name}: updates need distinct names, got {names}")
        for u in self.updates:
            slots = self.slots(u)
            for term in u.terms:
                if term not in TERMS:
                    raise unknown(f"term of update '{u.name}'", term, TERMS)
            for slot in ("surrogate", "advantage") if "surrogate" in u.terms else ():
                if getattr(slots, slot) is None:
                    raise CallError(
                        f"{slot} = none: the slot cannot be empty, update '{u.name}' of {self.name} trains on its surrogate; "
                        f"'polopt parts {slot}' lists what fits"
                    )
            before: list[tuple[str, Part | None]] = [
                ("allocator", self.allocator),
                ("sampler", self.sampler),
                ("explore", self.explore),
                ("source", self.source),
                *((f"reward.{p.name}", p) for p in self.reward),
                ("advantage", slots.advantage),
            ]
            for path, part in [*before, *slots.acting(), ("rule", u.rule), *(("after", p) for p in u.after)]:
                validate = getattr(part, "validate", None)
                if part is not None and validate and (problem := validate(self, u)):
                    raise CallError(f"{self.name}: {path} '{part.name}' in update '{u.name}': {problem}")
        self._refuse_copies_that_stay()

    def _refuse_copies_that_stay(self) -> None:
        """Raise `CallError` for a slow copy that some part reads and no update moves: it would keep its initial weights."""
        copies = self.copies()
        for name in sorted(copies - union(frozenset(u.moves(copies)) for u in self.updates)):
            reader = next(f"{path} '{p.name}'" for path, p in self.parts().items() if name in p.copies)
            after = next((f"updates.{u.name}.after.{p.name}" for u in self.updates for p in u.after), "")
            trains = next((u.name for u in reversed(self.updates) if name in u.trains), self.updates[-1].name)
            fresh = f"set `after` polyak or copy of update '{trains}', or of one that follows it in a round"
            remedy = f"name it in {after}.of (empty: all)" if after else fresh
            raise CallError(f"{self.name}: no update moves the slow copy of '{name}', which {reader} reads: {remedy}")

    def refuse_unless(self, offers: Iterable[Can], what: str) -> None:
        """Raise `Misfit` with the reason when a part requires what `what` (a task with its policy) does not offer."""
        missing = self.requires() - frozenset(offers)
        for path, part in self.parts().items():
            if lacking := sorted(_requires(part) & missing):
                need = " and ".join(REASONS.get(c, c.value) for c in lacking)
                raise Misfit(
                    f"{self.name} cannot run on {what}: its {path} '{part.name}' needs {need}, which {what} does not offer"
                )

    # ---------------------------------------------------------------- computing
    def memory(self, items: int = 0) -> Memory:
        """Fresh memory for the parts of this method; items: how many the task has, where parts keep a table of them."""
        return Memory(self.parts(), items)

    def _memory_for(self, batch: Batch) -> Memory:
        """Fresh memory, with tables of as many items as the batch knows of."""
        return self.memory(batch.units.get("item", 0))

    def advantages(self, batch: Batch, memory: Memory | None = None, *, update: str | None = None) -> Tensor:
        """Advantages [B,T] of a whole batch (full groups), detached; 0 outside the mask."""
        return objective.advantages(self, self.update(update), batch, memory or self._memory_for(batch))

    def totals(self, batch: Batch, memory: Memory | None = None, *, update: str | None = None) -> Totals:
        """Denominators of the update batch `batch`, to pass to `loss` of its micro-batches."""
        slots = self.slots(self.update(update))
        return Totals.of(objective.valid_decisions(slots, batch, None, memory or self._memory_for(batch)), batch.horizon)

    def loss(
        self,
        batch: Batch,
        memory: Memory | None = None,
        *,
        advantage: Tensor | Sequence[Sequence[float]] | None = None,
        totals: Totals | Batch | Mapping[str, Any] | None = None,
        nets: Nets | None = None,
        rng: Draws | Generator | None = None,
        update: str | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of an update (default: the first) on `batch`, differentiable in its `@now` statistics, and diagnostics.

        advantage [B,T]: given, or computed from this batch. totals: those of the whole update batch when `batch` is a
        micro-batch of it (`Method.totals(whole)`, the whole batch itself, or its numbers by name); micro-batch losses then add up
        exactly. nets: the networks, where terms ask for them (critics of actions, actors). Raises `CallError` on rewards that
        are not finite and on arguments of the wrong form.
        """
        u = self.update(update)
        memory = memory or self._memory_for(batch)
        objective.refuse_bad_rewards(batch)
        given = None if advantage is None else _advantage(advantage, batch)
        if given is None and "surrogate" in u.terms and self.slots(u).surrogate is not None:
            given = self.advantages(batch, memory, update=u.name)
        if isinstance(totals, Batch):
            totals = self.totals(totals, memory, update=u.name)
        elif totals is not None:
            totals = _totals(totals, batch)
        now = {k.removesuffix("@now"): v for k, v in batch.stats.items() if k.endswith("@now")}
        rng = rng if isinstance(rng, Draws) else Draws(rng, batch.mask.device)
        return objective.loss(self, u, batch, now, given, totals, memory, rng, nets)


def _main(updates: Sequence[Update]) -> int:
    """The first update on the batch `policy`; the first of all where none is."""
    return next((i for i, u in enumerate(updates) if u.on == "policy"), 0)


def _requires(part: Part) -> frozenset[Can]:
    """What a part requires; a table of items needs a task that has items."""
    return part.requires | ({Can.ITEMS} if part.table else frozenset())


def _advantage(given: Any, batch: Batch) -> Tensor:
    """A given advantage as a tensor [B,T] (or [B,T,K])."""
    try:
        x = torch.as_tensor(given, device=batch.mask.device)
    except (TypeError, ValueError) as error:
        raise CallError(f"advantage is not a tensor, expected shape {batch.shape} (rows x decisions): {error}") from None
    if x.dim() not in (2, 3) or tuple(x.shape[:2]) != batch.shape:
        raise CallError(f"advantage has shape {tuple(x.shape)}, expected {batch.shape} (rows x decisions)")
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _totals(given: Any, batch: Batch) -> Totals:
    """Given denominators, as numbers or tensors, as `Totals`."""
    entries = vars(given) if isinstance(given, Totals) else given
    if not isinstance(entries, Mapping):
        raise CallError(f"totals takes Method.totals(whole), the whole batch or a mapping, got {type(given).__name__}: {given!r}")
    known = [f.name for f in fields(Totals)]
    for key in entries:
        if key not in known:
            raise unknown("entry of totals", str(key), known)
    if lacking := [k for k in ("decisions", "rows") if k not in entries]:
        raise CallError(f"totals lacks '{lacking[0]}', got {sorted(entries)}")
    for key, value in entries.items():
        if not (isinstance(value, Tensor) and value.dim() == 0) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise CallError(f"totals['{key}'] = {value!r}: expected a number or a tensor without axes")
    counts = {k: torch.as_tensor(entries[k], device=batch.mask.device).float() for k in ("decisions", "rows")}
    return Totals(**counts, horizon=int(entries.get("horizon", 0)))


def _fit(slot: str, value: Any) -> Any:
    """Bring a slot's value into its form and refuse parts of another kind."""
    if slot in PLURAL:
        value = tuple(value) if isinstance(value, tuple | list) else () if value is None else (value,)
        names = [p.name for p in value if isinstance(p, Part)]
        if len(set(names)) < len(names):
            raise CallError(f"slot '{slot}' holds two parts of the same name: {names}")
    for part in value if slot in PLURAL else (value,):
        if part is None and slot in OPTIONAL:
            continue
        if not isinstance(part, Part):
            raise CallError(f"slot '{slot}' takes a Part, got {type(part).__name__}: {part!r}")
        if part.kind and part.kind != slot:
            raise CallError(f"slot '{slot}' takes a {slot}, got the {part.kind} '{part.name}'")
    return value
