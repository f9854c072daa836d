"""One worker process for all tests: importing the library takes longer than the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polopt.evidence.compare import schedule
from polopt.evidence.compare.run import Compared, compare
from polopt.evidence.compare.worker import modules_for

#: Two updates of every method in a fraction of a second.
SMALL: dict[str, Any] = {
    "collect.envs": 2, "collect.steps": 16, "collect.episodes": 2, "policy.hidden": "8", "evaluate.episodes": 2,
}  # fmt: skip


class Shared:
    """Stands for the worker of each comparison; made anew only when it is gone."""

    worker: schedule.Worker | None = None
    log: Path = Path()

    def __init__(self, log: Path, preload: Any, lock: int | None = None) -> None:
        if Shared.worker is None or Shared.worker.process.poll() is not None:
            Shared.worker = schedule.Worker(Shared.log / "worker.log", modules_for("control"))

    def __getattr__(self, name: str) -> Any:
        return getattr(Shared.worker, name)

    def close(self) -> None:
        if Shared.worker is not None and Shared.worker.process.poll() is not None:
            Shared.worker.close()
            Shared.worker = None


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Shared]]:
    Shared.log = tmp_path_factory.mktemp("worker")
    real = schedule.Worker
    yield Shared
    if Shared.worker is not None:
        real.close(Shared.worker)
        Shared.worker = None


@pytest.fixture
def go(tmp_path: Path, _shared: type[Shared], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compared]:
    """`compare` on CartPole with tiny settings, into `tmp_path`/out."""
    made = schedule.Worker

    class Worker(Shared):
        def __init__(self, log: Path, preload: Any, lock: int | None = None) -> None:
            monkeypatch.setattr(schedule, "Worker", made)
            try:
                super().__init__(log, preload)
            finally:
                monkeypatch.setattr(schedule, "Worker", Worker)

    monkeypatch.setattr(schedule, "Worker", Worker)

    def run(contestants: Any, task: Any = "gym:CartPole-v1", **given: Any) -> Compared:
        own = {k.replace(".", "__"): v for k, v in SMALL.items() if k not in given}
        usual: dict[str, Any] = {
            "budget": "2-updates", "seeds": 2, "out": tmp_path / "out", "page": False, "points": 2, "jobs": 2,
        }  # fmt: skip
        return compare(contestants, task, **{**usual, **own, **given})

    return run
