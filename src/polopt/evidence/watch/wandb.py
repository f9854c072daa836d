"""Curves for Weights & Biases; needs the extra `polopt[wandb]`."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polopt.errors import CallError
from polopt.interfaces import Event


class WandB:
    """Observer that logs to Weights & Biases, at most `per_second` updates and every evaluation; x axis: decisions.

    Raises `CallError` when made without the package, so before anything is trained.
    """

    def __init__(self, folder: Path, *, project: str = "polopt", per_second: float = 1.0, **settings: Any) -> None:
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise CallError("logging to Weights & Biases needs the package wandb: pip install 'polopt[wandb]'") from error
        self.folder, self.project, self.settings = Path(folder), project, settings
        self._gap = 1.0 / per_second
        self._next = 0.0
        self._run: Any = None
        self._late: Event | None = None

    def start(self, info: Mapping[str, Any]) -> None:
        """Open the run; `info["config"]` (a mapping), where given, becomes its configuration."""
        config = info.get("config")
        plain = {k: info[k] for k in ("method", "task", "seed") if k in info}
        self._run = self._wandb.init(
            project=self.project, dir=str(self.folder), name=self.folder.name,
            config=plain | (dict(config) if isinstance(config, Mapping) else {}), **self.settings,
        )  # fmt: skip

    def event(self, event: Event) -> None:
        """Log now, or keep aside if the last was just logged."""
        now = time.perf_counter()
        if now < self._next and not event.evaluated:
            self._late = event
            return
        self._next = now + self._gap
        self._late = None
        self._log(event)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Log what was held back, store the summary, close the run."""
        if self._run is None:
            return
        if self._late is not None:
            self._log(self._late)
            self._late = None
        self._run.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
        self._run.finish(exit_code=0 if summary.get("status") == "done" else 1)
        self._run = None

    def _log(self, event: Event) -> None:
        if self._run is not None:
            self._run.log(
                {k: v for k, v in event.metrics.items() if v is not None}, step=int(event.metrics.get("decisions") or event.update)
            )


__all__ = ["WandB"]
