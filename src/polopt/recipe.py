"""`Recipe` and `Stage`: a method whose run has stages, which hand over what they made to those that follow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from polopt.errors import CallError, Misfit, unknown
from polopt.method import Method
from polopt.part import Can, Part, Range
from polopt.run import Budget

#: What a stage may take over besides entries of memory ("memory.advantage").
ARTEFACTS = ("policy", "reference", "store")
#: Sections of a run's settings that a stage may set for itself; the others are the whole run's.
OWN_SETTINGS = ("collect", "optim")


@dataclass(frozen=True)
class Length:
    """How long a stage lasts: the `rest` of the budget, a share of it (0 to 1), passes over the task's items, or an amount."""

    kind: str  # "rest", "share", "passes" or "amount"
    number: float = 0.0
    unit: str = ""

    @classmethod
    def parse(cls, text: str) -> Length:
        """Read `rest`, `25%`, `1-pass`, `2-passes`, or an amount as a budget is written: `10-updates`, `5k-decisions`."""
        plain = str(text).strip().lower()
        if plain == "rest":
            return cls("rest")
        if found := re.fullmatch(r"([0-9]*\.?[0-9]+)\s*%", plain):
            kind, number = "share", float(found[1]) / 100
        elif found := re.fullmatch(r"([0-9]*\.?[0-9]+)[\s_-]*pass(?:es)?", plain):
            kind, number = "passes", float(found[1])
        else:
            try:
                amount = Budget.parse(plain)
            except CallError:
                raise CallError(f"length '{text}' of a stage is not understood; write rest, 25%, 1-pass or 10-updates") from None
            return cls("amount", amount.amount, amount.unit)
        if not number > 0 or (kind == "share" and number > 1):
            raise CallError(f"length '{text}' of a stage must be above 0{' and at most 100%' if kind == 'share' else ''}")
        return cls(kind, number)


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    method: what it runs; None: the recipe's own parts. length: see `Length`. takes: what it starts from, of the stage before it
    that has it last: "policy" (trained weights, as far as both have the nets), "reference" (that stage's policy becomes the frozen
    reference), "memory.SLOT" (what the part in a slot remembers), "store" (kept batches). settings: of the run, for this stage
    alone, by dotted path, in the sections `OWN_SETTINGS`.
    """

    name: str
    method: Method | None = None
    length: Annotated[str, "rest, 25% (of the budget), 1-pass (over the task's items), 10-updates, 5k-decisions"] = "rest"
    takes: Annotated[tuple[str, ...], "policy, reference, store, memory.SLOT: handed over by the stages before"] = ("policy",)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise CallError(f"stage '{self.name}': a stage is named by one word of letters, digits and _")
        Length.parse(self.length)


#: What can be set of a stage itself; everything else under its name is its method's, or a setting of the run.
STAGE_FIELDS = ("length", "takes")


@dataclass(frozen=True)
class Recipe(Method):
    """A method whose run has stages. Its slots are its own parts, which the stages without a method of their own run with.

    So a recipe is used, compared and set like any method: `surrogate.beta` is a setting of its own parts,
    `stages.estimate.sampler.group_size` one of the stage "estimate", and `stages.train.surrogate.beta` the same as `surrogate.beta`
    where the stage "train" runs the recipe's own parts. All stages share one budget, ledger, folder and clock of updates. A
    recipe of one stage is the method that it runs.

        estimate = Stage("estimate", VALUES, "1-pass")
        A_STAR_PO = Recipe.of(REINFORCE, "a-star-po", stages=(estimate, Stage("train", takes=("memory.advantage",))), ...)

    repeat: rounds of all stages in turn; each has an equal share of the budget, of which "rest" is what is left of the round.

    How others fit. Pretraining and fine-tuning, offline to online: `Stage("offline", IQL, "50%")`, then the recipe's own stage
    with `takes=("policy", "store")`, so that logged data stay in its replay. A reward model, then RL: a stage whose part
    learns in `observe` or trains a net of its own, and `takes=("policy", "memory.reward.NAME")`. Iterated preference rounds:
    `Stage("pairs", ...), Stage("fit", takes=("reference", "policy", "store"))` with `repeat=3`.
    """

    stages: tuple[Stage, ...] = ()
    repeat: Annotated[int, Range(ge=1), "rounds of all stages"] = 1

    @classmethod
    def of(cls, parent: Method, name: str, *, stages: Sequence[Stage], repeat: int = 1, **changes: Any) -> Recipe:
        """A child of `parent` that runs in stages, with `changes` as for `Method.but`."""
        child = parent.but(name, **changes)
        values = {f.name: getattr(child, f.name) for f in fields(Method)} | {"changes": (*child.changes, "stages")}
        made = cls(**{**values, "stages": tuple(stages), "repeat": repeat})
        made.check()
        return made

    # ---------------------------------------------------------------- reading
    def own(self) -> Method:
        """The recipe's own parts as a method without stages."""
        return Method(**{f.name: getattr(self, f.name) for f in fields(Method)})

    def method_of(self, stage: Stage) -> Method:
        """What a stage runs."""
        return stage.method or self.own()

    def stage(self, name: str) -> Stage:
        """A stage by its name. Raises `CallError` with the nearest name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise unknown(f"stage of {self.name}", name, [s.name for s in self.stages])

    def parts(self) -> dict[str, Part]:
        """Its own parts, and those of stages with methods of their own ("stages.estimate.advantage")."""
        return super().parts() | {
            f"stages.{s.name}.{path}": part for s in self.stages if s.method for path, part in s.method.parts().items()
        }

    # ---------------------------------------------------------------- refusing
    def check(self) -> None:
        """Raise `CallError` if parts or stages cannot work together."""
        super().check()
        names = [s.name for s in self.stages]
        if not names or len(set(names)) < len(names):
            raise CallError(f"{self.name}: a recipe needs stages with distinct names, got {names}")
        if all(s.method is not None for s in self.stages):
            raise CallError(f"{self.name}: no stage runs the recipe's own parts; leave out the method of one of {', '.join(names)}")
        lengths = [Length.parse(s.length) for s in self.stages]
        for stage, length in zip(self.stages[:-1], lengths, strict=False):
            if length.kind == "rest":
                raise CallError(f"{self.name}: stage '{stage.name}' takes the rest of the budget, but is not the last one")
        shares = sum(x.number for x in lengths if x.kind == "share")
        if shares > 1 + 1e-9:
            raise CallError(f"{self.name}: the stages' shares of the budget add up to {shares:.0%}")
        if lengths[-1].kind == "share" and all(x.kind == "share" for x in lengths) and shares < 1 - 1e-9:
            raise CallError(f"{self.name}: the stages use {shares:.0%} of the budget only; write length='rest' for the last one")
        for index, stage in enumerate(self.stages):
            if stage.method is not None:
                stage.method.check()
            self._check_takes(index, stage)

    def refuse_unless(self, offers: Iterable[Can], what: str) -> None:
        """Raise `Misfit` with the reason when a stage requires what `what` does not offer."""
        offers = frozenset(offers)
        super().refuse_unless(offers, what)
        for stage in self.stages:
            if Length.parse(stage.length).kind == "passes" and Can.ITEMS not in offers:
                raise Misfit(
                    f"{self.name} cannot run on {what}: its stage '{stage.name}' passes over a known number of items, which {what} "
                    f"does not offer; give it another stages.{stage.name}.length"
                )

    def _check_takes(self, index: int, stage: Stage) -> None:
        """Raise `CallError` for what no stage before this one could hand over, or what it has no place for."""
        before = self.stages if self.repeat > 1 else self.stages[:index]
        for what in stage.takes:
            where = f"stage '{stage.name}' of {self.name}"
            slot = what.removeprefix("memory.")
            mine = _remembered(self.method_of(stage))
            if what == "reference" and Can.REFERENCE not in self.method_of(stage).requires():
                raise CallError(f"{where} takes over a reference, which none of its parts reads")
            if what not in ARTEFACTS and (slot == what or slot not in mine):
                raise unknown(f"what {where} takes over", what, [*ARTEFACTS, *(f"memory.{s}" for s in mine)])
            if slot in mine and slot != what and before:
                theirs = [_remembered(self.method_of(s)).get(slot) for s in before]
                if mine[slot] not in theirs:
                    raise CallError(
                        f"{where} takes over {what} ({', '.join(sorted(mine[slot]))}), but no stage before it remembers these"
                    )

    # ---------------------------------------------------------------- changing
    def with_stage(self, name: str, **changes: Any) -> Recipe:
        """The recipe with one stage changed: its length, what it takes over, its method or its settings."""
        self.stage(name)
        return replace(self, stages=tuple(replace(s, **changes) if s.name == name else s for s in self.stages))

    def rounds(self) -> Iterator[tuple[int, Stage]]:
        """(round, stage) in the order in which they run."""
        for round_ in range(self.repeat):
            yield from ((round_, s) for s in self.stages)


def _remembered(method: Method) -> dict[str, frozenset[str]]:
    """Names of the entries that parts remember, by slot path."""
    found = {path: frozenset({*part.initial(), *part.table}) for path, part in method.parts().items()}
    return {path: names for path, names in found.items() if names}


def stages_of(method: Method) -> tuple[Stage, ...]:
    """The stages of a recipe; none for other methods."""
    return method.stages if isinstance(method, Recipe) else ()


def acting(method: Method, state: Mapping[str, Any]) -> Method:
    """The method that wrote a checkpoint tree: of a recipe, that of the stage in which it was written."""
    return method.method_of(method.stage(state["stage"]["name"])) if isinstance(method, Recipe) else method


__all__ = ["ARTEFACTS", "OWN_SETTINGS", "STAGE_FIELDS", "Length", "Recipe", "Stage", "acting", "stages_of"]
