"""The observers that a run has unless the user says otherwise."""

from __future__ import annotations

from pathlib import Path

from polopt.evidence.watch.progress import Progress
from polopt.evidence.watch.tensorboard import TensorBoard
from polopt.interfaces import Observer


def default_observers(folder: Path, *, quiet: bool = False, tensorboard: bool = True, wandb: bool = False) -> list[Observer]:
    """Progress display (unless quiet), TensorBoard events in `folder`/tb, and Weights & Biases on request.

    Raises `CallError` when `wandb` is asked for and not installed.
    """
    observers: list[Observer] = [] if quiet else [Progress()]
    if tensorboard:
        observers.append(TensorBoard(Path(folder) / "tb"))
    if wandb:
        from polopt.evidence.watch.wandb import WandB

        observers.append(WandB(Path(folder)))
    return observers


__all__ = ["default_observers"]
