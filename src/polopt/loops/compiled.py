"""Several minibatch steps as one compiled graph over flat parameters, for any method whose parts trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from polopt.batch import Batch, Clock
from polopt.objective import Diagnostics

if TYPE_CHECKING:
    from polopt.loops.executor import Executor


def can_compile(executor: Executor) -> bool:
    """Whether all parts of the update trace and its rule offers a step inside the graph."""
    return False


class CompiledSteps:
    """Compiled minibatch steps of one executor."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, batch: Batch, advantage: Tensor | None, clock: Clock, size: int) -> Diagnostics:
        """Make all steps of the update on `batch`."""
        raise NotImplementedError
