"""Rounds of updates on transitions from a replay or a dataset: each round is one draw, for which every update is due once.

What the updates of a round hand on to each other are statistics `name@drawn`. Slow copies move after the steps that they follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polopt.batch import Batch, Clock, Totals
from polopt.errors import PoloptError
from polopt.interfaces import State
from polopt.loops.executor import Executor
from polopt.objective import Diagnostics
from polopt.update import Update


def drawn(info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a step hands on to the updates that follow it in the round."""
    return {k: v for k, v in info.items() if k.endswith("@drawn")}


class Rounds:
    """Carries out the updates of a method round by round; shares parameters and optimiser state with its executors."""

    def __init__(self, executors: Mapping[str, Executor], policy: Any) -> None:
        self.executors, self.policy = dict(executors), policy
        self.count = 0  # rounds made
        self.steps = dict.fromkeys(self.executors, 0)  # steps of each update
        self.copies = {
            name: (list(slow.parameters()), list(policy.nets()[name].parameters())) for name, slow in policy.slow.items()
        }
        self.compiled: Any = None

    def run(self, batch: Batch, rounds: int, clock: Clock, *, compiled: bool = False) -> Diagnostics:
        """`rounds` rounds on equally many parts of `batch`; diagnostics are means over the rounds in which they were told."""
        size = batch.shape[0] // rounds
        totals = Totals(*(torch.tensor(float(size), device=batch.mask.device),) * 2)
        told: dict[str, list[Tensor]] = {}
        one = self._compiled_round if compiled else self._round
        for k in range(rounds):
            part = batch if rounds == 1 else batch.rows(slice(k * size, (k + 1) * size))
            for name, value in one(replace(part, clock=clock), totals, clock).items():
                told.setdefault(name, []).append(value)
        return {k: torch.stack(v).mean() for k, v in told.items()}

    def due(self) -> list[Executor]:
        """The updates of the next round."""
        return [e for e in self.executors.values() if self.count % e.update.every == e.update.every - 1]

    def _round(self, batch: Batch, totals: Totals, clock: Clock) -> Diagnostics:
        found: Diagnostics = {}
        for executor in self.due():
            info = executor.once(batch, totals, clock)
            if handed := drawn(info):
                batch = batch.adding(handed)
            self.follow(executor.update)
            found |= self.named(executor, {k: v for k, v in info.items() if k not in handed}, found)
        self.count += 1
        return found

    def _compiled_round(self, batch: Batch, totals: Totals, clock: Clock) -> Diagnostics:
        if self.compiled is None:
            from polopt.loops.fused import FusedRounds

            self.compiled = FusedRounds(self)
        found: Diagnostics = self.compiled.run(self.due(), batch, totals, clock)
        return found

    @staticmethod
    def named(executor: Executor, info: Diagnostics, before: Mapping[str, Tensor]) -> Diagnostics:
        """Diagnostics under the update's name where several updates tell the same."""
        own = executor.update.name
        return {f"{own}/{k}" if k in before or k in SHARED else k: v for k, v in info.items()}

    def follow(self, update: Update) -> None:
        """Carry out what follows a step of `update`."""
        self.steps[update.name] += 1
        for part in update.after:
            rule: Any = part
            if rule.due(self.steps[update.name]):
                for name in rule.moves(self.copies):
                    rule.step(*self.copies[name])

    def state(self) -> State:
        """Where the schedules stand."""
        return {"count": self.count, "steps": dict(self.steps)}

    def load(self, state: State) -> None:
        """Restore from `state()`."""
        self.count, self.steps = int(state["count"]), {k: int(v) for k, v in state["steps"].items()}


#: diagnostics that every update tells
SHARED = frozenset({"loss", "grad_norm", "skipped", "lr"})


def needs_nets(policy: Any) -> None:
    """Raise `PoloptError` when a policy cannot serve rounds."""
    if not isinstance(getattr(policy, "slow", None), nn.ModuleDict):
        raise PoloptError(f"{type(policy).__name__} holds no networks for parts, so it cannot be trained from a replay")


__all__ = ["Rounds", "drawn"]
