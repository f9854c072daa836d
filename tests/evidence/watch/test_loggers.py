"""TensorBoard events can be read back; Weights & Biases is refused with the fix when it is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polopt.errors import CallError
from polopt.evidence import TensorBoard, default_observers
from polopt.evidence.watch.progress import Progress
from polopt.interfaces import Event

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = event_accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def event(i: int, **more: Any) -> Event:
    metrics = {"update": i, "decisions": 100 * i, "entropy": i / 8, "loss/critic": 2.0, "word": "text", "nothing": None, **more}
    return Event(i, metrics, float(i), i / 10, evaluated="eval_score" in more)


def test_events_hold_every_number_over_decisions(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tb", per_second=1e9)
    board.start({})
    for i in range(1, 4):
        board.event(event(i, **({"eval_score": 0.5} if i == 2 else {})))
    board.end({})
    found = scalars(tmp_path / "tb")
    assert found["learn/entropy"] == [(100, 0.125), (200, 0.25), (300, 0.375)]
    assert found["loss/critic"] == [(100, 2.0), (200, 2.0), (300, 2.0)]
    assert found["evaluate/eval_score"] == [(200, 0.5)]
    assert set(found) == {"learn/entropy", "loss/critic", "evaluate/eval_score", "clock/update"}


def test_fast_runs_are_thinned_but_evaluations_and_the_last_update_are_kept(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tb", per_second=1e-6)
    board.start({})
    for i in range(1, 101):
        board.event(event(i, **({"eval_score": 0.5} if i == 50 else {})))
    board.end({})
    assert [step for step, _ in scalars(tmp_path / "tb")["learn/entropy"]] == [100, 5000, 10000]


def test_nothing_is_written_where_nothing_happened(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tb")
    board.start({})
    board.end({})
    assert not (tmp_path / "tb").exists()


def test_a_folder_that_cannot_be_written_ends_logging_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("a file is in the way")
    board = TensorBoard(tmp_path / "tb", per_second=1e9)
    board.start({})
    with pytest.warns(UserWarning, match="TensorBoard events in .* end here"):
        board.event(event(1))
    board.event(event(2))
    board.end({})


def test_wandb_missing_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(CallError, match=r"pip install 'polopt\[wandb\]'"):
        default_observers(tmp_path, quiet=True, wandb=True)


def test_wandb_gets_configuration_numbers_and_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    run = SimpleNamespace(
        log=lambda numbers, step: calls.append(("log", step, numbers)),
        summary=SimpleNamespace(update=lambda facts: calls.append(("summary", facts))),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    fake = SimpleNamespace(init=lambda **given: calls.append(("init", given)) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    from polopt.evidence.watch.wandb import WandB

    board = WandB(tmp_path / "my-run", per_second=1e-6)
    board.start({"method": "ppo", "seed": 1, "config": {"lr": 3e-4}})
    for i in range(1, 6):
        board.event(event(i))
    board.end({"status": "failed", "eval_score": 3.0, "versions": {}})
    board.end({})
    assert calls[0][1]["config"] == {"method": "ppo", "seed": 1, "lr": 3e-4}
    assert calls[0][1]["name"] == "my-run"
    assert [(c[1], c[2]["entropy"], "nothing" in c[2]) for c in calls if c[0] == "log"] == [
        (100, 0.125, False),
        (500, 0.625, False),
    ]
    assert calls[-2:] == [("summary", {"status": "failed", "eval_score": 3.0}), ("finish", 1)]


def test_default_observers(tmp_path: Path) -> None:
    assert [type(o) for o in default_observers(tmp_path)] == [Progress, TensorBoard]
    assert [type(o) for o in default_observers(tmp_path, quiet=True)] == [TensorBoard]
    assert default_observers(tmp_path, quiet=True, tensorboard=False) == []


def test_making_observers_imports_no_display_and_no_writer(tmp_path: Path) -> None:
    code = (
        "import sys; from polopt.evidence import default_observers; default_observers('x'); "
        "heavy = {'rich', 'tensorboard', 'matplotlib', 'wandb', 'yaml'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
