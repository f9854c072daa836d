"""`Memory`: what parts remember between iterations, owned by the run and saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polopt.part import Part


class Memory:
    """Named tensors per slot (`"advantage"`, `"penalty.kl"`); parts read them, only `observe` replaces them.

    items: how many the task has; columns of a part's `table` have one entry for each, at the item's own number.
    """

    def __init__(self, slots: Mapping[str, Part] | None = None, items: int = 0) -> None:
        self.slots: dict[str, dict[str, Tensor]] = {
            slot: dict(part.initial()) | {k: torch.full((items,), v, dtype=torch.float64) for k, v in part.table.items()}
            for slot, part in (slots or {}).items()
        }
        self.built: dict[str, Any] = {}  # what host parts built once from the data; made again on resuming, never saved

    def of(self, slot: str) -> Mapping[str, Tensor]:
        """What the part in `slot` remembers (empty when nothing)."""
        return self.slots.get(slot, {})

    def write(self, slot: str, entries: Mapping[str, Tensor]) -> None:
        """Replace entries of a slot with detached tensors."""
        if entries:
            self.slots.setdefault(slot, {}).update({k: v.detach() for k, v in entries.items()})

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything, for the checkpoint tree."""
        return {k: dict(v) for k, v in self.slots.items()}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore from `state()`."""
        self.slots = {k: dict(v) for k, v in state.items()}
