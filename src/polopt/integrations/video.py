"""A video of one evaluation episode of a control policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polopt.collect.vector import TRAIN_SEEDS
from polopt.errors import CallError, PoloptError

SUFFIXES = (".mp4", ".gif")


def frames(policy: Any, task: Any, *, seed: int = TRAIN_SEEDS, greedy: bool = True) -> tuple[list[NDArray[np.uint8]], float, int]:
    """Frames of the episode that starts from `seed`, its return, and frames per second.

    Raises `CallError` for tasks and environments that cannot be drawn.
    """
    import gymnasium as gym

    name = getattr(task, "id", None)
    if name is None:
        raise CallError(f"{task.name} has no pictures: videos are made of Gymnasium environments")
    try:
        env = gym.make(name, render_mode="rgb_array", disable_env_checker=True, **task.options)
    except Exception as error:
        raise CallError(f"{name} cannot be drawn: {error}") from error
    shots, total = [], 0.0
    try:
        obs, _ = env.reset(seed=seed)
        done = False
        shots.append(_shot(env, name))
        while not done:
            obs, reward, ended, cut, _ = env.step(policy.predict(obs, greedy=greedy))
            total, done = total + float(reward), ended or cut
            shots.append(_shot(env, name))
        rate = int(env.metadata.get("render_fps", 30))
    finally:
        env.close()
    return shots, total, rate


def _shot(env: Any, name: str) -> NDArray[np.uint8]:
    try:
        picture = env.render()
    except Exception as error:
        raise CallError(f"{name} cannot be drawn here ({type(error).__name__}: {error}); on a server set MUJOCO_GL=egl") from error
    if picture is None:
        raise CallError(f"{name} draws no pictures")
    return np.asarray(picture, dtype=np.uint8)


def record(policy: Any, task: Any, path: Path | str, *, seed: int = TRAIN_SEEDS, greedy: bool = True) -> float:
    """Write a video of an evaluation episode to `path` (.mp4 or .gif); returns the episode's return."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CallError(f"'{path}': expected a file name that ends in .mp4 or .gif")
    try:
        import imageio.v2 as imageio
    except ImportError as error:
        raise CallError("videos need the package imageio: pip install 'polopt[video]'") from error
    shots, total, rate = frames(policy, task, seed=seed, greedy=greedy)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        options: dict[str, Any] = (
            {"duration": 1000 / rate, "loop": 0} if path.suffix == ".gif" else {"fps": rate, "macro_block_size": 1}
        )
        imageio.mimsave(str(temporary), list[Any](shots), **options)
        temporary.replace(path)
    except (OSError, ImportError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise PoloptError(f"cannot write {path}: {error}; .mp4 needs imageio-ffmpeg, in the extra 'video'") from error
    return total


__all__ = ["frames", "record"]
