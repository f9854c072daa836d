"""`Offline`: a fixed set of transitions, drawn like a ring's."""

from __future__ import annotations

import torch

from polopt.batch import Batch
from polopt.collect.replay import Replay
from polopt.collect.transitions import Transitions
from polopt.errors import CallError, PoloptError
from polopt.interfaces import State
from polopt.parts.replay import Dataset, Ring


class Offline(Replay):
    """A `Dataset` bound to a run: transitions that were given, drawn like a ring's. Nothing can be written."""

    def __init__(
        self,
        dataset: Dataset,
        transitions: Transitions,
        *,
        gamma: float,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        layout, n = transitions.layout, len(transitions)
        super().__init__(
            Ring(size=n, batch=dataset.batch, start=0, n_step=dataset.n_step),
            obs_size=layout.obs, action_size=layout.action, discrete=layout.discrete, channels=layout.channels,
            envs=1, gamma=gamma, generator=generator, device=device,
        )  # fmt: skip
        self.transitions = transitions
        self._data.copy_(transitions.rows())
        self._filled[:] = n

    def write(self, batch: Batch) -> None:
        """Refused."""
        raise CallError(f"the dataset {self.transitions.name} is fixed: nothing can be written to it")

    def rounds(self) -> int:
        """One: a dataset never waits for decisions."""
        return 1

    def state(self) -> State:
        """The generator; the rows are read again from where they came."""
        return {"rows": len(self), "width": self.layout.width, "generator": self.generator.get_state()}

    def load(self, state: State) -> None:
        """Restore from `state()`. Raises `PoloptError` when the dataset has changed its size."""
        if (state["rows"], state["width"]) != (len(self), self.layout.width):
            raise PoloptError(
                f"the dataset {self.transitions.name} has changed: {len(self)} transitions of {self.layout.width} numbers, "
                f"{state['rows']} of {state['width']} when the checkpoint was written"
            )
        self.generator.set_state(state["generator"])


__all__ = ["Offline"]
