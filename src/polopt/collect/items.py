"""The shuffled stream of a task's items, the same for every method at a seed: each epoch is a new permutation of all of them."""

from __future__ import annotations

import torch

from polopt.interfaces import State
from polopt.run import seed_of


class ItemStream:
    """Indices of `size` items in random order, without end; the order depends on seed and epoch alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch, self.place = 0, 0
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, f"collect/items/{self.epoch}"))
        return torch.randperm(self.size, generator=generator).tolist()

    def draw(self, n: int) -> list[int | None]:
        """The next `n` items."""
        out: list[int | None] = []
        while len(out) < n:
            if self.place == self.size:
                self.epoch, self.place = self.epoch + 1, 0
                self._order = self._shuffled()
            some = self._order[self.place : self.place + n - len(out)]
            self.place += len(some)
            out += some
        return out

    def state(self) -> State:
        """Where the stream stands."""
        return {"epoch": self.epoch, "place": self.place}

    def load(self, state: State) -> None:
        """Restore from `state()` (further entries do not matter)."""
        self.epoch, self.place = state["epoch"], state["place"]
        self._order = self._shuffled()
