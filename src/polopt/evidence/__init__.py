"""What a run leaves behind and what it means: progress display, loggers, warnings in words, reports. It only reads."""

from __future__ import annotations

from polopt.evidence.watch.diagnostics import Finding, Thresholds, Watch, diagnose
from polopt.evidence.watch.observers import default_observers
from polopt.evidence.watch.progress import Progress
from polopt.evidence.watch.tensorboard import TensorBoard

__all__ = ["Finding", "Progress", "TensorBoard", "Thresholds", "Watch", "default_observers", "diagnose"]
