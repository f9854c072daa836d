"""What a method claims and how it can be checked: its miniature experiment, its neutral values and its learning floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: What is expected of the method's number, compared with the baseline's.
Expect = Literal["higher", "lower", "not worse"]
#: How a run's curve of a metric becomes one number: its last value, its mean over the budget, its best or its worst value, or the
#: number of times that it fell by more than a fifth of its range from one evaluation to the next.
Reduce = Literal["final", "auc", "best", "lowest", "drops"]


@dataclass(frozen=True)
class Miniature:
    """A small experiment that tests a method's claim against a baseline at equal budget, declared in the method's own file.

    metric: a key of metrics.jsonl (or of summary.json, such as `peak_rss`). expect: "higher" and "lower" compare the
    numbers as they are; "not worse" allows the method to lie below the baseline by `margin` (in units of the metric).
    settings: for every arm; own and other: for the method and the baseline alone, by dotted path.
    """

    task: str
    budget: str
    claim: str  # the sentence that is tested, in small
    baseline: str = ""  # a method's name; empty: the parent
    metric: str = "eval_score"
    reduce: Reduce = "final"
    expect: Expect = "higher"
    margin: float = 0.0
    seeds: int = 5
    first: int = 0  # the first seed: an experiment that was designed by looking at runs is judged on others
    points: int = 10  # evaluations, spread evenly over the budget
    settings: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(range(self.first, self.first + self.seeds))


@dataclass(frozen=True)
class Neutral:
    """When a part that differs from the parent's makes no difference: with these settings, on such batches.

    Declared by slot path of the method, or of the parent where only that one has the part; None instead of a `Neutral` says that
    there is none. Slots whose parts differ in settings alone need no declaration.
    own: settings of the method's part (by the field's name); parent: settings of the parent's part in the same slot, where it
    is the parent that must be neutral; batch: names of conditions on the batch (`evidence.proof.batches`).
    equal: "loss" if loss and gradients agree, "gradient" if only the gradients do.
    """

    own: Mapping[str, Any] = field(default_factory=dict)
    parent: Mapping[str, Any] = field(default_factory=dict)
    batch: tuple[str, ...] = ()
    equal: Literal["loss", "gradient"] = "loss"


@dataclass(frozen=True)
class Floor:
    """What the method must at least learn: a score that every seed reaches on a task within a budget."""

    task: str
    budget: str
    score: float
    seeds: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)


__all__ = ["Expect", "Floor", "Miniature", "Neutral", "Reduce"]
