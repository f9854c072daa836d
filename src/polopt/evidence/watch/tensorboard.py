"""Curves for TensorBoard, written by its own event writer in a background thread."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polopt.interfaces import Event

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoard:
    """Observer that writes scalars to `folder` (usually RUN/tb), at most `per_second` updates of them, x axis: decisions.

    Evaluations and the last update are always written; `metrics.jsonl` has every update. A disk that is full ends the
    writing with one warning, not the run.
    """

    def __init__(self, folder: Path, *, per_second: float = 5.0) -> None:
        self.folder = Path(folder)
        self._gap = 1.0 / per_second
        self._next = 0.0
        self._writer: EventFileWriter | None = None
        self._late: Event | None = None
        self._off = False

    def start(self, info: Mapping[str, Any]) -> None:
        """Nothing yet: the writer is imported when there is something to write."""
        self._next = 0.0

    def event(self, event: Event) -> None:
        """Hand the metrics to the writer, or keep them aside if the last ones were just written."""
        now = time.perf_counter()
        if self._off:
            return
        if now < self._next and not event.evaluated:
            self._late = event
            return
        self._next = now + self._gap
        self._late = None
        self._write(event)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write what was held back, and close the file."""
        if self._late is not None:
            self._write(self._late)
            self._late = None
        if self._writer is not None:
            self._guard(self._writer.close)
            self._writer = None

    def _write(self, event: Event) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        values = [Summary.Value(tag=_tag(k), simple_value=float(x)) for k, x in event.metrics.items() if _plottable(k, x)]
        step = int(event.metrics.get("decisions") or event.update)
        record = Record(wall_time=time.time(), step=step, summary=Summary(value=values))
        if self._writer is None:
            self._guard(lambda: self.__dict__.update(_writer=EventFileWriter(str(self.folder), flush_secs=30)))
        if self._writer is not None:
            writer = self._writer
            self._guard(lambda: writer.add_event(record))

    def _guard(self, action: Any) -> None:
        """Run a file operation; on failure warn once and write no more."""
        try:
            action()
        except OSError as error:
            self._off, self._writer = True, None
            warnings.warn(f"TensorBoard events in {self.folder} end here: {error}", stacklevel=3)


_COUNTERS = {"decisions"}  # the x axis itself


def _plottable(key: str, x: Any) -> bool:
    return key not in _COUNTERS and isinstance(x, int | float)


def _tag(key: str) -> str:
    """TensorBoard groups by what stands before the slash."""
    if "/" in key:
        return key
    if key.startswith("eval"):
        return f"evaluate/{key}"
    if key in {"update", "tokens", "seconds", "seconds_collect", "seconds_update"}:
        return f"clock/{key}"
    if key in {"reward", "accuracy", "episode_return", "length", "truncated", "dead_groups"}:
        return f"collect/{key}"
    return f"learn/{key}"


__all__ = ["TensorBoard"]
