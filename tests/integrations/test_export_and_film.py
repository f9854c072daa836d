"""Policies as ONNX give the actions that `predict` gives; videos show one evaluation episode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import polopt
from polopt.cli import main
from polopt.errors import CallError
from polopt.integrations.onnx import to_onnx
from polopt.integrations.video import frames, record

onnxruntime = pytest.importorskip("onnxruntime", reason="comes with the extra 'export' and onnxruntime")

CASES = [
    ("ppo", "gym:Pendulum-v1", {"policy.normalize_obs": True}), ("ppo", "gym:CartPole-v1", {}),
    ("ppo", "gym:Pendulum-v1", {"policy.distribution": "squashed"}), ("sac", "gym:Pendulum-v1", {"source.start": 16}),
    ("td3", "gym:Pendulum-v1", {"source.start": 16}), ("sac-discrete", "gym:CartPole-v1", {"source.start": 16}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "task", "more"), CASES)
def test_exported_policy_gives_the_same_actions(method: str, task: str, more: dict[str, object], tmp_path: Path) -> None:
    run = polopt.train(
        method, task, budget="64-decisions", out=False, overrides={"policy.hidden": (16, 16), "evaluate.episodes": 1, **more}
    )
    session = onnxruntime.InferenceSession(str(to_onnx(run.policy, tmp_path / "p.onnx")))
    rng = np.random.default_rng(0)
    for n in (1, 7):
        raw = (3 * rng.normal(size=(n, *run.policy.observation.shape))).astype(np.float32)
        (found,) = session.run(None, {"obs": run.policy.observation.encode(raw)})
        expected = run.predict(raw)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_export_and_film_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    polopt.train(
        "td3", "gym:Pendulum-v1", budget="32-decisions", out=run,
        overrides={"policy.hidden": (8,), "source.start": 16, "evaluate.episodes": 1, "options.max_episode_steps": 10},
    )  # fmt: skip
    assert main(["export", str(run), str(tmp_path / "policy.onnx")]) == 0
    assert (tmp_path / "policy.onnx").stat().st_size > 500
    pytest.importorskip("imageio")
    pytest.importorskip("pygame")
    assert main(["eval", str(run), "--video", str(tmp_path / "one.gif")]) == 0
    assert "one episode, return" in capsys.readouterr().out
    import imageio.v2 as imageio

    shots = imageio.mimread(tmp_path / "one.gif", memtest=False)
    assert len(shots) >= 2
    assert main(["export", str(run), str(tmp_path / "policy.txt")]) == 2
    assert main(["eval", str(run), "--video", str(tmp_path / "one.avi")]) == 2


def test_film_shows_every_step_and_tells_the_return() -> None:
    pytest.importorskip("pygame")
    run = polopt.train("ppo", "gym:CartPole-v1", budget="64-decisions", out=False, overrides={"evaluate.episodes": 1})
    task = polopt.api.resolve("ppo", "gym:CartPole-v1", {}, sources="call").task
    shots, total, rate = frames(run.policy, task, seed=3)
    assert len(shots) == int(total) + 1
    assert rate > 0
    assert shots[0].ndim == 3


def test_what_cannot_be_exported_or_filmed_says_so(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="perceptron"):
        to_onnx(torch.nn.Linear(2, 2), tmp_path / "x.onnx")
    task = polopt.api.resolve("grpo", "table:tree", {}, sources="call").task
    with pytest.raises(CallError, match="no pictures"):
        record(None, task, tmp_path / "x.gif")


def test_saved_policies_come_back_with_critics_and_normalisers(tmp_path: Path) -> None:
    from polopt.policies.control import load_pretrained

    for method, task, more in (("sac", "gym:Pendulum-v1", {"policy.normalize_obs": True}), ("sac-discrete", "gym:CartPole-v1", {})):
        run = polopt.train(
            method, task, budget="48-decisions", out=False,
            overrides={"policy.hidden": (8, 8), "source.start": 16, "evaluate.episodes": 1, **more},
        )  # fmt: skip
        run.policy.save_pretrained(tmp_path / method)
        again = load_pretrained(tmp_path / method)
        mine, other = run.policy._tensors(), again._tensors()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[k], other[k]) for k in mine)
        raw = np.random.default_rng(0).normal(size=(5, *run.policy.observation.shape)).astype(np.float32)
        np.testing.assert_array_equal(run.predict(raw), again.predict(raw))
